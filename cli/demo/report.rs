//! What the demo shows: progress while pages move, and the table at the end.

use std::{io::IsTerminal, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::protocol::Direction;
use crate::{table::Table, units::binary_size};

/// Share of the way between two plain lines, in percent.
const PLAIN_STEP: u64 = 25;

/// How one move went.
#[derive(Clone, Debug)]
pub struct Row {
    /// Direction.
    pub direction: Direction,
    /// How the bytes went.
    pub transport: String,
    /// Why that way.
    pub reason: String,
    /// Bytes moved.
    pub bytes: u64,
    /// From the first submit to the last completion, notification included.
    pub seconds: f64,
    /// Blocks that were moved one at a time before, for the latency.
    pub sampled: u64,
    /// Median time of those.
    pub p50_us: f64,
    /// Time of those that 99 % do not exceed.
    pub p99_us: f64,
    /// CPU time of both processes during the move.
    pub cpu_s: f64,
    /// CRC32C of the pages where they came from.
    pub source_crc: u32,
    /// CRC32C of the pages where they went.
    pub target_crc: u32,
}

/// The table, and below it why each transport was taken.
pub fn render(rows: &[Row]) -> String {
    let mut table = Table::new([
        "operation",
        "transport",
        "bytes",
        "GB/s",
        "p50/block",
        "p99/block",
        "CPU s/GB",
        "prefill crc",
        "decode crc",
        "",
    ]);
    for row in rows {
        let gigabytes = row.bytes as f64 / 1e9;
        table.row([
            format!("{:?}", row.direction).to_lowercase(),
            row.transport.clone(),
            row.bytes.to_string(),
            format!("{:.2}", gigabytes / row.seconds.max(1e-9)),
            format!("{:.1} us", row.p50_us),
            format!("{:.1} us", row.p99_us),
            format!("{:.2}", row.cpu_s / gigabytes.max(1e-9)),
            format!("{:08x}", row.source_crc),
            format!("{:08x}", row.target_crc),
            if row.source_crc == row.target_crc { "equal" } else { "DIFFERENT" }.to_owned(),
        ]);
    }
    let mut text = table.render();
    let sampled = rows.first().map_or(0, |row| row.sampled);
    text += &format!("\nLatency: {sampled} blocks moved one at a time, each a batch of its own.\n");
    text += "CPU: both processes, during the move. Every byte of both pools was compared, unused pages included.\n";
    let mut told: Vec<&str> = Vec::new();
    for row in rows {
        if !told.contains(&row.transport.as_str()) {
            text += &format!("Why {}: {}\n", row.transport, row.reason);
            told.push(&row.transport);
        }
    }
    text
}

/// Shows how far a move is: a bar at a terminal, a few lines elsewhere.
#[derive(Debug)]
pub struct Progress {
    label: String,
    bytes: u64,
    bar: Option<ProgressBar>,
    /// The next percentage that gets a line.
    next: u64,
}

impl Progress {
    /// A move of `bytes` bytes.
    pub fn new(label: String, bytes: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{prefix:24} [{bar:36}] {bytes:>10} of {total_bytes}");
            if let Ok(style) = style {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(label.clone());
            bar
        });
        Progress { label, bytes, bar, next: PLAIN_STEP }
    }

    /// So many bytes are there.
    pub fn at(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            return bar.set_position(bytes);
        }
        let percent = bytes.saturating_mul(100) / self.bytes.max(1);
        if percent >= self.next {
            eprintln!("{}: {percent:3} % of {}", self.label, binary_size(self.bytes));
            self.next = (percent / PLAIN_STEP + 1) * PLAIN_STEP;
        }
    }

    /// The move is over, in `elapsed`.
    pub fn end(&self, elapsed: Duration) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
            eprintln!("{}: {} in {:.2} s", self.label, binary_size(self.bytes), elapsed.as_secs_f64());
        }
    }
}
