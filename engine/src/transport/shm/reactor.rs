//! The `tw-local` thread: accepts peers, answers them, carries answers to the links, and notices deaths.
//!
//! Keys of the epoll set: 0 is the listener, 1 the wake-up; otherwise the low bit tells a pidfd from a socket and the rest
//! numbers the connection. Connections of both directions share one number space.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, epoll, eventfd},
    io::Errno,
    net::{SocketFlags, accept_with},
    process::{Pid, PidfdFlags, getuid, pidfd_open},
};

use super::{
    SameHostOptions,
    client::Client,
    service::{Attached, Service},
    socket::{Channel, Poller, Received},
};
use crate::{memory::lock, shm::peer_credentials};

const LISTENER: u64 = 0;
const WAKE: u64 = 1;
/// Packets handled of one connection before the others get their turn.
const TURN: usize = 64;
/// How long nobody is accepted after the descriptors ran out, unless a peer goes first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);
/// Failures to accept that are less apart than this are one episode, which is logged once.
const EPISODE: Duration = Duration::from_secs(10);
/// How often peers that were hung up on inside a region are looked at.
const CLOSING_POLL: Duration = Duration::from_millis(100);

/// What the thread, the links and the [`super::SameHost`] share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) service: Arc<Service>,
    pub(super) socket_name: String,
    pub(super) options: SameHostOptions,
    pub(super) poller: Arc<Poller>,
    /// Links whose slices got their grant.
    pub(super) jobs: Mutex<Option<mpsc::Sender<Arc<Client>>>>,
    clients: Mutex<HashMap<u64, Weak<Client>>>,
    next_key: AtomicU64,
    wake: OwnedFd,
    stopping: AtomicBool,
}

impl Shared {
    pub(super) fn new(
        service: Arc<Service>,
        socket_name: String,
        options: SameHostOptions,
        jobs: mpsc::Sender<Arc<Client>>,
    ) -> io::Result<Self> {
        let poller = Arc::new(Poller::new()?);
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        poller.add(&wake, WAKE)?;
        Ok(Shared {
            service,
            socket_name,
            options,
            poller,
            jobs: Mutex::new(Some(jobs)),
            clients: Mutex::default(),
            next_key: AtomicU64::new(1),
            wake,
            stopping: AtomicBool::new(false),
        })
    }

    /// A fresh key for a connection's socket; with the low bit set it is the key of its pidfd.
    pub(super) fn new_key(&self) -> u64 {
        self.next_key.fetch_add(1, Ordering::Relaxed) << 1
    }

    pub(super) fn add_client(&self, key: u64, client: &Arc<Client>) {
        lock(&self.clients).insert(key, Arc::downgrade(client));
    }

    pub(super) fn remove_client(&self, key: u64) {
        lock(&self.clients).remove(&key);
    }

    pub(super) fn clients(&self) -> Vec<Arc<Client>> {
        lock(&self.clients).values().filter_map(Weak::upgrade).collect()
    }

    /// Makes the thread look at its deadlines again.
    pub(super) fn wake(&self) {
        // A full counter means that a wake-up is due already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Ends both threads.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        lock(&self.jobs).take();
        self.wake();
    }
}

/// The thread's own state.
pub(super) struct Reactor {
    shared: Arc<Shared>,
    listener: OwnedFd,
    /// When to watch the listener again, while it is not.
    accept_at: Option<Instant>,
    /// When accepting failed last.
    refused_at: Option<Instant>,
}

impl Reactor {
    pub(super) fn new(shared: Arc<Shared>, listener: OwnedFd) -> io::Result<Self> {
        shared.poller.add(&listener, LISTENER)?;
        Ok(Reactor { shared, listener, accept_at: None, refused_at: None })
    }

    /// Runs until [`Shared::stop`].
    pub(super) fn run(mut self) {
        let mut events = Vec::with_capacity(64);
        while !self.shared.stopping.load(Ordering::Acquire) {
            let timeout = self.next_deadline().map(|d| d.saturating_duration_since(Instant::now()));
            if let Err(error) = self.shared.poller.wait(&mut events, timeout) {
                tracing::error!(%error, "same-host thread ends");
                break;
            }
            for event in &events {
                // Copied out: the kernel's structure is packed.
                let (key, flags) = (event.data.u64(), event.flags);
                match key {
                    LISTENER => self.accept(),
                    WAKE => drop(rustix::io::read(&self.shared.wake, &mut [0u8; 8])),
                    key => self.handle(key, flags),
                }
            }
            self.expire();
        }
        let attached: Vec<_> = lock(&self.shared.service.attached).drain().map(|(_, peer)| peer).collect();
        for peer in attached {
            peer.revoke_all();
            peer.close();
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let (hello, closing) = {
            let attached = lock(&self.shared.service.attached);
            let hello = attached.values().filter(|p| p.is_strange()).map(|p| p.hello_deadline).min();
            (hello, attached.values().any(|p| p.is_closing()))
        };
        let closing = closing.then(|| Instant::now() + CLOSING_POLL);
        let answers = self.shared.clients().iter().filter_map(|c| c.next_deadline()).min();
        [hello, closing, answers, self.accept_at].into_iter().flatten().min()
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let (late, closing): (Vec<u64>, Vec<u64>) = {
            let attached = lock(&self.shared.service.attached);
            let keys = |of: &dyn Fn(&Attached) -> bool| {
                attached.iter().filter(|(_, p)| of(p)).map(|(key, _)| *key).collect::<Vec<_>>()
            };
            (keys(&|p| p.is_strange() && p.hello_deadline <= now), keys(&Attached::is_closing))
        };
        for key in late {
            self.hang_up(key, "no hello in time");
        }
        for key in closing {
            self.drop_if_idle(key);
        }
        if self.accept_at.is_some_and(|at| at <= now) {
            self.watch_listener(None);
        }
        for client in self.shared.clients() {
            client.expire(now);
        }
    }

    fn accept(&mut self) {
        for _ in 0..TURN {
            let socket = match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(error) => {
                    // Out of descriptors: the listener stays readable, so the oldest stranger has to go, or else the
                    // listener is left alone for a while.
                    let now = Instant::now();
                    if self.refused_at.replace(now).is_none_or(|last| now.duration_since(last) > EPISODE) {
                        tracing::warn!(%error, "same-host peers are not accepted");
                    }
                    let strangers = lock(&self.shared.service.attached);
                    let oldest = strangers.iter().filter(|(_, p)| p.is_strange()).min_by_key(|(_, p)| p.hello_deadline);
                    let oldest = oldest.map(|(key, _)| *key);
                    drop(strangers);
                    match oldest {
                        Some(key) => self.hang_up(key, "descriptors ran out"),
                        None => self.watch_listener(Some(now + ACCEPT_PAUSE)),
                    }
                    return;
                }
            };
            if let Err(error) = self.admit(socket) {
                tracing::debug!(%error, "same-host peer not admitted");
            }
        }
    }

    /// Watches the listener, at once or only from `at`.
    fn watch_listener(&mut self, at: Option<Instant>) {
        let flags = if at.is_none() { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
        match self.shared.poller.watch(&self.listener, LISTENER, flags) {
            Ok(()) => self.accept_at = at,
            Err(error) => tracing::error!(%error, "listener of same-host peers is not watched as it should be"),
        }
    }

    fn admit(&self, socket: OwnedFd) -> io::Result<()> {
        let who = peer_credentials(socket.as_fd())?;
        let own = getuid().as_raw();
        if who.uid != own && who.uid != 0 {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {} is not {own}", who.uid)));
        }
        let pid = Pid::from_raw(who.pid).ok_or_else(|| io::Error::other("peer is in another pid namespace"))?;
        let mut attached = lock(&self.shared.service.attached);
        if attached.len() >= self.shared.options.max_peers {
            return Err(io::Error::other("limit of attached peers reached"));
        }
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let key = self.shared.new_key();
        let channel = Channel::new(socket, &self.shared.poller, key, true)?;
        self.shared.poller.add(&pidfd, key | 1)?;
        let hello_deadline = Instant::now() + self.shared.options.connect_timeout;
        attached.insert(key, Arc::new(Attached::new(channel, who.pid, pidfd, hello_deadline)));
        Ok(())
    }

    fn handle(&mut self, key: u64, flags: epoll::EventFlags) {
        let (connection, is_pidfd) = (key & !1, key & 1 == 1);
        let peer = lock(&self.shared.service.attached).get(&connection).cloned();
        if let Some(peer) = peer {
            if is_pidfd {
                peer.mark_dead();
                self.hang_up(connection, "process ended");
            } else if !peer.is_closing()
                && let Err(error) = self.serve(&peer, flags)
            {
                self.hang_up(connection, &error.to_string());
            }
            return;
        }
        let client = lock(&self.shared.clients).get(&connection).and_then(Weak::upgrade);
        if let Some(client) = client {
            if is_pidfd {
                client.go_down("process ended");
            } else {
                client.on_ready(flags, TURN);
            }
        }
    }

    fn serve(&self, peer: &Attached, flags: epoll::EventFlags) -> io::Result<()> {
        if flags.contains(epoll::EventFlags::OUT) {
            peer.channel.flush()?;
        }
        if !flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            return Ok(());
        }
        for _ in 0..TURN {
            match peer.channel.receive()? {
                Received::Message(message, _) => self.shared.service.handle(peer, message)?,
                Received::Nothing => return Ok(()),
                Received::Closed => return Err(io::ErrorKind::ConnectionReset.into()),
            }
        }
        Ok(())
    }

    /// Hangs up on an attached peer. One that still is inside a region stays listed until it leaves or dies.
    fn hang_up(&mut self, key: u64, reason: &str) {
        let Some(peer) = lock(&self.shared.service.attached).get(&key).cloned() else { return };
        tracing::debug!(pid = peer.pid, reason, "same-host peer hung up");
        peer.close();
        drop(peer);
        self.drop_if_idle(key);
    }

    /// Forgets a peer that was hung up on, if it left every region.
    fn drop_if_idle(&mut self, key: u64) {
        let Some(peer) = lock(&self.shared.service.attached).get(&key).cloned() else { return };
        if !peer.revoke_all() {
            return;
        }
        self.shared.poller.remove(&peer.pidfd);
        lock(&self.shared.service.attached).remove(&key);
        drop(peer);
        if self.accept_at.is_some() {
            // Its descriptors are free now.
            self.watch_listener(None);
        }
    }
}
