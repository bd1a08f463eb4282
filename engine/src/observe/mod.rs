//! What an engine tells about itself: status for people and tools, counters.

pub mod counters;

use serde::Serialize;
use tidewire_core::TransportKind;

pub use counters::{CounterValues, Counters};

/// State of an engine at one moment.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct EngineStatus {
    /// Own segment name, as peers open it.
    pub segment: String,
    /// Generation of the own segment, 16 hex digits.
    pub generation: String,
    /// Metadata store, with its address.
    pub store: String,
    /// Control address that peers are told.
    pub control_address: String,
    /// Port of the native data listener; 0: none.
    pub data_port: u16,
    /// Port for official Mooncake peers; 0: none.
    pub mooncake_port: u16,
    /// Registered buffers.
    pub buffers: usize,
    /// Bytes in them.
    pub buffer_bytes: u64,
    /// Transports that were started.
    pub transports: Vec<TransportKind>,
    /// Transports that could not be started, or were not asked for, with the reason.
    pub unavailable: Vec<UnavailableTransport>,
    /// Segments that are open.
    pub peers: Vec<PeerStatus>,
    /// Batches with something in flight.
    pub open_batches: usize,
    /// Notifications that wait for the application.
    pub waiting_notifications: usize,
    /// Sums since the engine was built.
    pub counters: CounterValues,
}

/// A transport that is not there.
#[derive(Clone, Debug, Serialize)]
pub struct UnavailableTransport {
    /// Which.
    pub transport: TransportKind,
    /// Why.
    pub reason: String,
}

/// One open segment.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct PeerStatus {
    /// Segment name.
    pub segment: String,
    /// Control address.
    pub address: String,
    /// Generation of the segment; empty for an official Mooncake peer.
    pub generation: String,
    /// Transport in use; `None` before the first transfer.
    pub transport: Option<TransportKind>,
    /// Why this transport, and why not the better ones.
    pub reason: String,
    /// The link in its own words: streams, retries.
    pub link: String,
    /// Slices in flight.
    pub open_slices: usize,
    /// Bytes handed to the link.
    pub bytes: u64,
    /// Links that were lost or could not be made.
    pub errors: u64,
    /// The last such error.
    pub last_error: Option<String>,
}
