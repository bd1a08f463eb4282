//! Errors of transfers, and what a caller may do about each.
//!
//! Every variant names what is known of the thing that went wrong: segment, peer and target range for an operation, the
//! address for a registration. Code decides on [`TransferError::class`], never on text.

use crate::{id::SegmentId, range::ByteRange};

/// What a caller may do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorClass {
    /// The request itself is wrong; repeating it changes nothing.
    InvalidArgument,
    /// A limit is reached; try again later.
    Busy,
    /// The peer is gone or does not answer; the segment has to be opened again.
    PeerDown,
    /// One path to the peer is gone; another may work.
    RailDown,
    /// The deadline passed.
    TimedOut,
    /// The caller or a shutdown ended it.
    Cancelled,
    /// Bytes did not survive the way.
    Corrupt,
    /// The peer refused: token, version, range.
    Refused,
    /// The metadata store did not answer or does not know.
    Metadata,
    /// A library, device or permission is missing on this host.
    Unavailable,
    /// A defect of this library.
    Internal,
}

/// Error of a transfer, a registration or a segment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// Local memory of a request is in no registered buffer.
    #[error("source {range} is not inside one registered buffer")]
    SourceNotRegistered {
        /// The local range.
        range: ByteRange,
    },
    /// A request, or a registration, of no bytes.
    #[error("zero length at address {addr:#x}")]
    ZeroLength {
        /// Where.
        addr: u64,
    },
    /// `addr + len` leaves the address space.
    #[error("range of {len} bytes at {addr:#x} overflows the address space")]
    RangeOverflow {
        /// Start.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A registration overlaps another.
    #[error("buffer {range} overlaps the registered buffer {existing}")]
    Overlap {
        /// The new range.
        range: ByteRange,
        /// The range that was there.
        existing: ByteRange,
    },
    /// Unregister of an address where no buffer starts.
    #[error("no registered buffer starts at {addr:#x}")]
    NotRegistered {
        /// The address given.
        addr: u64,
    },
    /// Operations still hold the buffer after the drain deadline and could not be fenced.
    #[error("buffer {range} is still in use by {holder} after {waited_ms} ms")]
    StillInUse {
        /// The buffer.
        range: ByteRange,
        /// Who holds it.
        holder: String,
        /// How long was waited.
        waited_ms: u64,
    },
    /// The target refused the range: not inside one of its registered buffers.
    #[error("segment {segment} of peer {peer} refused {range}: not inside one registered buffer")]
    OutOfBounds {
        /// Segment name.
        segment: String,
        /// Peer address.
        peer: String,
        /// Target range.
        range: ByteRange,
    },
    /// No open segment has this id.
    #[error("segment id {segment} is not open")]
    UnknownSegment {
        /// The id given.
        segment: SegmentId,
    },
    /// Discovery does not know the name.
    #[error("segment {segment} not found through {store}: {reason}")]
    SegmentNotFound {
        /// Segment name.
        segment: String,
        /// Metadata store, with its address.
        store: String,
        /// What the store said.
        reason: String,
    },
    /// The peer could not be reached.
    #[error("peer {peer} of segment {segment} is unreachable over {transport}: {reason}")]
    Unreachable {
        /// Segment name.
        segment: String,
        /// Peer address.
        peer: String,
        /// Transport name.
        transport: &'static str,
        /// Text of the last failure.
        reason: String,
    },
    /// The connection ended with the operation open.
    #[error("peer {peer} of segment {segment} went down during {range}: {reason}")]
    PeerDown {
        /// Segment name.
        segment: String,
        /// Peer address.
        peer: String,
        /// Target range of the operation.
        range: ByteRange,
        /// Text of the failure.
        reason: String,
    },
    /// The peer holds the connection but says nothing.
    #[error("peer {peer} of segment {segment} did not answer for {silent_ms} ms during {range}")]
    PeerSilent {
        /// Segment name.
        segment: String,
        /// Peer address.
        peer: String,
        /// Target range of the operation.
        range: ByteRange,
        /// Silence in milliseconds.
        silent_ms: u64,
    },
    /// The deadline of the batch passed.
    #[error("deadline of {timeout_ms} ms passed during {range} of segment {segment} of peer {peer}")]
    TimedOut {
        /// Segment name.
        segment: String,
        /// Peer address.
        peer: String,
        /// Target range of the operation.
        range: ByteRange,
        /// The deadline.
        timeout_ms: u64,
    },
    /// Cancelled by the caller, or dropped by a shutdown.
    #[error("cancelled")]
    Cancelled,
    /// The peer refused the handshake.
    #[error("peer {peer} of segment {segment} refused the connection: {reason}")]
    HandshakeRefused {
        /// Segment name.
        segment: String,
        /// Peer address.
        peer: String,
        /// Reason, in words.
        reason: RefuseReason,
    },
    /// Checksum of the bytes differs.
    #[error("checksum mismatch in {range} of segment {segment} of peer {peer}")]
    ChecksumMismatch {
        /// Segment name.
        segment: String,
        /// Peer address.
        peer: String,
        /// Target range.
        range: ByteRange,
    },
    /// Bytes that are not the protocol.
    #[error("peer {peer} broke the protocol: {reason}")]
    Protocol {
        /// Peer address.
        peer: String,
        /// What was wrong.
        reason: String,
    },
    /// No transport reaches the peer.
    #[error("no transport reaches segment {segment}: {reasons}")]
    NoTransport {
        /// Segment name.
        segment: String,
        /// One reason per transport.
        reasons: String,
    },
    /// More entries than the batch was made for.
    #[error("batch of capacity {capacity} cannot take {requested} more entries ({used} used)")]
    BatchFull {
        /// Capacity given at allocation.
        capacity: usize,
        /// Entries in use.
        used: usize,
        /// Entries asked for.
        requested: usize,
    },
    /// No batch has this id (freed, or never given out).
    #[error("batch {batch:#x} does not exist")]
    UnknownBatch {
        /// Raw id.
        batch: u64,
    },
    /// Too much is queued for a peer already.
    #[error("peer {peer} of segment {segment} has {queued} slices queued, limit {limit}")]
    QueueFull {
        /// Segment name.
        segment: String,
        /// Peer address.
        peer: String,
        /// Slices queued.
        queued: usize,
        /// The limit.
        limit: usize,
    },
    /// The batch itself was done, its notification was not delivered.
    #[error("notification to segment {segment} was not delivered: {reason}")]
    NotifyFailed {
        /// Segment name.
        segment: String,
        /// Text of the failure.
        reason: String,
    },
    /// The metadata store failed.
    #[error("metadata store {store}: {reason}")]
    Metadata {
        /// Store, with its address.
        store: String,
        /// Text of the failure.
        reason: String,
    },
    /// Something this host lacks.
    #[error("{what} is unavailable: {reason}")]
    Unavailable {
        /// Library, device or permission.
        what: String,
        /// Why.
        reason: String,
    },
    /// A setting that cannot be used.
    #[error("setting {name}: {reason}")]
    Setting {
        /// Name of the setting.
        name: String,
        /// Why.
        reason: String,
    },
    /// The operating system refused a call.
    #[error("{call} failed: {reason} (errno {errno})")]
    Os {
        /// The call.
        call: &'static str,
        /// errno, 0 if none.
        errno: i32,
        /// Its text.
        reason: String,
    },
    /// The engine is shutting down.
    #[error("engine is shut down")]
    ShutDown,
    /// A broken invariant of this library.
    #[error("internal error: {reason}")]
    Internal {
        /// Which.
        reason: &'static str,
    },
}

impl TransferError {
    /// What a caller may do about it.
    pub fn class(&self) -> ErrorClass {
        use TransferError as E;
        match self {
            E::SourceNotRegistered { .. }
            | E::ZeroLength { .. }
            | E::RangeOverflow { .. }
            | E::Overlap { .. }
            | E::NotRegistered { .. }
            | E::UnknownSegment { .. }
            | E::UnknownBatch { .. }
            | E::Setting { .. } => ErrorClass::InvalidArgument,
            E::BatchFull { .. } | E::QueueFull { .. } | E::StillInUse { .. } => ErrorClass::Busy,
            E::OutOfBounds { .. } | E::HandshakeRefused { .. } => ErrorClass::Refused,
            E::SegmentNotFound { .. } | E::Metadata { .. } => ErrorClass::Metadata,
            E::Unreachable { .. } | E::PeerDown { .. } | E::PeerSilent { .. } | E::Protocol { .. } => {
                ErrorClass::PeerDown
            }
            E::TimedOut { .. } => ErrorClass::TimedOut,
            E::Cancelled | E::ShutDown => ErrorClass::Cancelled,
            E::ChecksumMismatch { .. } => ErrorClass::Corrupt,
            E::NoTransport { .. } | E::NotifyFailed { .. } => ErrorClass::RailDown,
            E::Unavailable { .. } | E::Os { .. } => ErrorClass::Unavailable,
            E::Internal { .. } => ErrorClass::Internal,
        }
    }

    /// Wraps an operating-system error with the call that gave it.
    pub fn os(call: &'static str, source: &std::io::Error) -> Self {
        TransferError::Os { call, errno: source.raw_os_error().unwrap_or(0), reason: source.to_string() }
    }
}

/// Why a target refused a connection. The numbers are on the wire of the native protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RefuseReason {
    /// No common protocol version.
    Version,
    /// The access token is not the segment's.
    Token,
    /// The segment was restarted since the descriptor was read.
    Generation,
    /// The target has its limit of connections.
    Limit,
    /// The target is shutting down.
    ShuttingDown,
    /// A code this version does not know.
    Unknown(u16),
}

impl RefuseReason {
    /// Wire code.
    pub fn code(self) -> u16 {
        match self {
            RefuseReason::Version => 1,
            RefuseReason::Token => 2,
            RefuseReason::Generation => 3,
            RefuseReason::Limit => 4,
            RefuseReason::ShuttingDown => 5,
            RefuseReason::Unknown(code) => code,
        }
    }

    /// From the wire code.
    pub fn from_code(code: u16) -> Self {
        match code {
            1 => RefuseReason::Version,
            2 => RefuseReason::Token,
            3 => RefuseReason::Generation,
            4 => RefuseReason::Limit,
            5 => RefuseReason::ShuttingDown,
            other => RefuseReason::Unknown(other),
        }
    }
}

impl std::fmt::Display for RefuseReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RefuseReason::Version => f.write_str("no common protocol version"),
            RefuseReason::Token => f.write_str("wrong access token"),
            RefuseReason::Generation => f.write_str("segment was restarted (generation differs)"),
            RefuseReason::Limit => f.write_str("connection limit reached"),
            RefuseReason::ShuttingDown => f.write_str("target is shutting down"),
            RefuseReason::Unknown(code) => write!(f, "unknown reason {code}"),
        }
    }
}
