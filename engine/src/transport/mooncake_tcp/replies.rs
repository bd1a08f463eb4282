//! What a connection owes its initiator: status frames and the payload of reads, in order.
//!
//! Invariants:
//! * the payload of a reply stays pinned until its last byte is in the socket;
//! * replies leave in the order they were pushed.

use std::{collections::VecDeque, io, os::fd::BorrowedFd, sync::Arc};

use tidewire_core::mooncake::data::{DataStatus, STATUS_BYTES};

use crate::memory::{
    LocalRegion, RegionPin,
    io::{Cursor, Parts},
};

/// Bytes handed to one system call.
const CALL_BYTES: u64 = 1 << 20;
/// System calls before other connections have their turn.
const ROUNDS: usize = 8;

#[derive(Debug)]
struct Reply {
    status: Option<[u8; STATUS_BYTES]>,
    status_sent: usize,
    body: Cursor,
    /// Of a read.
    pin: Option<RegionPin>,
}

impl Reply {
    fn status_left(&self) -> &[u8] {
        self.status.as_ref().and_then(|status| status.get(self.status_sent..)).unwrap_or_default()
    }
}

/// Replies that wait.
#[derive(Debug, Default)]
pub(super) struct Replies {
    queue: VecDeque<Reply>,
    reads: usize,
}

impl Replies {
    pub(super) fn push_status(&mut self, status: DataStatus) {
        let status = Some(status.encode());
        self.queue.push_back(Reply { status, status_sent: 0, body: Cursor::default(), pin: None });
    }

    /// Owes the bytes of `body`, which `pin` holds.
    pub(super) fn push_read(&mut self, status_wanted: bool, body: Cursor, pin: RegionPin) {
        let status = status_wanted.then(|| DataStatus::Ok.encode());
        self.reads += 1;
        self.queue.push_back(Reply { status, status_sent: 0, body, pin: Some(pin) });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether payload waits.
    pub(super) fn reads_waiting(&self) -> bool {
        self.reads > 0
    }

    /// Whether payload of `region` waits.
    pub(super) fn hold(&self, region: &Arc<LocalRegion>) -> bool {
        self.queue.iter().filter_map(|reply| reply.pin.as_ref()).any(|pin| Arc::ptr_eq(pin.region(), region))
    }

    /// Sends until the socket is full or nothing is left; whether bytes moved.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        let mut moved = false;
        for _ in 0..ROUNDS {
            let mut parts = Parts::new();
            for reply in &self.queue {
                parts.push_bytes(reply.status_left());
                let room = CALL_BYTES.saturating_sub(parts.bytes());
                let whole = reply.body.left() == 0 || parts.push_cursor(&reply.body, room);
                if !whole || parts.is_full() || parts.bytes() >= CALL_BYTES {
                    break;
                }
            }
            let offered = parts.bytes();
            if offered == 0 {
                break;
            }
            match parts.send(socket) {
                Ok(count) => {
                    moved = true;
                    self.note_sent(count);
                    if (count as u64) < offered {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(moved)
    }

    fn note_sent(&mut self, mut count: usize) {
        while let Some(reply) = self.queue.front_mut() {
            let status = count.min(reply.status_left().len());
            reply.status_sent += status;
            count -= status;
            let body = reply.body.left().min(count as u64);
            reply.body.skip(body);
            count -= body as usize;
            if !reply.status_left().is_empty() || reply.body.left() != 0 {
                return;
            }
            self.reads -= usize::from(reply.pin.is_some());
            self.queue.pop_front();
        }
    }
}
