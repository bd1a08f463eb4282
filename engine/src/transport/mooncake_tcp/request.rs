//! A slice on its way to a target.
//!
//! Invariants:
//! * a request is settled exactly once, by [`Request::complete`], [`Request::fail`] or (as cancelled) by its drop;
//! * it counts as open until just before that.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tidewire_core::{
    ByteRange, Opcode, TransferError,
    mooncake::data::{DataHeader, HEADER_BYTES},
};

use crate::{
    batch::SliceToken,
    memory::io::{Cursor, Span},
    transport::Slice,
};

/// Counts a request as open until dropped.
#[derive(Debug)]
pub(super) struct OpenGuard(Arc<AtomicUsize>);

impl OpenGuard {
    pub(super) fn new(open: &Arc<AtomicUsize>) -> Self {
        // Relaxed: a count for status and limits; it orders nothing.
        open.fetch_add(1, Ordering::Relaxed);
        OpenGuard(Arc::clone(open))
    }
}

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A slice on its way.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) opcode: Opcode,
    pub(super) target: ByteRange,
    /// Connections it was lost on.
    pub(super) losses: u32,
    // Declared before the token, so that it is dropped first: who sees the batch settled sees the count.
    open: OpenGuard,
    pub(super) token: SliceToken,
    local: ByteRange,
    pub(super) header: [u8; HEADER_BYTES],
    pub(super) header_sent: usize,
    /// For a write what is left to send, for a read what is left to receive.
    pub(super) body: Cursor,
}

impl Request {
    /// Wraps a slice; `None` (with the token settled by drop) if its local range cannot exist.
    pub(super) fn new(slice: Slice, open: OpenGuard, status_wanted: bool) -> Option<Self> {
        let local = ByteRange::new(slice.local, slice.target.len())?;
        let header = DataHeader::new(slice.opcode, slice.target, status_wanted).encode();
        let (opcode, target, token) = (slice.opcode, slice.target, slice.token);
        let mut request =
            Request { opcode, target, losses: 0, open, token, local, header, header_sent: 0, body: Cursor::default() };
        request.rewind();
        Some(request)
    }

    /// Settles it: every byte is in place.
    pub(super) fn complete(self) {
        drop(self.open);
        self.token.complete();
    }

    /// Settles it as failed.
    pub(super) fn fail(self, error: TransferError) {
        drop(self.open);
        self.token.fail(error);
    }

    /// Makes it ready to be sent from the start.
    pub(super) fn rewind(&mut self) {
        self.header_sent = 0;
        self.body.clear();
        // The batch behind the token pins the region of `local` until the token is settled.
        self.body.push(Span::pinned(self.local));
    }
}
