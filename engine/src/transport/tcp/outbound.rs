//! Sending side of a connection: frames in order, their payload straight from memory.
//!
//! Invariants:
//! * a frame's local memory is pinned (by its slices' batch, or by `pins`) until its last byte is in the socket;
//! * frames leave in the order they were pushed.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, OwnedFd},
};

use tidewire_core::native::frame::{FrameHeader, HEADER_LEN};

use crate::memory::{
    RegionPin,
    io::{Cursor, Parts},
};

/// Most bytes handed to one system call.
const SEND_BYTES: u64 = 1 << 20;

/// Frames kept for reuse.
const SPARE_FRAMES: usize = 16;

/// One frame on its way out.
#[derive(Debug, Default)]
pub(super) struct OutFrame {
    /// Header and table.
    pub(super) head: Vec<u8>,
    head_sent: usize,
    /// Payload.
    pub(super) body: Cursor,
    /// Whether a checksum follows.
    pub(super) checksum: bool,
    /// Checksum bytes, computed when the frame comes up.
    trailer: Option<[u8; 4]>,
    trailer_sent: usize,
    /// What keeps the payload alive on the target's side.
    pub(super) pins: Vec<RegionPin>,
}

impl OutFrame {
    fn clear(&mut self) {
        self.head.clear();
        self.body.clear();
        self.pins.clear();
        (self.head_sent, self.checksum, self.trailer, self.trailer_sent) = (0, false, None, 0);
    }

    fn is_sent(&self) -> bool {
        self.head_sent == self.head.len()
            && self.body.left() == 0
            && (!self.checksum || self.trailer.is_some() && self.trailer_sent == 4)
    }

    fn advance(&mut self, mut count: usize) -> usize {
        let head = count.min(self.head.len() - self.head_sent);
        self.head_sent += head;
        count -= head;
        let body = self.body.left().min(count as u64);
        self.body.skip(body);
        count -= body as usize;
        if self.body.left() == 0 && self.trailer.is_some() {
            let trailer = count.min(4 - self.trailer_sent);
            self.trailer_sent += trailer;
            count -= trailer;
        }
        count
    }
}

/// Frames to send.
#[derive(Debug, Default)]
pub(super) struct Outbound {
    frames: VecDeque<OutFrame>,
    spare: Vec<OutFrame>,
}

impl Outbound {
    /// An empty frame, reused where possible.
    pub(super) fn frame(&mut self) -> OutFrame {
        self.spare.pop().unwrap_or_default()
    }

    /// Appends a frame.
    pub(super) fn push(&mut self, frame: OutFrame) {
        self.frames.push_back(frame);
    }

    /// Appends a frame without table and payload.
    pub(super) fn push_bare(&mut self, header: &FrameHeader) {
        let mut frame = self.frame();
        frame.head.extend_from_slice(&header.encode());
        debug_assert_eq!(frame.head.len(), HEADER_LEN);
        self.push(frame);
    }

    /// Appends raw bytes (a hello).
    pub(super) fn push_raw(&mut self, bytes: &[u8]) {
        let mut frame = self.frame();
        frame.head.extend_from_slice(bytes);
        self.push(frame);
    }

    /// Whether everything is in the socket.
    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Frames not wholly in the socket.
    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether a frame holds `pred` pins.
    pub(super) fn holds(&self, pred: impl Fn(&RegionPin) -> bool) -> bool {
        self.frames.iter().any(|f| f.pins.iter().any(&pred))
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        self.frames.clear();
    }

    /// Sends until all is in the socket or the socket is full; whether all is.
    ///
    /// # Errors
    /// Of the socket.
    pub(super) fn flush(&mut self, socket: &OwnedFd) -> io::Result<bool> {
        while let Some(first) = self.frames.front_mut() {
            seal(first);
            let (asked, result) = {
                let mut parts = Parts::new();
                for frame in &self.frames {
                    if parts.is_full() || parts.bytes() >= SEND_BYTES || (frame.checksum && frame.trailer.is_none()) {
                        break;
                    }
                    parts.push_bytes(&frame.head[frame.head_sent..]);
                    let whole = parts.push_cursor(&frame.body, SEND_BYTES);
                    if !whole {
                        break;
                    }
                    if let Some(trailer) = &frame.trailer {
                        parts.push_bytes(&trailer[frame.trailer_sent..]);
                    }
                }
                (parts.bytes() as usize, parts.send(socket.as_fd()))
            };
            let sent = match result {
                Ok(sent) => sent,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            };
            self.advance(sent);
            if sent < asked {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn advance(&mut self, mut sent: usize) {
        while let Some(frame) = self.frames.front_mut() {
            sent = frame.advance(sent);
            if !frame.is_sent() {
                return;
            }
            if let Some(mut done) = self.frames.pop_front()
                && self.spare.len() < SPARE_FRAMES
            {
                done.clear();
                self.spare.push(done);
            }
        }
    }
}

/// Computes the checksum of the frame that comes up next; its bytes are then in the cache for the send.
fn seal(frame: &mut OutFrame) {
    if frame.checksum && frame.trailer.is_none() {
        frame.trailer = Some(frame.body.crc().to_le_bytes());
    }
}
