//! The contract between the engine and what moves bytes, and its siblings.
//!
//! A [`Transport`] is made once per engine; it makes one [`Link`] per peer. The engine hands a link [`Slice`]s and the
//! link settles each slice's token exactly once. `docs/ARCHITECTURE.md` says which threads do the work.

pub mod cma;
pub mod fake;
pub mod local;
pub mod mooncake_tcp;
pub mod shm;
pub mod tcp;

use std::{
    fmt::Debug,
    sync::Arc,
    time::{Duration, Instant},
};

use tidewire_core::{ByteRange, Generation, Opcode, TransferError, mooncake::descriptor::SegmentDescriptor};

pub use tidewire_core::select::TransportKind;

use crate::{
    batch::{BatchCore, SliceToken},
    memory::LocalRegion,
};

/// What a link takes; must match what its `submit` accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Longest slice in bytes; the engine cuts requests to it.
    pub max_slice_bytes: u64,
    /// Whether `submit` settles the slices before it returns.
    pub synchronous: bool,
    /// Whether the target itself checks the remote range (otherwise the link checks it against what the target published).
    pub target_checks_range: bool,
}

/// Part of a request, in the hands of a transport.
///
/// The local bytes stay registered and mapped until the token is settled; after that the transport must not touch them.
#[derive(Debug)]
pub struct Slice {
    /// Direction.
    pub opcode: Opcode,
    /// Local address; inside a region pinned by the batch.
    pub local: u64,
    /// Address in the target process.
    pub target: ByteRange,
    /// The duty to settle it.
    pub token: SliceToken,
}

/// A peer as a transport sees it.
#[derive(Debug)]
pub struct Peer {
    /// Segment name.
    pub segment: String,
    /// Control address `host:port`.
    pub address: String,
    /// What discovery said when the link was made.
    pub descriptor: Arc<SegmentDescriptor>,
}

/// Who this engine is towards its peers.
#[derive(Debug)]
pub struct Identity {
    /// Name of the own segment, as peers open it.
    pub segment: String,
    /// This life of the segment.
    pub generation: Generation,
    /// What a native peer has to show; published in the descriptor only.
    pub token: [u8; 16],
    /// Same value = same host (boot id and namespaces).
    pub host_id: String,
}

/// One way to move bytes.
pub trait Transport: Send + Sync + Debug {
    /// Which sibling.
    fn kind(&self) -> TransportKind;
    /// What its links take.
    fn capabilities(&self) -> Capabilities;
    /// Connects to `peer`, or says why this transport cannot serve it. May block for the connect timeout.
    ///
    /// # Errors
    /// [`TransferError::Unavailable`] when either side does not offer this transport (the next one is tried);
    /// [`TransferError::Unreachable`] and [`TransferError::HandshakeRefused`] when it should have worked.
    fn connect(&self, peer: Arc<Peer>) -> Result<Arc<dyn Link>, TransferError>;
    /// Called after a region was registered.
    ///
    /// # Errors
    /// Whatever makes this region unusable; the engine takes the registration back.
    fn register(&self, _region: &Arc<LocalRegion>) -> Result<(), TransferError> {
        Ok(())
    }
    /// Called when a region was revoked and is to be left alone: drops what this transport published of it and ends the
    /// accesses of remote peers. Returns who still holds it after `drain`.
    ///
    /// # Errors
    /// Text naming the holder.
    fn evict(&self, _region: &Arc<LocalRegion>, _drain: Duration) -> Result<(), String> {
        Ok(())
    }
    /// Gate, drain (at most `drain`), teardown. Every open token is settled when this returns.
    fn shutdown(&self, drain: Duration);
}

/// How a waiting caller drives a link.
#[derive(Clone, Copy, Debug)]
pub struct Drive {
    /// When to give up.
    pub deadline: Instant,
    /// How long to poll before sleeping.
    pub spin: Duration,
}

/// The path to one peer over one transport.
///
/// Rules (the conformance suite checks them over every sibling):
/// * every token handed to `submit` is settled exactly once, also when the peer dies;
/// * a settled slice's local bytes are not touched again, and a completed write is visible in the target's memory;
/// * `submit` takes from the front and leaves what it cannot take now (back-pressure); it never blocks on the network;
/// * after `cancel` returned, no slice of that batch is open on this link;
/// * an out-of-bounds target range fails its slice with [`TransferError::OutOfBounds`] and harms no other slice.
pub trait Link: Send + Sync + Debug {
    /// Which sibling.
    fn kind(&self) -> TransportKind;
    /// Whether slices to `target` may be handed to this link; the others go over the next transport that reaches the peer.
    /// Does not block; the answer may change as the link learns.
    fn accepts(&self, _target: ByteRange) -> bool {
        true
    }
    /// Takes slices from the front of `slices`.
    fn submit(&self, slices: &mut Vec<Slice>);
    /// Drives progress from the calling thread until `batch` is settled or the deadline passed; whether it is settled.
    /// A link without need of driving just waits.
    fn drive(&self, batch: &Arc<BatchCore>, how: Drive) -> bool;
    /// One non-blocking step of progress, for callers that poll a status.
    fn poll(&self) {}
    /// Makes sure that progress is made with no caller driving (a future or an eventfd is waiting).
    fn detach(&self) {}
    /// Ends every open slice of `batch` with the error that `error` makes for its target range. Slices of other batches
    /// go on, over a new connection if need be.
    fn cancel(&self, batch: &Arc<BatchCore>, error: &dyn Fn(ByteRange) -> TransferError);
    /// Slices in the hands of this link.
    fn open_slices(&self) -> usize;
    /// Why the link cannot be used any more; `None` while it can.
    fn failure(&self) -> Option<TransferError>;
    /// One line for status: streams, retries.
    fn describe(&self) -> String;
    /// Ends every open slice and closes.
    fn close(&self);
}
