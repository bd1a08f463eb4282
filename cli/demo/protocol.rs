//! What the demo's parent says to its two processes, and what they answer.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{content::ContentSpec, layout::Layout};
use crate::{bench::flags::Protocol, pattern::Mismatch};

/// How a process is to be set up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// Own segment name.
    pub name: String,
    /// Metadata URI.
    pub metadata: String,
    /// Transports that may be used.
    pub protocol: Protocol,
    /// Geometry.
    pub layout: Layout,
    /// What the pages hold, or shall hold.
    pub content: ContentSpec,
    /// Whether the pages hold it already: true for prefill.
    pub filled: bool,
    /// Seed of the page table.
    pub seed: u64,
    /// Limit of a batch.
    pub timeout_ms: u64,
}

/// Where a process keeps the pages: what the peer needs to reach them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pages {
    /// Segment to open.
    pub segment: String,
    /// Address of each layer's buffer.
    pub bases: Vec<u64>,
    /// Slot in the pool of each page of the sequence.
    pub table: Vec<u32>,
}

/// Direction of a move, as seen by who starts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Prefill puts the pages into decode's memory.
    Write,
    /// Decode fetches them.
    Read,
}

/// What the parent says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Command {
    /// Start the engine, allocate and fill. Answer: `Ready`.
    Start(Setup),
    /// Open the peer and move some blocks one at a time. Answer: `Sampled`.
    Sample { peer: Pages, direction: Direction, blocks: u32 },
    /// Wipe the whole pool. Answer: `Done`.
    Wipe,
    /// Move every block, then notify. Answers: `Progress` …, `Moved`.
    Move { peer: Pages, direction: Direction, message: String },
    /// Which notifications have arrived? Answer: `Notified`.
    Notifications,
    /// Compare every byte with what it should be, in the order of the sequence. Answer: `Verified`.
    Verify,
    /// Write the sequence to a file. Answer: `Done`.
    Save { path: PathBuf },
    /// CPU time so far. Answer: `Cpu`.
    Cpu,
    /// End.
    Stop,
}

/// What a process answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// Set up.
    Ready(Pages),
    /// Blocks were moved one at a time.
    Sampled { blocks: u64, p50_us: f64, p99_us: f64 },
    /// Bytes moved so far.
    Progress { bytes: u64 },
    /// All moved.
    Moved { bytes: u64, seconds: f64, transport: String, reason: String },
    /// Notifications seen.
    Notified { messages: Vec<String> },
    /// Every byte compared.
    Verified { crc32c: u32, wrong: Option<(String, Mismatch)> },
    /// CPU time in seconds.
    Cpu { seconds: f64 },
    /// Done.
    Done,
    /// It did not work.
    Failed { message: String, hint: String },
}
