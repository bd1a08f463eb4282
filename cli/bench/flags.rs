//! Flags of the benchmark: those of Mooncake's `transfer_engine_bench` with its defaults, and our own.
//!
//! Names are written with `_` as in the original; `-` is taken too (see [`super::gflags`]).

use std::{fmt, path::PathBuf, time::Duration};

use clap::{ArgAction, Args, ValueEnum};
use serde::{Deserialize, Serialize};
use tidewire_core::Opcode;

use crate::{
    error::CliError,
    units::{ReportUnit, parse_size},
};

/// Metadata server of the original's defaults.
const DEFAULT_METADATA: &str = "192.168.3.77:2379";
/// Target of the original's defaults.
const DEFAULT_SEGMENT: &str = "192.168.3.76";
/// Setting that says where listeners bind.
pub const BIND_SETTING: &str = "TIDEWIRE_BIND_ADDRESS";
/// Discovery without a server.
pub const P2P: &str = "P2PHANDSHAKE";

/// Measures transfers between two processes.
#[derive(Args, Clone, Debug)]
#[command(rename_all = "snake_case")]
pub struct BenchFlags {
    /// `initiator` moves data from or to a `target`, which only holds memory.
    #[arg(long, value_enum, default_value_t = Mode::Initiator)]
    pub mode: Mode,
    /// Own segment name, `host[:port]` [default: the host name; 127.0.0.1 with --pair].
    #[arg(long, value_name = "NAME")]
    pub local_server_name: Option<String>,
    /// Where segments are found: P2PHANDSHAKE, http://HOST:PORT/metadata, etcd://HOST:PORT or HOST:PORT (etcd)
    /// [default: 192.168.3.77:2379; P2PHANDSHAKE with --pair].
    #[arg(long, value_name = "URI")]
    pub metadata_server: Option<String>,
    /// Segment of the target; with P2PHANDSHAKE the ip:port that the target prints [default: 192.168.3.76].
    #[arg(long, value_name = "NAME")]
    pub segment_id: Option<String>,
    /// Direction, seen from the initiator.
    #[arg(long, value_enum, default_value_t = Operation::Read)]
    pub operation: Operation,
    /// Transport: tcp, shm, cma, mooncake-tcp, or auto for the best that both sides offer. rdma falls back to tcp.
    #[arg(long, default_value = "rdma")]
    pub protocol: String,
    /// RDMA devices; not used by the transports there are.
    #[arg(long, default_value = "mlx5_2", value_name = "LIST")]
    pub device_name: String,
    /// File with an RDMA NIC priority matrix; not used by the transports there are.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "FILE")]
    pub nic_priority_matrix: String,
    /// Bytes per buffer (one buffer per NUMA node); raised to block_size x batch_size x threads where that is more.
    #[arg(long, default_value = "1073741824", value_parser = parse_size, value_name = "BYTES")]
    pub buffer_size: u64,
    /// Requests per batch.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..), value_name = "COUNT")]
    pub batch_size: u32,
    /// Bytes per request.
    #[arg(long, default_value = "65536", value_parser = parse_size, value_name = "BYTES")]
    pub block_size: u64,
    /// Seconds to measure, for each point of a sweep.
    #[arg(long, default_value_t = 10.0, value_parser = parse_seconds, value_name = "SECONDS")]
    pub duration: f64,
    /// Threads that submit.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..=1024), value_name = "COUNT")]
    pub threads: u32,
    /// Choose transports from what the host has.
    #[arg(long, action = ArgAction::Set, default_value_t = false, value_parser = parse_bool(), value_name = "BOOL")]
    pub auto_discovery: bool,
    /// Unit of the final line: GB, GiB, Gb, MB, MiB, Mb, KB, KiB, Kb.
    #[arg(long, default_value = "GB", value_name = "UNIT")]
    pub report_unit: String,
    /// Digits after the point in the final line.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=9), value_name = "DIGITS")]
    pub report_precision: u8,
    /// Only `classic` is there.
    #[arg(long, default_value = "classic", value_name = "NAME")]
    pub backend: String,
    /// GPU memory; there is none yet, host memory is used.
    #[arg(long, action = ArgAction::Set, value_parser = parse_bool(), value_name = "BOOL")]
    pub use_vram: Option<bool>,
    /// Fill GPU memory before the run; host memory always is.
    #[arg(long, action = ArgAction::Set, value_parser = parse_bool(), value_name = "BOOL")]
    pub init_mem: Option<bool>,
    /// Which GPU; not used.
    #[arg(long, allow_negative_numbers = true, value_name = "ID")]
    pub gpu_id: Option<i32>,

    /// Start the target too, as a second process on this host.
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value_t = false,
          default_missing_value = "true", value_parser = parse_bool(), help_heading = "Tidewire's own")]
    pub pair: bool,
    /// Compare every byte, in both directions, before and after the measurement.
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value_t = false,
          default_missing_value = "true", value_parser = parse_bool(), help_heading = "Tidewire's own")]
    pub check: bool,
    /// Block sizes to measure one after another, such as 4096,64k,1M.
    #[arg(long, value_delimiter = ',', value_parser = parse_size, value_name = "SIZES", help_heading = "Tidewire's own")]
    pub sweep: Vec<u64>,
    /// Batch sizes to measure, each with every block size.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..), value_name = "COUNTS",
          help_heading = "Tidewire's own")]
    pub batch_sweep: Vec<u32>,
    /// Write each point as one line of JSON, to FILE or (`-` or nothing) stdout.
    #[arg(long, num_args = 0..=1, default_missing_value = "-", value_name = "FILE", help_heading = "Tidewire's own")]
    pub json: Option<PathBuf>,
    /// Draw throughput over block size as SVG.
    #[arg(long, value_name = "FILE", help_heading = "Tidewire's own")]
    pub plot: Option<PathBuf>,
    /// Microseconds a waiting thread polls before it sleeps [default: setting TIDEWIRE_SPIN_US].
    #[arg(long, value_name = "MICROSECONDS", help_heading = "Tidewire's own")]
    pub spin_us: Option<u64>,
    /// Seconds a batch may take before the run fails.
    #[arg(long, default_value_t = 60.0, value_parser = parse_seconds, value_name = "SECONDS",
          help_heading = "Tidewire's own")]
    pub timeout: f64,
}

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Moves data and measures.
    Initiator,
    /// Holds memory.
    Target,
}

/// Directions to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Operation {
    /// Remote to local.
    Read,
    /// Local to remote.
    Write,
    /// One after the other, writes first.
    Both,
}

impl Operation {
    /// The directions, in order.
    pub fn opcodes(self) -> &'static [Opcode] {
        match self {
            Operation::Read => &[Opcode::Read],
            Operation::Write => &[Opcode::Write],
            Operation::Both => &[Opcode::Write, Opcode::Read],
        }
    }
}

/// Which transports may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// The best that both sides offer.
    Auto,
    /// Sockets: the native protocol, or Mooncake's where the peer speaks no other.
    Tcp,
    /// Memory of the peer's engine, mapped.
    Shm,
    /// Copies between address spaces by the kernel.
    Cma,
    /// Mooncake's protocol.
    MooncakeTcp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Auto => "auto",
            Protocol::Tcp => "tcp",
            Protocol::Shm => "shm",
            Protocol::Cma => "cma",
            Protocol::MooncakeTcp => "mooncake-tcp",
        })
    }
}

/// Protocols of the original that have no transport here.
const FOREIGN: [&str; 11] =
    ["barex", "efa", "nvlink", "nvlink_intra", "musa", "maca", "hip", "sunrise_link", "ub", "ubshmem", "cxl"];

impl BenchFlags {
    /// Refuses what cannot be served, and warns of what is served otherwise.
    ///
    /// # Errors
    /// [`CliError::Usage`].
    pub fn checked_protocol(&self) -> Result<Protocol, CliError> {
        if self.backend != "classic" {
            return Err(CliError::usage(
                format!("backend {:?} is not available", self.backend),
                "use --backend=classic",
            ));
        }
        if self.use_vram == Some(true) || self.gpu_id.is_some() {
            tracing::warn!("GPU memory is not supported, host memory is used");
        }
        let protocol = match self.protocol.as_str() {
            "rdma" if self.auto_discovery => Protocol::Auto,
            "rdma" => {
                tracing::warn!("protocol rdma is not available on this build, tcp is used");
                Protocol::Tcp
            }
            name => Protocol::from_str(name, false).map_err(|_| unknown_protocol(name))?,
        };
        Ok(protocol)
    }

    /// Unit of the final line; GB with a warning if the one asked for is unknown, as in the original.
    pub fn unit(&self) -> ReportUnit {
        ReportUnit::parse(&self.report_unit).unwrap_or_else(|| {
            tracing::warn!(unit = self.report_unit, "unknown report unit, GB is used");
            ReportUnit::gigabytes()
        })
    }

    /// Connection string of discovery.
    pub fn metadata(&self) -> &str {
        self.metadata_server.as_deref().unwrap_or(if self.pair { P2P } else { DEFAULT_METADATA })
    }

    /// Own segment name.
    pub fn local_name(&self) -> String {
        match &self.local_server_name {
            Some(name) => name.clone(),
            None if self.pair => "127.0.0.1".to_owned(),
            None => rustix::system::uname().nodename().to_string_lossy().into_owned(),
        }
    }

    /// Name of the target's segment.
    pub fn target_name(&self) -> &str {
        self.segment_id.as_deref().unwrap_or(DEFAULT_SEGMENT)
    }

    /// Block sizes of the run, in order.
    pub fn block_sizes(&self) -> Vec<u64> {
        if self.sweep.is_empty() { vec![self.block_size] } else { self.sweep.clone() }
    }

    /// Batch sizes of the run, in order.
    pub fn batch_sizes(&self) -> Vec<u32> {
        if self.batch_sweep.is_empty() { vec![self.batch_size] } else { self.batch_sweep.clone() }
    }

    /// Bytes per buffer, large enough for every point.
    ///
    /// # Errors
    /// [`CliError::Usage`] when that leaves the address space, or a block has no bytes.
    pub fn buffer_bytes(&self) -> Result<u64, CliError> {
        let block = self.block_sizes().into_iter().max().unwrap_or(0);
        let batch = self.batch_sizes().into_iter().max().unwrap_or(0);
        if self.block_sizes().contains(&0) {
            return Err(CliError::usage("a block has to have at least one byte", "use --block_size=4096 or more"));
        }
        let needed = block.checked_mul(u64::from(batch)).and_then(|bytes| bytes.checked_mul(u64::from(self.threads)));
        let needed = needed
            .filter(|bytes| *bytes < 1 << 46)
            .ok_or_else(|| CliError::usage("block_size x batch_size x threads is too large", "lower one of them"))?;
        Ok(needed.max(self.buffer_size))
    }

    /// How long one point is measured.
    pub fn run_time(&self) -> Duration {
        Duration::from_secs_f64(self.duration)
    }

    /// How long a batch may take.
    pub fn patience(&self) -> Duration {
        Duration::from_secs_f64(self.timeout)
    }
}

fn unknown_protocol(name: &str) -> CliError {
    let known = "use tcp, shm, cma, mooncake-tcp or auto";
    if FOREIGN.contains(&name) {
        CliError::usage(format!("protocol {name} has no transport in this engine"), known)
    } else {
        CliError::usage(format!("unknown protocol {name:?}"), known)
    }
}

/// Booleans as gflags reads them.
fn parse_bool() -> clap::builder::BoolishValueParser {
    clap::builder::BoolishValueParser::new()
}

/// Reads a positive number of seconds, of at most 30 days.
pub fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    let usable = seconds > 0.0 && seconds <= 30.0 * 86_400.0;
    usable.then_some(seconds).ok_or_else(|| "has to be more than 0 and at most 30 days".to_owned())
}
