//! Loop `tw-mooncake-in`: the data port and the connections from initiators.
//!
//! Sleeps without a timeout while no request is under way; idle connections cost a descriptor and nothing else.
//!
//! Invariants:
//! * the loop owns every connection; other threads reach it only through its mailbox;
//! * after the answer to an evict, no connection holds a pin of that region.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::event::epoll::EventFlags;

use super::{
    MooncakeTcpOptions,
    inbound::{Inbound, STAGE_BYTES, Server},
    poller::{CloseOnDrop, Mailbox, Poller, Slab},
};
use crate::memory::{LocalRegion, RegionTable, lock};

/// Key of the listener; no slab gives it out.
const LISTENER: u64 = u64::MAX - 1;
/// Connections accepted before others have their turn.
const ACCEPTS: usize = 64;

/// What the loop is asked to do.
#[derive(Debug)]
enum Command {
    /// Close every connection that holds a pin of the region; how many there were.
    Evict { region: Arc<LocalRegion>, answer: SyncSender<usize> },
    /// Close the port, and end when no request is under way, at the latest at this time.
    Stop { deadline: Instant },
}

/// What a data port has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TargetStats {
    /// Connections accepted.
    pub connections: u64,
    /// Connections open now.
    pub open: u64,
    /// Requests served.
    pub served: u64,
    /// Requests refused.
    pub refused: u64,
    /// Connections closed because their request made no progress.
    pub late: u64,
}

/// Counters behind [`TargetStats`].
#[derive(Debug, Default)]
pub(super) struct Counters {
    connections: AtomicU64,
    open: AtomicU64,
    served: AtomicU64,
    refused: AtomicU64,
    late: AtomicU64,
}

impl Counters {
    pub(super) fn served(&self) {
        self.served.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }
}

/// Handle of the loop.
#[derive(Debug)]
pub(super) struct Target {
    address: SocketAddr,
    mailbox: Arc<Mailbox<Command>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    counters: Arc<Counters>,
}

impl Target {
    /// Starts serving `regions` on `listener`, which is non-blocking.
    pub(super) fn start(
        listener: TcpListener,
        regions: Arc<RegionTable>,
        options: &MooncakeTcpOptions,
    ) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let (poller, mailbox) = Poller::new()?;
        poller.add(&listener, LISTENER, EventFlags::IN)?;
        let counters = Arc::new(Counters::default());
        let target = Loop {
            poller,
            mailbox: Arc::clone(&mailbox),
            listener: Some(listener),
            accepting: true,
            regions,
            counters: Arc::clone(&counters),
            options: options.clone(),
            connections: Slab::default(),
            stage: vec![0; STAGE_BYTES],
            tick_at: None,
            stop_at: None,
            now: Instant::now(),
        };
        let thread = std::thread::Builder::new().name("tw-mooncake-in".to_owned()).spawn(move || target.run())?;
        Ok(Target { address, mailbox, thread: Mutex::new(Some(thread)), counters })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn stats(&self) -> TargetStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { connections, open, served, refused, late } = &*self.counters;
        TargetStats {
            connections: read(connections),
            open: read(open),
            served: read(served),
            refused: read(refused),
            late: read(late),
        }
    }

    /// Closes the connections that hold `region`; fails if the loop does not answer within `drain`.
    pub(super) fn evict(&self, region: &Arc<LocalRegion>, drain: Duration) -> Result<(), String> {
        let (answer, answered) = sync_channel(1);
        // A loop that has ended holds no connection.
        if self.mailbox.put(Command::Evict { region: Arc::clone(region), answer }).is_err() {
            return Ok(());
        }
        match answered.recv_timeout(drain) {
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => Err("mooncake initiators".to_owned()),
            _ => Ok(()),
        }
    }

    pub(super) fn stop(&self, deadline: Instant) {
        // A loop that has ended needs no stop.
        let _ = self.mailbox.put(Command::Stop { deadline });
    }

    /// Waits for the loop to end after [`Target::stop`].
    pub(super) fn join(&self) {
        let thread = lock(&self.thread).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("loop of the mooncake data port panicked");
        }
    }
}

#[derive(Debug)]
struct Loop {
    poller: Poller,
    mailbox: Arc<Mailbox<Command>>,
    listener: Option<TcpListener>,
    /// Whether the listener is watched; not while the process has no descriptor left.
    accepting: bool,
    regions: Arc<RegionTable>,
    counters: Arc<Counters>,
    options: MooncakeTcpOptions,
    connections: Slab<Inbound>,
    stage: Vec<u8>,
    tick_at: Option<Instant>,
    stop_at: Option<Instant>,
    now: Instant,
}

impl Loop {
    fn run(mut self) {
        let _close = CloseOnDrop(Arc::clone(&self.mailbox));
        let mut ready = Vec::new();
        while !self.may_stop() {
            let until = self.tick_at.into_iter().chain(self.stop_at).min();
            let timeout = until.map(|until| until.saturating_duration_since(Instant::now()));
            if let Err(error) = self.poller.wait(&mut ready, timeout) {
                tracing::error!(%error, "mooncake data port cannot be watched, its loop ends");
                break;
            }
            self.now = Instant::now();
            for command in self.mailbox.take() {
                self.obey(command);
            }
            for &(key, events) in &ready {
                if key == LISTENER { self.accept() } else { self.serve(key, events) }
            }
            if self.tick_at.is_some_and(|at| at <= self.now) {
                self.tick();
            }
        }
        let keys: Vec<u64> = self.connections.iter_mut().map(|(key, _)| key).collect();
        keys.into_iter().filter_map(|key| self.remove(key)).for_each(Inbound::reset);
    }

    fn may_stop(&mut self) -> bool {
        let Some(deadline) = self.stop_at else { return false };
        self.now >= deadline || !self.connections.iter_mut().any(|(_, connection)| connection.is_busy())
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Evict { region, answer } => {
                let holders: Vec<u64> =
                    self.connections.iter_mut().filter(|(_, c)| c.holds(&region)).map(|(key, _)| key).collect();
                let count = holders.len();
                holders.into_iter().filter_map(|key| self.remove(key)).for_each(Inbound::reset);
                // Nobody waits any more: the drain time is over.
                let _ = answer.send(count);
            }
            Command::Stop { deadline } => {
                self.stop_at = Some(deadline);
                self.listener = None;
            }
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS {
            let Some(listener) = &self.listener else { return };
            let accepted = rustix::net::accept_with(
                listener,
                rustix::net::SocketFlags::NONBLOCK | rustix::net::SocketFlags::CLOEXEC,
            );
            let socket = match accepted {
                Ok(socket) => socket,
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE | rustix::io::Errno::NOBUFS) => {
                    return self.make_room();
                }
                // This connection ended before it was accepted.
                Err(_) => continue,
            };
            // Without it replies may wait for the initiator's acknowledgements; slower, not wrong.
            let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
            if self.connections.len() >= self.options.max_inbound {
                self.close_longest_idle();
            }
            let key = self.connections.insert(Inbound::new(socket, self.now));
            let Some(connection) = self.connections.get_mut(key) else { return };
            if self.poller.add(connection.socket(), key, connection.interest).is_err() {
                self.connections.remove(key);
                continue;
            }
            self.counters.connections.fetch_add(1, Ordering::Relaxed);
            self.counters.open.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// No descriptor is left: closes who has been idle longest, or stops accepting until someone leaves.
    fn make_room(&mut self) {
        tracing::warn!(open = self.connections.len(), "no descriptor left for a mooncake connection");
        if !self.close_longest_idle() {
            self.watch_listener(false);
            self.arm_tick();
        }
    }

    fn close_longest_idle(&mut self) -> bool {
        let idle = self.connections.iter_mut().filter(|(_, connection)| !connection.is_busy());
        let longest = idle.min_by_key(|(_, connection)| connection.progress).map(|(key, _)| key);
        longest.and_then(|key| self.remove(key)).is_some()
    }

    fn watch_listener(&mut self, accepting: bool) {
        let interest = if accepting { EventFlags::IN } else { EventFlags::empty() };
        if let Some(listener) = &self.listener
            && self.accepting != accepting
            && self.poller.modify(listener, LISTENER, interest).is_ok()
        {
            self.accepting = accepting;
        }
    }

    fn serve(&mut self, key: u64, events: EventFlags) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        if events.intersects(EventFlags::ERR | EventFlags::HUP) && connection.was_reset() {
            // What waits in the receive buffer is void: its sender gave it up.
            self.remove(key).into_iter().for_each(Inbound::close);
            return self.watch_listener(true);
        }
        let mut server =
            Server { regions: &self.regions, stage: &mut self.stage, counters: &self.counters, now: self.now };
        if connection.ready(&mut server).is_err() {
            self.remove(key).into_iter().for_each(Inbound::close);
            return self.watch_listener(true);
        }
        let (wanted, busy) = (connection.wanted(), connection.is_busy());
        if wanted != connection.interest {
            connection.interest = wanted;
            if self.poller.modify(connection.socket(), key, wanted).is_err() {
                self.remove(key);
            }
        }
        if busy {
            self.arm_tick();
        }
    }

    fn remove(&mut self, key: u64) -> Option<Inbound> {
        let connection = self.connections.remove(key)?;
        self.counters.open.fetch_sub(1, Ordering::Relaxed);
        Some(connection)
    }

    fn tick(&mut self) {
        self.tick_at = None;
        let (now, limit) = (self.now, self.options.progress_timeout);
        let late = self.connections.iter_mut().filter(|(_, connection)| connection.is_late(now, limit));
        let late: Vec<u64> = late.map(|(key, _)| key).collect();
        for key in late {
            self.counters.late.fetch_add(1, Ordering::Relaxed);
            self.remove(key).into_iter().for_each(Inbound::reset);
        }
        self.watch_listener(true);
        if self.connections.iter_mut().any(|(_, connection)| connection.is_busy()) {
            self.arm_tick();
        }
    }

    fn arm_tick(&mut self) {
        if self.tick_at.is_none() {
            let period =
                (self.options.progress_timeout / 8).clamp(Duration::from_millis(5), Duration::from_millis(500));
            self.tick_at = Some(self.now + period);
        }
    }
}
