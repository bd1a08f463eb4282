//! One stream of a link: a connection, the frames sent on it, the answers expected.
//!
//! Pure bookkeeping around non-blocking system calls; [`link`](super::link) decides what to send and what a failure means.
//!
//! Invariants:
//! * answers come in the order of the requests, so the open frames are a queue;
//! * after the connection was taken out (`break_off`), nothing refers to the memory of its slices.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::event::epoll::EventFlags;
use tidewire_core::{
    ByteRange, Opcode,
    error::RefuseReason,
    native::{
        FEATURE_CHECKSUM,
        frame::{FrameError, FrameHeader, FrameKind, FrameStatus, HEADER_LEN, push_entry},
        hello::{HELLO_LEN, Hello, HelloError, Limits, Welcome},
    },
};

use super::{
    TcpOptions,
    inbound::{Inbound, Outcome, Payload, Step},
    outbound::Outbound,
    reactor::SourceKey,
    socket,
};
use crate::{memory::io::Span, transport::Slice};

/// From here on, incoming data is worth a sleep instead of polling.
const BULK_BYTES: u64 = 64 << 10;

/// Longest silence that counts between two looks: twice the time between ticks of an event loop.
const LONGEST_LOOK: Duration = Duration::from_millis(200);

/// How a frame ended, for the link to settle its slices.
#[derive(Debug)]
pub(super) enum Ended {
    /// All bytes are in place.
    Done(Vec<Slice>),
    /// The payload differs from its checksum.
    Corrupt(Vec<Slice>),
    /// The target refused the entry; nothing of the frame was done.
    Refused(Vec<Slice>, u32, FrameStatus),
}

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("{0}")]
    Hello(#[from] HelloError),
    #[error("{0}")]
    Refused(RefuseReason),
    #[error("the target said goodbye ({0:?})")]
    Goodbye(FrameStatus),
    #[error("answer {got} where {expected} was due")]
    Order { got: u64, expected: u64 },
    #[error("the target takes frames of {limit} bytes, too short for slices of {slice}")]
    Limit { limit: u32, slice: u32 },
    #[error("no connection within {0:?}")]
    ConnectTimeout(Duration),
}

/// A frame without its answer.
#[derive(Debug)]
struct OpenFrame {
    id: u64,
    opcode: Opcode,
    bytes: u64,
    slices: Vec<Slice>,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) socket: Arc<OwnedFd>,
    phase: Phase,
    inbound: Inbound,
    payload: Payload,
    outbound: Outbound,
    open: VecDeque<OpenFrame>,
    unanswered_bytes: u64,
    next_id: u64,
    limits: Limits,
    checksums: bool,
    opened: Instant,
    heard: Instant,
    /// When silence was added up last.
    looked: Instant,
    silent: Duration,
    pinged: bool,
    /// Slot in the event loop, once it was watched there.
    pub(super) key: Option<SourceKey>,
    /// What the loop watches it for.
    pub(super) interest: EventFlags,
    spare: Vec<Vec<Slice>>,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Welcome,
    Header,
    Payload,
}

impl std::fmt::Debug for Inbound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbound").field("received", &self.received()).finish_non_exhaustive()
    }
}

impl Conn {
    /// Starts a connection; the hello leaves as soon as it stands.
    pub(super) fn dial(address: SocketAddr, hello: &Hello, options: &TcpOptions) -> io::Result<Self> {
        let socket = socket::dial(address, options)?;
        let mut outbound = Outbound::default();
        outbound.push_raw(&hello.encode());
        let now = Instant::now();
        Ok(Conn {
            socket: Arc::new(socket),
            phase: Phase::Welcome,
            inbound: Inbound::new(),
            payload: Payload::default(),
            outbound,
            open: VecDeque::new(),
            unanswered_bytes: 0,
            next_id: 1,
            limits: Limits { entries: 0, frame_bytes: 0, open_frames: 0, heartbeat_ms: 0 },
            checksums: false,
            opened: now,
            heard: now,
            looked: now,
            silent: Duration::ZERO,
            pinged: false,
            key: None,
            interest: EventFlags::empty(),
            spare: Vec::new(),
        })
    }

    /// Whether the handshake is done.
    pub(super) fn is_ready(&self) -> bool {
        !matches!(self.phase, Phase::Welcome)
    }

    /// Whether something waits for the socket to take it.
    pub(super) fn wants_write(&self) -> bool {
        !self.outbound.is_empty()
    }

    /// Whether answers are due (or the handshake is).
    pub(super) fn expects(&self) -> bool {
        !self.open.is_empty() || !self.is_ready()
    }

    /// Whether so much is on its way in that asking the socket over and over only keeps it from receiving.
    pub(super) fn expects_bulk(&self) -> bool {
        let reads = self.open.iter().filter(|f| f.opcode == Opcode::Read);
        reads.map(|f| f.bytes).sum::<u64>() > BULK_BYTES
    }

    /// Payload bytes without an answer.
    pub(super) fn unanswered_bytes(&self) -> u64 {
        self.unanswered_bytes
    }

    /// Whether another frame fits the target's and our own window.
    pub(super) fn has_room(&self, window_bytes: u64) -> bool {
        self.is_ready() && self.open.len() < self.limits.open_frames as usize && self.unanswered_bytes < window_bytes
    }

    /// Takes slices of one direction from the front of `pending` into a frame; whether a frame was made.
    pub(super) fn load(&mut self, pending: &mut VecDeque<Slice>, frame_bytes: u32) -> bool {
        let Some(opcode) = pending.front().map(|s| s.opcode) else { return false };
        let limit = u64::from(frame_bytes);
        let mut slices = self.spare.pop().unwrap_or_default();
        let mut frame = self.outbound.frame();
        frame.head.resize(HEADER_LEN, 0);
        let mut bytes = 0;
        while let Some(next) = pending.front() {
            let fits = bytes == 0 || bytes + next.target.len() <= limit;
            if next.opcode != opcode || !fits || slices.len() >= self.limits.entries as usize {
                break;
            }
            let Some(slice) = pending.pop_front() else { break };
            push_entry(&mut frame.head, slice.target);
            if opcode == Opcode::Write
                && let Some(local) = ByteRange::new(slice.local, slice.target.len())
            {
                frame.body.push(Span::pinned(local));
            }
            bytes += slice.target.len();
            slices.push(slice);
        }
        let id = self.next_id;
        self.next_id += 1;
        let kind = if opcode == Opcode::Write { FrameKind::Write } else { FrameKind::Read };
        let header = FrameHeader {
            kind,
            checksum: self.checksums,
            entries_or_status: slices.len() as u16,
            id,
            payload_len: bytes,
            table_crc_or_entry: crc32c::crc32c(&frame.head[HEADER_LEN..]),
        };
        frame.head[..HEADER_LEN].copy_from_slice(&header.encode());
        frame.checksum = self.checksums && opcode == Opcode::Write;
        self.outbound.push(frame);
        if self.open.is_empty() {
            (self.heard, self.looked, self.silent) = (Instant::now(), Instant::now(), Duration::ZERO);
        }
        self.open.push_back(OpenFrame { id, opcode, bytes, slices });
        self.unanswered_bytes += bytes;
        true
    }

    /// Sends what the socket takes.
    pub(super) fn flush(&mut self) -> Result<(), Broken> {
        if !self.outbound.is_empty() {
            self.outbound.flush(&self.socket)?;
        }
        Ok(())
    }

    /// Receives what is there; answers go to `ended`. Whether anything was received.
    pub(super) fn receive(&mut self, frame_bytes: u32, ended: &mut Vec<Ended>) -> Result<bool, Broken> {
        let before = self.inbound.received();
        self.inbound.readable();
        loop {
            let step = match self.phase {
                Phase::Welcome => self.receive_welcome(frame_bytes)?,
                Phase::Header => self.receive_header(ended)?,
                Phase::Payload => match self.payload.receive(&mut self.inbound, &self.socket)? {
                    Outcome::Open(step) => step,
                    Outcome::Done(intact) => {
                        self.phase = Phase::Header;
                        if let Some(slices) = self.pop_open() {
                            ended.push(if intact { Ended::Done(slices) } else { Ended::Corrupt(slices) });
                        }
                        self.after_frame()
                    }
                },
            };
            if step == Step::Drained {
                break;
            }
        }
        let heard = self.inbound.received() != before;
        if heard {
            (self.heard, self.silent, self.pinged) = (Instant::now(), Duration::ZERO, false);
        }
        Ok(heard)
    }

    fn after_frame(&self) -> Step {
        if self.inbound.has_staged() { Step::More } else { self.inbound.idle_step() }
    }

    fn receive_welcome(&mut self, frame_bytes: u32) -> Result<Step, Broken> {
        let Some(bytes) = self.inbound.peek(HELLO_LEN) else { return Ok(self.inbound.fill(&self.socket)?) };
        let welcome = Welcome::decode(bytes)?;
        self.inbound.consume(HELLO_LEN);
        if let Some(reason) = welcome.refused {
            return Err(Broken::Refused(reason));
        }
        if welcome.limits.frame_bytes < frame_bytes {
            return Err(Broken::Limit { limit: welcome.limits.frame_bytes, slice: frame_bytes });
        }
        self.limits = welcome.limits;
        self.checksums = welcome.features & FEATURE_CHECKSUM != 0;
        self.phase = Phase::Header;
        Ok(self.after_frame())
    }

    fn receive_header(&mut self, ended: &mut Vec<Ended>) -> Result<Step, Broken> {
        let Some(bytes) = self.inbound.peek(HEADER_LEN) else { return Ok(self.inbound.fill(&self.socket)?) };
        let header = FrameHeader::decode(bytes)?;
        self.inbound.consume(HEADER_LEN);
        let expected = match header.kind {
            FrameKind::Alive => return Ok(self.after_frame()),
            FrameKind::Goodbye => return Err(Broken::Goodbye(header.status())),
            FrameKind::WriteDone => Opcode::Write,
            FrameKind::ReadData => Opcode::Read,
            kind => return Err(FrameError::Direction { kind }.into()),
        };
        let Some(front) = self.open.front() else { return Err(Broken::Order { got: header.id, expected: 0 }) };
        if front.id != header.id || front.opcode != expected {
            return Err(Broken::Order { got: header.id, expected: front.id });
        }
        match header.status() {
            FrameStatus::Done if expected == Opcode::Read => {
                if header.payload_len != front.bytes {
                    return Err(FrameError::Sum { sum: front.bytes, payload: header.payload_len }.into());
                }
                self.payload.start(header.checksum, header.payload_len);
                for slice in &front.slices {
                    if let Some(local) = ByteRange::new(slice.local, slice.target.len()) {
                        self.payload.target.push(Span::pinned(local));
                    }
                }
                self.phase = Phase::Payload;
                return Ok(Step::More);
            }
            status => {
                if let Some(slices) = self.pop_open() {
                    ended.push(match status {
                        FrameStatus::Done => Ended::Done(slices),
                        FrameStatus::Checksum => Ended::Corrupt(slices),
                        status => Ended::Refused(slices, header.table_crc_or_entry, status),
                    });
                }
            }
        }
        Ok(self.after_frame())
    }

    fn pop_open(&mut self) -> Option<Vec<Slice>> {
        let frame = self.open.pop_front()?;
        self.unanswered_bytes -= frame.bytes;
        Some(frame.slices)
    }

    /// Gives an emptied list back for reuse.
    pub(super) fn recycle(&mut self, slices: Vec<Slice>) {
        if slices.is_empty() && self.spare.len() < 16 {
            self.spare.push(slices);
        }
    }

    /// Asks for a sign of life when it is time; the silence in milliseconds once it is too long.
    pub(super) fn check_alive(&mut self, now: Instant, options: &TcpOptions) -> Result<Option<u64>, Broken> {
        if !self.is_ready() {
            let waited = now.saturating_duration_since(self.opened);
            return if waited > options.connect_timeout {
                Err(Broken::ConnectTimeout(options.connect_timeout))
            } else {
                Ok(None)
            };
        }
        if self.open.is_empty() {
            return Ok(None);
        }
        // Only what was watched counts: a process that was stopped, or a loop that was busy, knows nothing of that time.
        let since = self.looked.max(self.heard);
        self.silent += now.saturating_duration_since(since).min((options.heartbeat_interval / 2).max(LONGEST_LOOK));
        self.looked = now;
        let silent = self.silent;
        if silent >= options.heartbeat_timeout {
            return Ok(Some(silent.as_millis() as u64));
        }
        if silent >= options.heartbeat_interval && !self.pinged {
            self.pinged = true;
            self.outbound.push_bare(&FrameHeader::bare(FrameKind::Ping, FrameStatus::Done, 0));
            self.flush()?;
        }
        Ok(None)
    }

    /// Whether an open frame has a slice for which `pred` holds.
    pub(super) fn carries(&self, pred: impl Fn(&Slice) -> bool) -> bool {
        self.open.iter().any(|f| f.slices.iter().any(&pred))
    }

    /// Ends the connection at once and gives back the slices without an answer, in order.
    pub(super) fn break_off(mut self) -> Vec<Slice> {
        let open = std::mem::take(&mut self.open);
        self.outbound.clear();
        socket::reset(&self.socket);
        open.into_iter().flat_map(|f| f.slices).collect()
    }
}
