//! What a point of the benchmark measured, as the final line and as JSON.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::{error::CliError, units::ReportUnit};

/// One measured point.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// `read` or `write`.
    pub operation: String,
    /// Bytes per request.
    pub block_size: u64,
    /// Requests per batch.
    pub batch_size: u32,
    /// Threads that submitted.
    pub threads: u32,
    /// From the first submit to the last completion.
    pub duration_s: f64,
    /// Completed batches.
    pub batches: u64,
    /// Bytes of completed batches.
    pub bytes: u64,
    /// Throughput in 10^9 bytes per second.
    pub gb_per_s: f64,
    /// Median time of a batch, from allocation to completion.
    pub p50_us: Option<f64>,
    /// Time of a batch that 99 % do not exceed.
    pub p99_us: Option<f64>,
    /// CPU time of the initiator.
    pub cpu_s: f64,
    /// CPU time of the initiator per 10^9 bytes.
    pub cpu_s_per_gb: Option<f64>,
    /// CPU time of the target, where this command started it.
    pub target_cpu_s: Option<f64>,
    /// How the bytes went.
    pub transport: String,
    /// Why that way.
    pub reason: String,
    /// Whether every byte was compared; false when it was not asked for.
    pub checked: bool,
    /// Whether a signal ended the measurement early.
    pub interrupted: bool,
}

impl Point {
    /// The line that the original ends with.
    pub fn final_line(&self, unit: ReportUnit, precision: usize) -> String {
        let rate = if self.duration_s > 0.0 { self.bytes as f64 / self.duration_s } else { 0.0 };
        format!(
            "Test completed: duration {:.2}, batch count {}, throughput {}",
            self.duration_s,
            self.batches,
            unit.rate(rate, precision)
        )
    }
}

/// Where points go as lines of JSON.
#[derive(Debug)]
pub struct JsonLines {
    out: Option<Output>,
}

#[derive(Debug)]
enum Output {
    Stdout,
    File(File),
}

impl JsonLines {
    /// Opens `path` (`-`: stdout); nothing is written where there is none.
    ///
    /// # Errors
    /// [`CliError::Io`] when the file cannot be made.
    pub fn open(path: Option<&Path>) -> Result<Self, CliError> {
        let out = match path {
            None => None,
            Some(path) if path == Path::new("-") => Some(Output::Stdout),
            Some(path) => {
                let file = File::create(path).map_err(CliError::io(format!("creating {}", path.display())))?;
                Some(Output::File(file))
            }
        };
        Ok(JsonLines { out })
    }

    /// Writes one point.
    ///
    /// # Errors
    /// [`CliError::Io`].
    pub fn write(&mut self, point: &Point) -> Result<(), CliError> {
        let Some(out) = &mut self.out else { return Ok(()) };
        let line = serde_json::to_string(point).map_err(io::Error::from);
        let written = line.and_then(|line| match out {
            Output::Stdout => writeln!(io::stdout().lock(), "{line}"),
            Output::File(file) => writeln!(file, "{line}"),
        });
        written.map_err(CliError::io("writing JSON"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_final_line_is_the_original_one() {
        let point = Point { duration_s: 2.001, batches: 537, bytes: 1_120_000_000, ..Point::default() };
        let line = point.final_line(ReportUnit::gigabytes(), 2);
        assert_eq!(line, "Test completed: duration 2.00, batch count 537, throughput 0.56 GB/s");
        let nothing = Point { duration_s: 0.0, bytes: 0, ..point };
        assert!(nothing.final_line(ReportUnit::gigabytes(), 1).ends_with("throughput 0.0 GB/s"));
    }
}
