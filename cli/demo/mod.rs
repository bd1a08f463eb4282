//! `tidewire demo`: a prefill process hands the KV cache of a sequence to a decode process, and every byte is compared.
//!
//! Three processes: this one shows what happens, the two others hold memory and do the work. Prefill's and decode's pools
//! have the pages in different orders, so a block of one page, layer and plane is one request.

pub mod content;
pub mod layout;
pub mod pool;
pub mod protocol;
pub mod report;
pub mod role;
pub mod scene;

use std::{fs, path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};

use self::{
    content::ContentSpec,
    layout::{Layout, Model},
    protocol::{Direction, Setup},
    report::{Progress, Row, render},
    scene::Scene,
};
use crate::{
    bench::flags::{BIND_SETTING, P2P, Protocol, parse_seconds},
    error::CliError,
    stop::Stop,
    units::binary_size,
};

/// Seed of the generated pages.
const SEED: u64 = 0x6b76;
/// Setting that turns checksums of the native protocol on.
const CRC_SETTING: &str = "TIDEWIRE_TCP_CRC";

/// Moves a KV cache from a prefill process to a decode process and compares every byte.
#[derive(Args, Clone, Debug)]
pub struct DemoFlags {
    /// Whose KV cache.
    #[arg(long, value_enum, default_value_t = Model::Llama3_8b)]
    pub model: Model,
    /// Tokens in the cache.
    #[arg(long, default_value_t = 4096, value_name = "COUNT")]
    pub tokens: u64,
    /// Tokens per page.
    #[arg(long, default_value_t = 16, value_name = "COUNT")]
    pub page_tokens: u64,
    /// Move this file instead of a generated cache, in blocks of one page.
    #[arg(long, value_name = "PATH", conflicts_with = "tokens")]
    pub file: Option<PathBuf>,
    /// Write what decode received to this file.
    #[arg(long, value_name = "PATH", requires = "file")]
    pub output: Option<PathBuf>,
    /// How the bytes go; auto shows the best transport and, for comparison, tcp.
    #[arg(long, value_enum, default_value_t = Protocol::Auto)]
    pub transport: Protocol,
    /// `write`: prefill pushes. `read`: decode pulls.
    #[arg(long, value_enum, default_value_t = Operation::Write)]
    pub operation: Operation,
    /// Where the two find each other: P2PHANDSHAKE, http://HOST:PORT/metadata or etcd://HOST:PORT.
    #[arg(long, default_value = P2P, value_name = "URI")]
    pub metadata: String,
    /// Seconds a batch may take.
    #[arg(long, default_value = "60", value_parser = parse_seconds, value_name = "SECONDS")]
    pub timeout: f64,
    /// Leave out the checksums of the native TCP protocol.
    #[arg(long)]
    pub no_crc: bool,
}

/// Who starts the move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Operation {
    /// Prefill.
    Write,
    /// Decode.
    Read,
    /// First prefill, then decode.
    Both,
}

impl Operation {
    fn directions(self) -> &'static [Direction] {
        match self {
            Operation::Write => &[Direction::Write],
            Operation::Read => &[Direction::Read],
            Operation::Both => &[Direction::Write, Direction::Read],
        }
    }
}

/// Runs the demo.
///
/// # Errors
/// Any wrong byte, and whatever keeps bytes from moving.
pub fn run(flags: &DemoFlags) -> Result<(), CliError> {
    let (layout, content, title) = plan(flags)?;
    let stop = Stop::listen().map_err(CliError::io("installing signal handlers"))?;
    println!("{title}");
    let mut rows = show(flags, flags.transport, layout, &content, &stop)?;
    let sockets_seen = rows.iter().all(|row| row.transport.contains("tcp"));
    if flags.transport == Protocol::Auto && !sockets_seen {
        rows.extend(show(flags, Protocol::Tcp, layout, &content, &stop)?);
    }
    println!("\n{}", render(&rows));
    Ok(())
}

/// One pair of processes over one choice of transports.
fn show(
    flags: &DemoFlags,
    protocol: Protocol,
    layout: Layout,
    content: &ContentSpec,
    stop: &Stop,
) -> Result<Vec<Row>, CliError> {
    let p2p = flags.metadata == P2P || flags.metadata.starts_with("p2p://");
    let setup = Setup {
        name: if p2p { String::new() } else { format!("tidewire-demo-{}", std::process::id()) },
        metadata: flags.metadata.clone(),
        protocol,
        layout,
        content: content.clone(),
        filled: false,
        seed: 0,
        timeout_ms: (flags.timeout * 1e3) as u64,
    };
    let mut environment = vec![(CRC_SETTING, if flags.no_crc { "0" } else { "1" })];
    if !p2p && std::env::var_os(BIND_SETTING).is_none() {
        environment.push((BIND_SETTING, "127.0.0.1"));
    }
    eprintln!("{protocol}: starting prefill and decode, filling {} of pages", binary_size(layout.bytes()));
    let mut scene = Scene::start(&setup, &environment, stop)?;
    eprintln!("{protocol}: {}", scene.cast());
    let mut rows = Vec::new();
    for direction in flags.operation.directions() {
        let mut progress = Progress::new(format!("{protocol}: {direction:?}"), layout.bytes());
        let row = scene.play(*direction, |bytes| progress.at(bytes))?;
        progress.end(Duration::from_secs_f64(row.seconds));
        rows.push(row);
    }
    if let Some(path) = &flags.output {
        scene.save(path)?;
    }
    scene.end()?;
    Ok(rows)
}

fn plan(flags: &DemoFlags) -> Result<(Layout, ContentSpec, String), CliError> {
    let block = flags.page_tokens.saturating_mul(flags.model.token_bytes());
    if let Some(path) = &flags.file {
        let metadata = fs::metadata(path).map_err(CliError::io(format!("reading {}", path.display())))?;
        if !metadata.is_file() {
            return Err(CliError::usage(format!("{} is no regular file", path.display()), "name a regular file"));
        }
        // The two processes read the file themselves.
        let path = path.canonicalize().map_err(CliError::io(format!("reading {}", path.display())))?;
        if block == 0 {
            return Err(CliError::usage("a page has to hold at least one token", "use --page-tokens 16"));
        }
        let layout = Layout::of_file(metadata.len(), block)?;
        let (pages, size) = (layout.pages, binary_size(block));
        let title = format!("{}: {} bytes in {pages} blocks of {size}", path.display(), metadata.len());
        return Ok((layout, ContentSpec::File { path }, title));
    }
    let layout = Layout::of_model(flags.model, flags.tokens, flags.page_tokens)?;
    let name = flags.model.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
    let title = format!(
        "KV cache of {name}, {} tokens: {} layers x {} pages of {} tokens x K and V = {} blocks of {}, {}",
        flags.tokens,
        layout.layers,
        layout.pages,
        flags.page_tokens,
        layout.blocks(),
        binary_size(block),
        binary_size(layout.bytes()),
    );
    Ok((layout, ContentSpec::Pattern { seed: SEED }, title))
}
