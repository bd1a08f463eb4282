//! One connection from an initiator: headers are decoded, payload moves straight between the socket and registered memory.
//!
//! Requests are served in order. Reads that follow one another share a system call; a write waits until the reads before it
//! have left, so that they show the memory as it was. Small requests are received several at a time through the loop's
//! stage buffer (that payload is copied once); from 64 KiB on only headers pass through it.
//!
//! Invariants:
//! * memory is touched only under a [`RegionPin`] of one registered buffer that holds the whole range;
//! * a refused request ends the connection: version 2 is told so, version 1 is not;
//! * at most [`MAX_REPLIES`] replies wait, and at most one stage of bytes that are not served yet.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::event::epoll::EventFlags;
use socket2::SockRef;
use tidewire_core::{
    Opcode,
    mooncake::data::{DataHeader, DataStatus, HEADER_BYTES},
};

use super::{replies::Replies, target::Counters};
use crate::memory::{
    LocalRegion, RegionPin, RegionTable,
    io::{Cursor, Parts, Span},
};

/// Bytes of the loop's stage buffer.
pub(super) const STAGE_BYTES: usize = 256 << 10;
/// From this request length on, payload is not received through the stage.
const LARGE_BYTES: u64 = 64 << 10;
/// Replies that wait on one connection.
const MAX_REPLIES: usize = 256;
/// Bytes handed to one system call.
const CALL_BYTES: u64 = 1 << 20;
/// System calls before other connections have their turn.
const ROUNDS: usize = 8;
/// How long a refused initiator may go on sending, and how much, before the connection is cut.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: u64 = 64 << 20;

/// What a connection works with.
pub(super) struct Server<'a> {
    pub(super) regions: &'a RegionTable,
    pub(super) stage: &'a mut [u8],
    pub(super) counters: &'a Counters,
    pub(super) now: Instant,
}

/// The connection is to be dropped.
#[derive(Debug)]
pub(super) struct Gone;

#[derive(Debug)]
struct Receiving {
    body: Cursor,
    status_wanted: bool,
    pin: RegionPin,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Inbound {
    socket: OwnedFd,
    /// Bytes received and not served: part of a header, or requests that have to wait.
    leftover: Vec<u8>,
    receiving: Option<Receiving>,
    replies: Replies,
    /// The next request has to wait for replies to leave.
    stalled: bool,
    /// A request was refused: nothing more is served.
    refused: bool,
    /// Refused in silence: closed with a reset, which a version 1 initiator can tell from the end of a write.
    silent: bool,
    /// Sending side closed after a refusal, since then; what still comes is thrown away, so much so far.
    lingering: Option<(Instant, u64)>,
    /// The initiator has closed its sending side.
    ended: bool,
    large: bool,
    /// Since when part of a header is there.
    header_since: Option<Instant>,
    /// What the poller watches.
    pub(super) interest: EventFlags,
    /// Last time bytes moved.
    pub(super) progress: Instant,
}

impl Inbound {
    pub(super) fn new(socket: OwnedFd, now: Instant) -> Self {
        Inbound {
            socket,
            leftover: Vec::new(),
            receiving: None,
            replies: Replies::default(),
            stalled: false,
            refused: false,
            silent: false,
            header_since: None,
            lingering: None,
            ended: false,
            large: false,
            interest: EventFlags::IN,
            progress: now,
        }
    }

    pub(super) fn socket(&self) -> impl AsFd + '_ {
        self.socket.as_fd()
    }

    /// Whether a request is under way, so that time counts against the initiator.
    pub(super) fn is_busy(&self) -> bool {
        self.receiving.is_some() || !self.replies.is_empty() || !self.leftover.is_empty() || self.refused
    }

    /// Whether the initiator took too long.
    pub(super) fn is_late(&self, now: Instant, progress_timeout: Duration) -> bool {
        let lingered = self.lingering.is_some_and(|(since, _)| now.saturating_duration_since(since) >= LINGER);
        let dripping = self.header_since.is_some_and(|since| now.saturating_duration_since(since) >= progress_timeout);
        lingered || dripping || self.is_busy() && now.saturating_duration_since(self.progress) >= progress_timeout
    }

    /// Whether it holds a pin of `region`.
    pub(super) fn holds(&self, region: &Arc<LocalRegion>) -> bool {
        let receiving = self.receiving.as_ref().is_some_and(|r| Arc::ptr_eq(r.pin.region(), region));
        receiving || self.replies.hold(region)
    }

    /// Whether the initiator reset the connection.
    pub(super) fn was_reset(&self) -> bool {
        SockRef::from(&self.socket).take_error().map_or(true, |error| error.is_some())
    }

    /// Closes at once, whatever is under way.
    pub(super) fn reset(self) {
        // Failing to set the option only turns the reset into an ordinary close.
        let _ = SockRef::from(&self.socket).set_linger(Some(Duration::ZERO));
    }

    /// Closes as is right for what happened on the connection.
    pub(super) fn close(self) {
        if self.silent {
            self.reset();
        }
    }

    /// What the poller should watch now.
    pub(super) fn wanted(&self) -> EventFlags {
        let mut wanted = EventFlags::empty();
        if !self.ended && (!self.stalled && !self.refused || self.lingering.is_some()) {
            wanted |= EventFlags::IN;
        }
        // Besides replies, what the last turn had no time for: a writable socket brings the next one.
        let more = self.stalled || self.ended || self.refused && self.lingering.is_none();
        if more || !self.replies.is_empty() {
            wanted |= EventFlags::OUT;
        }
        wanted
    }

    /// Serves what can be served now.
    pub(super) fn ready(&mut self, server: &mut Server<'_>) -> Result<(), Gone> {
        for _ in 0..ROUNDS {
            if self.lingering.is_some() {
                return self.discard(server);
            }
            self.serve_leftover(server);
            self.flush(server.now)?;
            if self.stalled && self.replies.is_empty() {
                continue;
            }
            if self.silent && self.replies.is_empty() {
                return Err(Gone);
            }
            if self.refused && self.replies.is_empty() {
                self.half_close(server.now)?;
                continue;
            }
            if self.ended {
                // Replies that are still on their way go out first; a request cut short is dropped.
                return if self.replies.is_empty() { Err(Gone) } else { Ok(()) };
            }
            if self.stalled || self.refused || !self.receive(server)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// One receive; whether there may be more to do.
    fn receive(&mut self, server: &mut Server<'_>) -> Result<bool, Gone> {
        let staged = if self.large { HEADER_BYTES } else { STAGE_BYTES };
        let room = staged.saturating_sub(self.leftover.len()).min(server.stage.len());
        let stage = server.stage.get_mut(..room).unwrap_or_default();
        let mut parts = Parts::new();
        let whole = self.receiving.as_ref().is_none_or(|r| parts.push_cursor(&r.body, CALL_BYTES));
        let direct = parts.bytes();
        if whole {
            parts.push_room(stage);
        }
        let asked = parts.bytes();
        let count = match parts.receive(self.socket.as_fd()) {
            Ok(0) => {
                self.ended = true;
                return Ok(true);
            }
            Ok(count) => count as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(_) => return Err(Gone),
        };
        self.progress = server.now;
        if let Some(receiving) = &mut self.receiving {
            receiving.body.skip(count.min(direct));
        }
        self.finish_receiving(server.counters);
        let staged = count.saturating_sub(direct) as usize;
        let staged = server.stage.get(..staged).unwrap_or_default();
        if self.leftover.is_empty() {
            let served = self.serve(staged, server.regions, server.counters);
            self.leftover.extend_from_slice(staged.get(served..).unwrap_or_default());
        } else {
            self.leftover.extend_from_slice(staged);
            self.serve_leftover(server);
        }
        let part = !self.leftover.is_empty() && !self.stalled;
        self.header_since = if part { self.header_since.or(Some(server.now)) } else { None };
        self.flush(server.now)?;
        Ok(count == asked || self.stalled || self.refused)
    }

    fn serve_leftover(&mut self, server: &Server<'_>) {
        let mut bytes = std::mem::take(&mut self.leftover);
        let served = self.serve(&bytes, server.regions, server.counters);
        bytes.drain(..served);
        self.leftover = bytes;
    }

    /// Serves `bytes` until they run out, a request has to wait, or one is refused (then all count as served). How many
    /// were served.
    fn serve(&mut self, bytes: &[u8], regions: &RegionTable, counters: &Counters) -> usize {
        let mut rest = bytes;
        self.stalled = false;
        while !self.refused && !self.stalled {
            if let Some(receiving) = &mut self.receiving {
                let (taken, _) = receiving.body.place(rest, None);
                rest = rest.get(taken..).unwrap_or_default();
                self.finish_receiving(counters);
                if self.receiving.is_some() {
                    break;
                }
            }
            let Some((header, behind)) = rest.split_first_chunk::<HEADER_BYTES>() else { break };
            if self.start_request(header, regions, counters) {
                rest = behind;
            }
        }
        if self.refused { bytes.len() } else { bytes.len() - rest.len() }
    }

    /// Starts the request of a header; false if it has to wait.
    fn start_request(&mut self, header: &[u8; HEADER_BYTES], regions: &RegionTable, counters: &Counters) -> bool {
        let Ok(header) = DataHeader::decode(header) else {
            self.refuse(false, counters);
            return true;
        };
        let after_reads = header.opcode == Opcode::Write && self.replies.reads_waiting();
        self.stalled = after_reads || self.replies.len() >= MAX_REPLIES;
        if self.stalled {
            return false;
        }
        let range = header.range();
        let Some((range, pin)) = range.and_then(|range| Some((range, regions.find(range)?.pin()?))) else {
            self.refuse(header.status_wanted, counters);
            return true;
        };
        let mut body = Cursor::default();
        body.push(Span::pinned(range));
        self.large = range.len() >= LARGE_BYTES;
        match header.opcode {
            Opcode::Write => {
                self.receiving = Some(Receiving { body, status_wanted: header.status_wanted, pin });
            }
            Opcode::Read => {
                counters.served();
                self.replies.push_read(header.status_wanted, body, pin);
            }
        }
        true
    }

    fn refuse(&mut self, status_wanted: bool, counters: &Counters) {
        counters.refused();
        self.refused = true;
        self.silent = !status_wanted;
        if status_wanted {
            self.replies.push_status(DataStatus::Rejected);
        }
    }

    /// Ends the write whose last byte is in place.
    fn finish_receiving(&mut self, counters: &Counters) {
        let done = self.receiving.take_if(|receiving| receiving.body.left() == 0);
        if let Some(Receiving { status_wanted, .. }) = done {
            counters.served();
            if status_wanted {
                self.replies.push_status(DataStatus::Ok);
            }
        }
    }

    /// Sends replies until the socket is full or none is left.
    fn flush(&mut self, now: Instant) -> Result<(), Gone> {
        if self.replies.send(self.socket.as_fd()).map_err(|_| Gone)? {
            self.progress = now;
        }
        Ok(())
    }

    /// After a refusal: version 2 is given time to read the status, so a reset must not overtake it.
    fn half_close(&mut self, now: Instant) -> Result<(), Gone> {
        rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write).map_err(|_| Gone)?;
        self.lingering = Some((now, 0));
        Ok(())
    }

    fn discard(&mut self, server: &mut Server<'_>) -> Result<(), Gone> {
        let Some((since, mut thrown)) = self.lingering else { return Ok(()) };
        for _ in 0..ROUNDS {
            let mut parts = Parts::new();
            parts.push_room(server.stage);
            match parts.receive(self.socket.as_fd()) {
                Ok(0) => return Err(Gone),
                Ok(count) => thrown += count as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Err(Gone),
            }
            if thrown > LINGER_BYTES {
                return Err(Gone);
            }
        }
        self.lingering = Some((since, thrown));
        Ok(())
    }
}
