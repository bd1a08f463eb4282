//! Receiving side of a connection: a small stage for headers and tables, and the payload straight into memory.
//!
//! Headers and tables are read through the stage. While a payload is received, the stage is the last part of the same
//! system call, so that the next header comes along for free; only bytes that arrive in the stage are ever copied.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use tidewire_core::native::frame::CHECKSUM_LEN;

use crate::memory::io::{Cursor, Parts};

/// Size of the stage: the largest table, a header, and room for a small payload.
const STAGE_LEN: usize = 16 << 10;

/// How much of the stage to offer behind a bulk payload: the next header and a short table.
const BULK_TAIL: usize = 1 << 10;

/// Payloads longer than this are bulk.
const BULK_BYTES: u64 = 64 << 10;

/// Most payload bytes taken by one system call; what a core's cache holds, so that a checksum reads warm bytes.
const RECEIVE_BYTES: u64 = 1 << 20;

/// Bytes thrown away per system call while a refused payload is drained.
const SINK_LEN: usize = 64 << 10;

/// What one step of receiving found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Go on with what is there.
    More,
    /// The socket has nothing more now.
    Drained,
}

/// The stage.
pub(super) struct Inbound {
    stage: Box<[u8]>,
    head: usize,
    tail: usize,
    /// The last call got less than it asked for: asking again before the next readiness is a wasted call.
    drained: bool,
    /// Bytes received since the connection began.
    received: u64,
}

impl Inbound {
    pub(super) fn new() -> Self {
        Inbound { stage: vec![0; STAGE_LEN].into_boxed_slice(), head: 0, tail: 0, drained: false, received: 0 }
    }

    /// Bytes received since the connection began.
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// Whether received bytes wait in the stage.
    pub(super) fn has_staged(&self) -> bool {
        self.head < self.tail
    }

    /// What asking again is worth: nothing, if the last call got less than it asked for.
    pub(super) fn idle_step(&self) -> Step {
        if self.drained { Step::Drained } else { Step::More }
    }

    /// Forgets that the socket had nothing: it became readable.
    pub(super) fn readable(&mut self) {
        self.drained = false;
    }

    /// The next `count` bytes, if they are staged; they stay until [`Inbound::consume`].
    pub(super) fn peek(&self, count: usize) -> Option<&[u8]> {
        (self.tail - self.head >= count).then(|| self.stage.get(self.head..self.head + count)).flatten()
    }

    /// Drops `count` staged bytes.
    pub(super) fn consume(&mut self, count: usize) {
        self.head = (self.head + count).min(self.tail);
        if self.head == self.tail {
            (self.head, self.tail) = (0, 0);
        }
    }

    /// Receives into the stage.
    ///
    /// # Errors
    /// Of the socket; [`io::ErrorKind::UnexpectedEof`] at the end of the stream.
    pub(super) fn fill(&mut self, socket: &OwnedFd) -> io::Result<Step> {
        if self.drained {
            return Ok(Step::Drained);
        }
        self.compact();
        let (asked, result) = {
            let room = &mut self.stage[self.tail..];
            let asked = room.len();
            let mut parts = Parts::new();
            parts.push_room(room);
            (asked, parts.receive(socket.as_fd()))
        };
        let Some(got) = self.account(result, asked)? else { return Ok(Step::Drained) };
        self.tail += got;
        Ok(Step::More)
    }

    fn compact(&mut self) {
        if self.head > 0 {
            self.stage.copy_within(self.head..self.tail, 0);
            self.tail -= self.head;
            self.head = 0;
        }
    }

    fn account(&mut self, result: io::Result<usize>, asked: usize) -> io::Result<Option<usize>> {
        match result {
            Ok(0) if asked > 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => {
                self.drained = got < asked;
                self.received += got as u64;
                Ok(Some(got))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.drained = true;
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }
}

/// A payload on its way into memory.
#[derive(Debug, Default)]
pub(super) struct Payload {
    /// Where it goes.
    pub(super) target: Cursor,
    /// Bytes to throw away instead.
    pub(super) discard: u64,
    /// Whether a checksum follows.
    pub(super) checksum: bool,
    crc: u32,
    bulk: bool,
}

/// How a payload ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Not yet.
    Open(Step),
    /// All bytes are in place; whether they fit the checksum (true without one).
    Done(bool),
}

impl Payload {
    /// Prepares for the next payload; the caller then fills `target` or sets `discard`.
    pub(super) fn start(&mut self, checksum: bool, len: u64) {
        self.target.clear();
        (self.discard, self.checksum, self.crc, self.bulk) = (0, checksum, 0, len > BULK_BYTES);
    }

    /// Receives until the payload is whole or the socket has nothing more.
    ///
    /// # Errors
    /// Of the socket; [`io::ErrorKind::UnexpectedEof`] at the end of the stream.
    pub(super) fn receive(&mut self, inbound: &mut Inbound, socket: &OwnedFd) -> io::Result<Outcome> {
        if inbound.has_staged() {
            self.take_staged(inbound);
        }
        if self.target.left() > 0 {
            return self.receive_into_target(inbound, socket).map(Outcome::Open);
        }
        if self.discard > 0 {
            return self.receive_into_sink(inbound, socket).map(Outcome::Open);
        }
        if !self.checksum {
            return Ok(Outcome::Done(true));
        }
        let Some(bytes) = inbound.peek(CHECKSUM_LEN) else { return inbound.fill(socket).map(Outcome::Open) };
        let same = bytes.try_into().is_ok_and(|sent| u32::from_le_bytes(sent) == self.crc);
        inbound.consume(CHECKSUM_LEN);
        Ok(Outcome::Done(same))
    }

    fn take_staged(&mut self, inbound: &mut Inbound) {
        let staged = &inbound.stage[inbound.head..inbound.tail];
        let took = if self.target.left() > 0 {
            let (took, crc) = self.target.place(staged, self.checksum.then_some(self.crc));
            self.crc = crc.unwrap_or(0);
            took
        } else {
            let took = self.discard.min(staged.len() as u64) as usize;
            self.add_discarded(inbound.head, took, inbound);
            self.discard -= took as u64;
            took
        };
        inbound.consume(took);
    }

    fn add_discarded(&mut self, from: usize, count: usize, inbound: &Inbound) {
        if self.checksum {
            self.crc = crc32c::crc32c_append(self.crc, &inbound.stage[from..from + count]);
        }
    }

    fn receive_into_target(&mut self, inbound: &mut Inbound, socket: &OwnedFd) -> io::Result<Step> {
        if inbound.drained {
            return Ok(Step::Drained);
        }
        let left = self.target.left();
        let mut parts = Parts::new();
        let whole = parts.push_cursor(&self.target, RECEIVE_BYTES);
        let in_memory = parts.bytes();
        // The stage is empty here: `take_staged` stops only when the target is full or the stage is.
        if whole && in_memory == left {
            let room = if self.bulk { BULK_TAIL } else { STAGE_LEN };
            parts.push_room(&mut inbound.stage[..room]);
        }
        let asked = parts.bytes() as usize;
        let result = parts.receive(socket.as_fd());
        let Some(got) = inbound.account(result, asked)? else { return Ok(Step::Drained) };
        let placed = in_memory.min(got as u64);
        if self.checksum {
            self.crc = self.target.skip_with_crc(placed, self.crc);
        } else {
            self.target.skip(placed);
        }
        (inbound.head, inbound.tail) = (0, got - placed as usize);
        Ok(Step::More)
    }

    fn receive_into_sink(&mut self, inbound: &mut Inbound, socket: &OwnedFd) -> io::Result<Step> {
        if inbound.drained {
            return Ok(Step::Drained);
        }
        let mut sink = [0; SINK_LEN];
        let want = self.discard.min(SINK_LEN as u64) as usize;
        let result = {
            let mut parts = Parts::new();
            parts.push_room(&mut sink[..want]);
            parts.receive(socket.as_fd())
        };
        let Some(got) = inbound.account(result, want)? else { return Ok(Step::Drained) };
        if self.checksum {
            self.crc = crc32c::crc32c_append(self.crc, &sink[..got]);
        }
        self.discard -= got as u64;
        Ok(Step::More)
    }
}
