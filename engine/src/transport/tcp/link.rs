//! Initiator side: the streams to one peer, and who drives them.
//!
//! Slices wait in one queue; the stream with the least unanswered bytes takes from it. One thread at a time *leads* the
//! link: a caller waiting for its batch, or an event loop once the link is *detached* (nobody waits, or several do). A
//! leader that leaves with slices open wakes another waiter or detaches.
//!
//! Locks, in this order: `lead`, one stream, `pending`. Tokens are settled with none of them held.
//!
//! Invariants:
//! * every slice taken by `submit` is in `pending`, in an open frame, or settled;
//! * a slice is repeated on a new connection only after the old one was reset (the target fences it, see the protocol);
//! * after the link failed, every slice is settled and new ones fail at once.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use rustix::event::{EventfdFlags, eventfd};
use tidewire_core::{
    ByteRange, Generation, TransferError,
    error::RefuseReason,
    mooncake::descriptor::NativeExtension,
    native::{FEATURE_CHECKSUM, VERSION, frame::FrameStatus, hello::Hello},
};

use super::{
    TcpOptions,
    reactor::EventLoop,
    socket,
    stream::{Broken, Conn, Ended},
};
use crate::{
    batch::BatchCore,
    memory::lock,
    transport::{Drive, Link, Peer, Slice, TransportKind},
};

/// Connections lost in a row, without an answer between, after which the peer counts as down.
const MAX_FAILURES: u32 = 3;

/// Streams of a link, so that poll sets fit on the stack.
pub(super) const MAX_STREAMS: usize = 16;

/// The link to one peer.
#[derive(Debug)]
pub(super) struct TcpLink {
    pub(super) own: Weak<TcpLink>,
    pub(super) peer: Arc<Peer>,
    address: SocketAddr,
    token: [u8; 16],
    generation: Generation,
    session: u64,
    pub(super) options: Arc<TcpOptions>,
    pub(super) streams: Box<[Stream]>,
    pub(super) pending: Mutex<VecDeque<Slice>>,
    /// Length of `pending`, to skip its lock.
    pub(super) queued: AtomicUsize,
    pub(super) open: AtomicUsize,
    pub(super) lead: Mutex<()>,
    pub(super) waiters: Mutex<Vec<Arc<BatchCore>>>,
    pub(super) detached: AtomicBool,
    /// The leader is about to sleep, or asleep.
    pub(super) sleeping: AtomicBool,
    /// A detach was asked for while a thread led; whoever leaves the lead carries it out.
    pub(super) unled: AtomicBool,
    pub(super) kick: OwnedFd,
    failure: Mutex<Option<Failure>>,
    pub(super) failed: AtomicBool,
    redials: AtomicU64,
}

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) index: usize,
    pub(super) event_loop: Arc<EventLoop>,
    /// Payload bytes without an answer, for choosing a stream without its lock.
    pub(super) unanswered: AtomicU64,
    pub(super) ready: AtomicBool,
    pub(super) state: Mutex<StreamState>,
}

#[derive(Debug, Default)]
pub(super) struct StreamState {
    pub(super) conn: Option<Conn>,
    attempt: u32,
    failures: u32,
    /// The target admits no more streams; the others carry on.
    pub(super) disabled: bool,
}

/// Why the link is over.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    Down(String),
    Unreachable(String),
    Silent(u64),
    Refused(RefuseReason),
    Closed,
}

/// A slice whose token is to be settled once no lock is held.
pub(super) type Settled = Vec<(Slice, Option<TransferError>)>;

impl TcpLink {
    /// Connects the first stream and waits for the handshake, at most `connect_timeout`.
    pub(super) fn connect(
        peer: Arc<Peer>,
        options: Arc<TcpOptions>,
        loops: &[Arc<EventLoop>],
    ) -> Result<Arc<Self>, TransferError> {
        let unreachable = |reason: String| TransferError::Unreachable {
            segment: peer.segment.clone(),
            peer: peer.address.clone(),
            transport: "tcp",
            reason,
        };
        let extension = peer.descriptor.tidewire.as_ref().filter(|e| e.data_port != 0).ok_or_else(|| {
            TransferError::Unavailable { what: "tcp".into(), reason: "the peer publishes no native data port".into() }
        })?;
        let (token, generation) = credentials(extension)
            .ok_or_else(|| unreachable("token or generation in its descriptor is malformed".into()))?;
        let host = if extension.data_host.is_empty() { host_of(&peer.address) } else { &extension.data_host };
        let address = socket::resolve(host, extension.data_port).map_err(|e| unreachable(e.to_string()))?;
        let mut session = [0; 8];
        getrandom::fill(&mut session).map_err(|e| unreachable(e.to_string()))?;
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| TransferError::os("eventfd", &e.into()))?;
        let streams = options.streams.clamp(1, MAX_STREAMS);
        let link = Arc::new_cyclic(|own| TcpLink {
            own: own.clone(),
            address,
            token,
            generation,
            session: u64::from_le_bytes(session),
            streams: (0..streams)
                .filter_map(|i| loops.get(i % loops.len().max(1)))
                .enumerate()
                .map(|(index, event_loop)| Stream {
                    index,
                    event_loop: Arc::clone(event_loop),
                    unanswered: AtomicU64::new(0),
                    ready: AtomicBool::new(false),
                    state: Mutex::new(StreamState::default()),
                })
                .collect(),
            pending: Mutex::new(VecDeque::new()),
            queued: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            lead: Mutex::new(()),
            waiters: Mutex::new(Vec::new()),
            detached: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            unled: AtomicBool::new(false),
            kick,
            failure: Mutex::new(None),
            failed: AtomicBool::new(false),
            redials: AtomicU64::new(0),
            peer: Arc::clone(&peer),
            options,
        });
        link.shake_hands()?;
        Ok(link)
    }

    fn shake_hands(&self) -> Result<(), TransferError> {
        let deadline = Instant::now() + self.options.connect_timeout;
        let Some(first) = self.streams.first() else {
            return Err(TransferError::Internal { reason: "tcp transport without event loop" });
        };
        // A first connection that fails has nothing to lose: report it, do not try again.
        lock(&first.state).failures = MAX_FAILURES;
        loop {
            let outcome = {
                let mut state = lock(&first.state);
                let dialled = if state.conn.is_none() { self.dial(first, &mut state) } else { Ok(()) };
                dialled.and_then(|()| self.step(first, &mut state, &mut Settled::new()).map(|_| ()))
            };
            if let Err(failure) = outcome {
                self.fail(failure);
            } else if first.ready.load(Ordering::Acquire) {
                lock(&first.state).failures = 0;
                return Ok(());
            } else if Instant::now() >= deadline {
                self.fail(Failure::Unreachable(format!("no handshake within {:?}", self.options.connect_timeout)));
            } else {
                self.sleep(deadline);
            }
            if let Some(error) = self.failure() {
                return Err(error);
            }
        }
    }

    fn error_for(&self, failure: &Failure, range: Option<ByteRange>) -> TransferError {
        let (segment, peer) = (self.peer.segment.clone(), self.peer.address.clone());
        match (failure.clone(), range) {
            (Failure::Down(reason), Some(range)) => TransferError::PeerDown { segment, peer, range, reason },
            (Failure::Silent(silent_ms), Some(range)) => TransferError::PeerSilent { segment, peer, range, silent_ms },
            (Failure::Refused(reason), _) => TransferError::HandshakeRefused { segment, peer, reason },
            (Failure::Closed, _) => TransferError::Cancelled,
            (Failure::Down(reason) | Failure::Unreachable(reason), _) => {
                TransferError::Unreachable { segment, peer, transport: "tcp", reason }
            }
            (Failure::Silent(ms), None) => {
                let reason = format!("silent for {ms} ms");
                TransferError::Unreachable { segment, peer, transport: "tcp", reason }
            }
        }
    }

    /// Settles slices; called with no lock held.
    pub(super) fn settle(&self, settled: &mut Settled) {
        if settled.is_empty() {
            return;
        }
        self.open.fetch_sub(settled.len(), Ordering::AcqRel);
        for (slice, error) in settled.drain(..) {
            match error {
                None => slice.token.complete(),
                Some(error) => slice.token.fail(error),
            }
        }
    }

    /// Ends the link: all slices fail. Called with no lock held.
    pub(super) fn fail(&self, failure: Failure) {
        {
            let mut first = lock(&self.failure);
            if first.is_some() {
                return;
            }
            if !matches!(failure, Failure::Closed) {
                let (peer, segment) = (&self.peer.address, &self.peer.segment);
                tracing::warn!(%peer, %segment, reason = ?failure, "tcp link is down");
            }
            *first = Some(failure.clone());
        }
        self.failed.store(true, Ordering::Release);
        let mut slices = Vec::new();
        for stream in &self.streams {
            slices.extend(take_down(stream, &mut lock(&stream.state)));
        }
        slices.extend(lock(&self.pending).drain(..));
        self.queued.store(0, Ordering::Release);
        let with_error = |slice: Slice| {
            let error = self.error_for(&failure, Some(slice.target));
            (slice, Some(error))
        };
        self.settle(&mut slices.into_iter().map(with_error).collect());
        self.kick();
    }

    /// Puts slices back to the front of the queue, in order.
    fn requeue(&self, slices: impl DoubleEndedIterator<Item = Slice>) {
        let mut pending = lock(&self.pending);
        slices.rev().for_each(|slice| pending.push_front(slice));
        self.queued.store(pending.len(), Ordering::Release);
    }

    /// Starts a connection for a stream that has none.
    pub(super) fn dial(&self, stream: &Stream, state: &mut StreamState) -> Result<(), Failure> {
        if self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        state.attempt += 1;
        if state.attempt > 1 {
            self.redials.fetch_add(1, Ordering::Relaxed);
        }
        let hello = Hello {
            oldest: 1,
            newest: VERSION,
            features: if self.options.checksum { FEATURE_CHECKSUM } else { 0 },
            token: self.token,
            generation: self.generation,
            session: self.session,
            stream: stream.index as u16,
            attempt: state.attempt,
        };
        let dialled = Conn::dial(self.address, &hello, &self.options).map_err(Broken::from);
        let flushed = dialled.and_then(|conn| state.conn.insert(conn).flush());
        match flushed {
            Ok(()) => {
                self.watch(stream, state);
                Ok(())
            }
            Err(why) => self.lose(stream, state, why),
        }
    }

    /// A connection broke: its slices go back to the queue. An error means that the link is over.
    pub(super) fn lose(&self, stream: &Stream, state: &mut StreamState, why: Broken) -> Result<(), Failure> {
        let was_ready = stream.ready.load(Ordering::Acquire);
        self.requeue(take_down(stream, state).into_iter());
        tracing::debug!(peer = %self.peer.address, stream = stream.index, reason = %why, "stream lost");
        state.failures += 1;
        let exhausted = state.failures >= MAX_FAILURES;
        match why {
            // The target admits no more streams; those that stand carry on.
            Broken::Refused(RefuseReason::Limit) if stream.index > 0 => {
                state.disabled = true;
                Ok(())
            }
            _ if stream.index > 0 && !was_ready && exhausted => {
                state.disabled = true;
                Ok(())
            }
            Broken::Refused(reason) => Err(Failure::Refused(reason)),
            _ if !exhausted => Ok(()),
            why if was_ready || state.attempt > 1 => Err(Failure::Down(why.to_string())),
            why => Err(Failure::Unreachable(why.to_string())),
        }
    }

    /// Receives and sends what is possible on one stream; whether anything came in.
    pub(super) fn step(
        &self,
        stream: &Stream,
        state: &mut StreamState,
        settled: &mut Settled,
    ) -> Result<bool, Failure> {
        let Some(conn) = &mut state.conn else { return Ok(false) };
        let mut ended = Vec::new();
        let result = conn.flush().and_then(|()| conn.receive(self.options.frame_bytes, &mut ended));
        if !ended.is_empty() {
            state.failures = 0;
        }
        let mut again = Vec::new();
        for end in ended {
            let spare = self.sort_out(end, settled, &mut again);
            conn.recycle(spare);
        }
        stream.ready.store(conn.is_ready(), Ordering::Release);
        stream.unanswered.store(conn.unanswered_bytes(), Ordering::Release);
        if !again.is_empty() {
            self.requeue(again.into_iter());
        }
        match result {
            Ok(heard) => Ok(heard),
            Err(why) => self.lose(stream, state, why).map(|()| false),
        }
    }

    /// Decides over the slices of an answered frame; the emptied list comes back.
    fn sort_out(&self, end: Ended, settled: &mut Settled, again: &mut Vec<Slice>) -> Vec<Slice> {
        let (segment, peer) = (&self.peer.segment, &self.peer.address);
        match end {
            Ended::Done(mut slices) => {
                settled.extend(slices.drain(..).map(|slice| (slice, None)));
                slices
            }
            Ended::Corrupt(mut slices) => {
                tracing::error!(%peer, %segment, slices = slices.len(), "checksum mismatch");
                settled.extend(slices.drain(..).map(|slice| {
                    let (segment, peer, range) = (segment.clone(), peer.clone(), slice.target);
                    (slice, Some(TransferError::ChecksumMismatch { segment, peer, range }))
                }));
                slices
            }
            Ended::Refused(mut slices, entry, status) => {
                // Only the named entry is at fault; the frame's others were not done and go again.
                let named = (entry as usize) < slices.len();
                for (index, slice) in slices.drain(..).enumerate() {
                    let (segment, peer, range) = (segment.clone(), peer.clone(), slice.target);
                    match status {
                        _ if !named => {
                            let reason = format!("refused entry {entry} of a frame that has none such");
                            settled.push((slice, Some(TransferError::Protocol { peer, reason })));
                        }
                        FrameStatus::OutOfBounds | FrameStatus::Revoked if index == entry as usize => {
                            settled.push((slice, Some(TransferError::OutOfBounds { segment, peer, range })));
                        }
                        FrameStatus::OutOfBounds | FrameStatus::Revoked => again.push(slice),
                        other => {
                            let reason = format!("the target answered {other:?}");
                            settled.push((slice, Some(TransferError::PeerDown { segment, peer, range, reason })));
                        }
                    }
                }
                slices
            }
        }
    }

    /// Looks at the heartbeats.
    pub(super) fn look(&self, now: Instant) {
        for stream in &self.streams {
            let outcome = {
                let mut state = lock(&stream.state);
                match state.conn.as_mut().map(|c| c.check_alive(now, &self.options)) {
                    None | Some(Ok(None)) => Ok(()),
                    Some(Ok(Some(silent_ms))) => Err(Failure::Silent(silent_ms)),
                    Some(Err(why)) => self.lose(stream, &mut state, why),
                }
            };
            if let Err(failure) = outcome {
                return self.fail(failure);
            }
        }
    }
}

/// Takes the connection out of its loop and resets it; the slices it carried.
fn take_down(stream: &Stream, state: &mut StreamState) -> Vec<Slice> {
    stream.ready.store(false, Ordering::Release);
    stream.unanswered.store(0, Ordering::Release);
    let Some(conn) = state.conn.take() else { return Vec::new() };
    if let Some(key) = conn.key {
        drop(stream.event_loop.remove(conn.socket.as_fd(), key));
    }
    conn.break_off()
}

fn host_of(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}

/// Token and generation from their hexadecimal forms.
fn credentials(extension: &NativeExtension) -> Option<([u8; 16], Generation)> {
    let token = u128::from_str_radix(&extension.token, 16).ok().filter(|_| extension.token.len() == 32)?;
    let generation = u64::from_str_radix(&extension.generation, 16).ok()?;
    Some((token.to_be_bytes(), Generation(generation)))
}

impl Link for TcpLink {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn submit(&self, slices: &mut Vec<Slice>) {
        let room = self.options.max_queued_slices.saturating_sub(self.open.load(Ordering::Acquire));
        let taken = slices.len().min(room);
        self.open.fetch_add(taken, Ordering::AcqRel);
        {
            let mut pending = lock(&self.pending);
            pending.extend(slices.drain(..taken));
            self.queued.store(pending.len(), Ordering::Release);
        }
        self.pump();
        if self.failed.load(Ordering::Acquire) {
            self.drain_failed();
        } else if self.leader_sleeps() {
            self.kick();
        }
    }

    fn drive(&self, batch: &Arc<BatchCore>, how: Drive) -> bool {
        self.lead_or_wait(batch, how)
    }

    fn poll(&self) {
        self.poll_once();
    }

    fn detach(&self) {
        self.detach_now();
    }

    fn cancel(&self, batch: &Arc<BatchCore>, error: &dyn Fn(ByteRange) -> TransferError) {
        let mut settled = Settled::new();
        // All at once, in order: a slice must not move from the queue to a stream that was looked at already.
        let mut states: Vec<_> = self.streams.iter().map(|s| lock(&s.state)).collect();
        for (stream, state) in self.streams.iter().zip(&mut states) {
            if !state.conn.as_ref().is_some_and(|c| c.carries(|s| s.token.is_of(batch))) {
                continue;
            }
            let slices = take_down(stream, state);
            let (ours, others): (Vec<_>, Vec<_>) = slices.into_iter().partition(|s| s.token.is_of(batch));
            self.requeue(others.into_iter());
            settled.extend(ours.into_iter().map(|s| (error(s.target), s)).map(|(e, s)| (s, Some(e))));
        }
        {
            let mut pending = lock(&self.pending);
            let (ours, others): (VecDeque<_>, VecDeque<_>) = pending.drain(..).partition(|s| s.token.is_of(batch));
            *pending = others;
            self.queued.store(pending.len(), Ordering::Release);
            settled.extend(ours.into_iter().map(|s| (error(s.target), s)).map(|(e, s)| (s, Some(e))));
        }
        drop(states);
        self.settle(&mut settled);
        self.pump();
        self.kick();
    }

    fn open_slices(&self) -> usize {
        self.open.load(Ordering::Acquire)
    }

    fn failure(&self) -> Option<TransferError> {
        if !self.failed.load(Ordering::Acquire) {
            return None;
        }
        lock(&self.failure).as_ref().map(|f| self.error_for(f, None))
    }

    fn describe(&self) -> String {
        let ready = self.streams.iter().filter(|s| s.ready.load(Ordering::Relaxed)).count();
        let redials = self.redials.load(Ordering::Relaxed);
        format!("{ready} of {} streams to {}, {redials} redials", self.streams.len(), self.address)
    }

    fn close(&self) {
        self.fail(Failure::Closed);
    }
}

impl TcpLink {
    /// A submit that raced with the end of the link: its slices fail like the others.
    fn drain_failed(&self) {
        let Some(failure) = lock(&self.failure).clone() else { return };
        let slices: Vec<Slice> = lock(&self.pending).drain(..).collect();
        self.queued.store(0, Ordering::Release);
        let with_error = |slice: Slice| {
            let error = self.error_for(&failure, Some(slice.target));
            (slice, Some(error))
        };
        self.settle(&mut slices.into_iter().map(with_error).collect());
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        self.fail(Failure::Closed);
        // A dial that raced with an earlier failure.
        for stream in &self.streams {
            drop(take_down(stream, &mut lock(&stream.state)));
        }
    }
}
