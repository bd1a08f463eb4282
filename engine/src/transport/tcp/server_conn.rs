//! One connection of the target side: reads requests, moves their bytes, answers in order.
//!
//! Invariants:
//! * bytes of a region are touched only while the frame holds its pin;
//! * after `close` returned, this connection places and reads nothing any more;
//! * at most [`MAX_OPEN_FRAMES`] answers wait; with that many nothing is read.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, OnceLock, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::event::epoll::EventFlags;
use tidewire_core::{
    ByteRange,
    error::RefuseReason,
    native::{
        frame::{FrameError, FrameHeader, FrameKind, FrameStatus, HEADER_LEN, entries},
        hello::{HELLO_LEN, Hello},
    },
};

use super::{
    inbound::{Inbound, Outcome, Payload, Step},
    outbound::Outbound,
    reactor::{EventLoop, Next, Source, SourceKey},
    server::{MAX_ENTRIES, MAX_FRAME_BYTES, MAX_OPEN_FRAMES, Server},
    socket,
};
use crate::memory::{LocalRegion, RegionPin, io::Span, lock};

/// Payload bytes one connection may move before the loop looks at the others.
const FAIR_BYTES: u64 = 4 << 20;

/// Age from which on the knowledge that a connection stands is asked for again.
const STANDING: Duration = Duration::from_millis(1);

/// Answers that leave in one send while input goes on.
const ANSWER_BUNCH: usize = 8;

/// A connection of the target side.
pub(super) struct ServerConn {
    id: u64,
    peer: SocketAddr,
    server: Arc<Server>,
    event_loop: Arc<EventLoop>,
    key: OnceLock<SourceKey>,
    session: OnceLock<(u64, u16)>,
    own: OnceLock<Weak<ServerConn>>,
    /// A region this connection may be touching is to be let go: checked between system calls.
    dead: AtomicBool,
    /// Accepted beyond the limit, to be refused by name.
    surplus: bool,
    state: Mutex<State>,
}

struct State {
    socket: Option<OwnedFd>,
    phase: Phase,
    inbound: Inbound,
    payload: Payload,
    outbound: Outbound,
    /// Pins of the frame being received.
    pins: Vec<RegionPin>,
    checksums: bool,
    opened: Instant,
    interest: EventFlags,
    alive_at: Instant,
    alive_received: u64,
}

#[derive(Clone, Copy)]
enum Phase {
    Hello,
    Header,
    Table(FrameHeader),
    Payload(FrameHeader, FrameStatus, u32),
}

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("{0}")]
    Refused(&'static str),
}

impl std::fmt::Debug for ServerConn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerConn").field("id", &self.id).field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl ServerConn {
    pub(super) fn new(
        id: u64,
        socket: OwnedFd,
        peer: SocketAddr,
        server: Arc<Server>,
        event_loop: Arc<EventLoop>,
        surplus: bool,
    ) -> Self {
        let now = Instant::now();
        ServerConn {
            id,
            peer,
            server,
            event_loop,
            key: OnceLock::new(),
            session: OnceLock::new(),
            own: OnceLock::new(),
            dead: AtomicBool::new(false),
            surplus,
            state: Mutex::new(State {
                socket: Some(socket),
                phase: Phase::Hello,
                inbound: Inbound::new(),
                payload: Payload::default(),
                outbound: Outbound::default(),
                pins: Vec::new(),
                checksums: false,
                opened: now,
                interest: EventFlags::IN,
                alive_at: now,
                alive_received: 0,
            }),
        }
    }

    /// Hands the connection to its loop.
    pub(super) fn watch(self: &Arc<Self>) -> io::Result<()> {
        let _ = self.own.set(Arc::downgrade(self));
        let state = lock(&self.state);
        let Some(socket) = &state.socket else { return Ok(()) };
        let key = self.event_loop.add(socket.as_fd(), Arc::clone(self) as Arc<dyn Source>, EventFlags::IN)?;
        let _ = self.key.set(key);
        Ok(())
    }

    /// Session and stream, once the hello was read.
    pub(super) fn session(&self) -> Option<(u64, u16)> {
        self.session.get().copied()
    }

    /// Whether a frame of this connection pins `region`.
    pub(super) fn holds(&self, region: &Arc<LocalRegion>) -> bool {
        let same = |pin: &RegionPin| Arc::ptr_eq(pin.region(), region);
        let state = lock(&self.state);
        state.pins.iter().any(same) || state.outbound.holds(same)
    }

    /// Whether a request is being received or answered.
    pub(super) fn is_busy(&self) -> bool {
        let state = lock(&self.state);
        state.socket.is_some() && (!matches!(state.phase, Phase::Hello | Phase::Header) || !state.outbound.is_empty())
    }

    /// Ends the connection and lets go of all memory.
    pub(super) fn close(&self, why: &'static str) {
        self.dead.store(true, Ordering::Release);
        let mut state = lock(&self.state);
        tracing::debug!(peer = %self.peer, why, "connection closed");
        self.end(&mut state);
    }

    fn end(&self, state: &mut State) {
        self.dead.store(true, Ordering::Release);
        state.pins.clear();
        state.payload.start(false, 0);
        state.outbound.clear();
        if let Some(socket) = state.socket.take() {
            if let Some(key) = self.key.get() {
                drop(self.event_loop.remove(socket.as_fd(), *key));
            }
            drop(socket);
            self.server.forget(self.id);
        }
    }

    /// Goes on until the socket is used up, the answers back up, or it is time for other connections. Whatever is left
    /// then is in the socket, never only in the stage: the next readiness comes from the socket.
    fn step(&self, state: &mut State, seen: Instant) -> Result<(), End> {
        let mut standing = seen;
        let mut budget = FAIR_BYTES;
        loop {
            if self.dead.load(Ordering::Acquire) {
                return Err(End::Refused("closed"));
            }
            if state.outbound.len() >= MAX_OPEN_FRAMES as usize {
                self.flush(state)?;
                if state.outbound.len() >= MAX_OPEN_FRAMES as usize {
                    return Ok(());
                }
            }
            // This process may have been stopped, or busy with others, since it was told that there is something to read.
            let now = Instant::now();
            if now.duration_since(standing) > STANDING {
                if state.socket.as_ref().is_some_and(socket::was_reset) {
                    return Err(End::Refused("reset"));
                }
                standing = now;
            }
            let before = state.inbound.received();
            let step = self.receive(state)?;
            budget = budget.saturating_sub(state.inbound.received() - before);
            let between_frames = matches!(state.phase, Phase::Header) && !state.inbound.has_staged();
            let pause = step == Step::Drained || budget == 0 && between_frames;
            // Answers leave when the input is used up or in bunches, so that a burst of requests costs one send.
            if pause || state.outbound.len() >= ANSWER_BUNCH {
                self.flush(state)?;
            }
            if pause {
                return Ok(());
            }
        }
    }

    fn flush(&self, state: &mut State) -> Result<(), End> {
        let Some(socket) = &state.socket else { return Ok(()) };
        state.outbound.flush(socket)?;
        Ok(())
    }

    fn receive(&self, state: &mut State) -> Result<Step, End> {
        let Some(socket) = &state.socket else { return Ok(Step::Drained) };
        match state.phase {
            Phase::Hello => match state.inbound.peek(HELLO_LEN).map(Hello::decode) {
                Some(Ok(hello)) => {
                    state.inbound.consume(HELLO_LEN);
                    self.welcome(state, &hello)?;
                    Ok(Step::More)
                }
                Some(Err(_)) => Err(End::Refused("not a hello")),
                None => Ok(state.inbound.fill(socket)?),
            },
            Phase::Header => match state.inbound.peek(HEADER_LEN).map(FrameHeader::decode) {
                Some(header) => {
                    let header = header?;
                    state.inbound.consume(HEADER_LEN);
                    self.begin(state, header)?;
                    Ok(Step::More)
                }
                None => Ok(state.inbound.fill(socket)?),
            },
            Phase::Table(header) => {
                let len = header.check_request(MAX_ENTRIES, u64::from(MAX_FRAME_BYTES))?;
                let Some(table) = state.inbound.peek(len) else { return Ok(state.inbound.fill(socket)?) };
                header.check_table(table)?;
                let judged = judge(&self.server, table, &mut state.pins);
                match header.kind {
                    FrameKind::Write => start_write(state, header, len, judged),
                    _ => self.answer_read(state, header, len, judged),
                }
                Ok(Step::More)
            }
            Phase::Payload(header, status, refused) => match state.payload.receive(&mut state.inbound, socket)? {
                Outcome::Open(step) => Ok(step),
                Outcome::Done(intact) => {
                    let status = if !intact && status == FrameStatus::Done { FrameStatus::Checksum } else { status };
                    state.pins.clear();
                    self.server.counters.bytes_in.fetch_add(header.payload_len, Ordering::Relaxed);
                    let mut answer = FrameHeader::bare(FrameKind::WriteDone, status, header.id);
                    answer.table_crc_or_entry = refused;
                    state.outbound.push_bare(&answer);
                    state.phase = Phase::Header;
                    // The stage may hold the next frame whole.
                    Ok(if state.inbound.has_staged() { Step::More } else { state.inbound.idle_step() })
                }
            },
        }
    }

    fn welcome(&self, state: &mut State, hello: &Hello) -> Result<(), End> {
        let identity = &self.server.identity;
        let mut welcome = hello.judge(&identity.token, identity.generation, self.server.limits());
        if self.surplus && welcome.refused.is_none() {
            welcome.refused = Some(RefuseReason::Limit);
        }
        if welcome.refused.is_none() {
            let _ = self.session.set((hello.session, hello.stream));
            let own = self.own.get().and_then(Weak::upgrade);
            if !own.is_some_and(|own| self.server.adopt(hello, &own)) {
                return Err(End::Refused("an older attempt of a stream that was taken over"));
            }
        }
        state.outbound.push_raw(&welcome.encode());
        if let Some(reason) = welcome.refused {
            self.server.counters.refused.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(peer = %self.peer, %reason, "connection refused");
            self.flush(state)?;
            return Err(End::Refused("refused"));
        }
        state.checksums = welcome.features & tidewire_core::native::FEATURE_CHECKSUM != 0;
        state.phase = Phase::Header;
        Ok(())
    }

    fn begin(&self, state: &mut State, header: FrameHeader) -> Result<(), End> {
        header.check_request(MAX_ENTRIES, u64::from(MAX_FRAME_BYTES))?;
        if header.kind == FrameKind::Ping {
            state.outbound.push_bare(&FrameHeader::bare(FrameKind::Alive, FrameStatus::Done, header.id));
            return Ok(());
        }
        if self.server.is_closing() {
            state.outbound.push_bare(&FrameHeader::bare(FrameKind::Goodbye, FrameStatus::ShuttingDown, header.id));
            self.flush(state)?;
            return Err(End::Refused("shutting down"));
        }
        state.phase = Phase::Table(header);
        Ok(())
    }

    fn answer_read(
        &self,
        state: &mut State,
        header: FrameHeader,
        table_len: usize,
        judged: Result<(), (FrameStatus, u32)>,
    ) {
        let mut answer = FrameHeader::bare(FrameKind::ReadData, FrameStatus::Done, header.id);
        let mut frame = state.outbound.frame();
        match judged {
            Ok(()) => {
                answer.payload_len = header.payload_len;
                answer.checksum = header.checksum && state.checksums;
                frame.checksum = answer.checksum;
                for range in state.inbound.peek(table_len).into_iter().flat_map(ranges) {
                    frame.body.push(Span::pinned(range));
                }
                frame.pins.append(&mut state.pins);
                self.server.counters.bytes_out.fetch_add(header.payload_len, Ordering::Relaxed);
            }
            Err((status, entry)) => {
                answer.entries_or_status = status.code();
                answer.table_crc_or_entry = entry;
            }
        }
        state.inbound.consume(table_len);
        frame.head.extend_from_slice(&answer.encode());
        state.outbound.push(frame);
        state.phase = Phase::Header;
    }

    fn finish(&self, state: &mut State, result: Result<(), End>) -> Next {
        match result {
            Ok(()) => {}
            Err(error) => {
                if let End::Frame(_) = error {
                    self.server.counters.malformed.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(peer = %self.peer, %error, "malformed frame, connection closed");
                    state.outbound.push_bare(&FrameHeader::bare(FrameKind::Goodbye, FrameStatus::Malformed, 0));
                    let _ = self.flush(state);
                } else {
                    tracing::debug!(peer = %self.peer, %error, "connection ended");
                }
                self.end(state);
                return Next::Remove;
            }
        }
        let full = state.outbound.len() >= MAX_OPEN_FRAMES as usize;
        let mut interest = EventFlags::empty();
        interest.set(EventFlags::IN, !full);
        interest.set(EventFlags::OUT, !state.outbound.is_empty());
        if interest != state.interest
            && let (Some(socket), Some(key)) = (&state.socket, self.key.get())
        {
            if self.event_loop.modify(socket.as_fd(), *key, interest).is_err() {
                self.end(state);
                return Next::Remove;
            }
            state.interest = interest;
        }
        if matches!(state.phase, Phase::Header) { Next::Keep } else { Next::Tick }
    }
}

fn start_write(state: &mut State, header: FrameHeader, table_len: usize, judged: Result<(), (FrameStatus, u32)>) {
    let checksum = header.checksum;
    state.payload.start(checksum, header.payload_len);
    let (status, entry) = match judged {
        Ok(()) => {
            for range in state.inbound.peek(table_len).into_iter().flat_map(ranges) {
                state.payload.target.push(Span::pinned(range));
            }
            (FrameStatus::Done, 0)
        }
        Err((status, entry)) => {
            state.payload.discard = header.payload_len;
            (status, entry)
        }
    };
    state.inbound.consume(table_len);
    state.phase = Phase::Payload(header, status, entry);
}

fn ranges(table: &[u8]) -> impl Iterator<Item = ByteRange> + '_ {
    entries(table).filter_map(|(addr, len)| ByteRange::new(addr, len))
}

/// Pins the regions of all entries, or says which entry is refused and why.
fn judge(server: &Server, table: &[u8], pins: &mut Vec<RegionPin>) -> Result<(), (FrameStatus, u32)> {
    let mut refused = None;
    for (index, (addr, len)) in entries(table).enumerate() {
        let Some(range) = ByteRange::new(addr, len) else {
            refused = Some((FrameStatus::OutOfBounds, index as u32));
            break;
        };
        if pins.iter().rev().take(8).any(|pin| pin.region().range().contains(range)) {
            continue;
        }
        match server.regions.find(range).map(|region| region.pin()) {
            Some(Some(pin)) => pins.push(pin),
            Some(None) => refused = Some((FrameStatus::Revoked, index as u32)),
            None => refused = Some((FrameStatus::OutOfBounds, index as u32)),
        }
        if refused.is_some() {
            break;
        }
    }
    match refused {
        None => Ok(()),
        Some(refused) => {
            pins.clear();
            Err(refused)
        }
    }
}

impl Source for ServerConn {
    fn ready(&self, events: EventFlags, seen: Instant) -> Next {
        let mut state = lock(&self.state);
        if state.socket.is_none() {
            return Next::Remove;
        }
        if events.intersects(EventFlags::ERR | EventFlags::HUP) && state.socket.as_ref().is_some_and(socket::was_reset)
        {
            // What waits in the receive buffer is void: its sender gave it up.
            self.end(&mut state);
            return Next::Remove;
        }
        state.inbound.readable();
        let result = self.step(&mut state, seen);
        self.finish(&mut state, result)
    }

    fn tick(&self, now: Instant) -> Next {
        let mut state = lock(&self.state);
        if state.socket.is_none() {
            return Next::Remove;
        }
        match state.phase {
            Phase::Hello if now.duration_since(state.opened) > self.server.options.hello_timeout => {
                tracing::debug!(peer = %self.peer, "no hello in time, connection closed");
                self.end(&mut state);
                Next::Remove
            }
            Phase::Header => Next::Keep,
            Phase::Hello => Next::Tick,
            Phase::Table(_) | Phase::Payload(..) => {
                let received = state.inbound.received();
                if now.duration_since(state.alive_at) >= self.server.options.heartbeat_interval
                    && received != state.alive_received
                {
                    (state.alive_at, state.alive_received) = (now, received);
                    state.outbound.push_bare(&FrameHeader::bare(FrameKind::Alive, FrameStatus::Done, 0));
                    let result = self.flush(&mut state);
                    return self.finish(&mut state, result);
                }
                Next::Tick
            }
        }
    }
}
