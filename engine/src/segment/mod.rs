//! Segments: the own one, published through the metadata store, and the peers' ones, cached by name.
//!
//! * [`own`] builds the own descriptor, [`publish`] writes it to the store, coalesced;
//! * [`discovery`] finds a peer's descriptor;
//! * [`remote`] is one opened segment with its links, [`connect`] chooses and makes them, [`table`] holds them by id;
//! * [`watch`] follows the store and confirms that a peer whose descriptor vanished is gone.

pub mod connect;
pub mod discovery;
pub mod own;
pub mod publish;
pub mod remote;
pub mod table;
pub mod watch;

use tidewire_core::{Location, TransportKind};

/// What is known about an open segment.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SegmentInfo {
    /// Segment name.
    pub name: String,
    /// Control address.
    pub address: String,
    /// Generation, 16 hex digits; empty for an official Mooncake peer.
    pub generation: String,
    /// Buffers it published when it was last looked up.
    pub buffers: Vec<BufferInfo>,
    /// Transport in use; `None` before the first transfer.
    pub transport: Option<TransportKind>,
    /// Why this transport, and why not the better ones.
    pub reason: String,
}

/// One published buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BufferInfo {
    /// Absolute virtual address in the owner's process.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where it lives, as its owner said; [`Location::Any`] if it did not.
    pub location: Location,
}

/// A segment that the metadata store lists.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ListedSegment {
    /// Segment name.
    pub name: String,
    /// Control address, if published.
    pub address: Option<String>,
    /// Its descriptor.
    pub descriptor: tidewire_core::mooncake::descriptor::SegmentDescriptor,
    /// Whether it disappears when its owner dies.
    pub leased: bool,
    /// Time to live of that lease, where the store tells.
    pub ttl: Option<std::time::Duration>,
}
