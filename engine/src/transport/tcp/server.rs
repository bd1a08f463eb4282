//! Target side: the native port, its connections, their sessions.
//!
//! Invariants:
//! * of one stream of one session only the newest attempt has a live connection;
//! * after [`Server::evict`] returned, no connection holds a pin of that region.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use rustix::event::epoll::EventFlags;
use socket2::{SockRef, Socket};
use tidewire_core::native::hello::{Hello, Limits};

use super::{
    TcpOptions,
    reactor::{EventLoop, Next, Source, SourceKey},
    server_conn::ServerConn,
    socket,
};
use crate::{
    memory::{LocalRegion, RegionTable, lock},
    transport::Identity,
};

/// Entries a target takes in one frame.
pub(super) const MAX_ENTRIES: u32 = 512;
/// Payload bytes a target takes in one frame.
pub(super) const MAX_FRAME_BYTES: u32 = 16 << 20;
/// Unanswered frames a target takes on one connection.
pub(super) const MAX_OPEN_FRAMES: u32 = 64;

/// Connections beyond the limit that are kept long enough to be refused by name.
const SURPLUS: usize = 64;

/// Counters of the target side.
#[derive(Debug, Default)]
pub(super) struct ServerCounters {
    pub(super) refused: AtomicU64,
    pub(super) malformed: AtomicU64,
    pub(super) bytes_in: AtomicU64,
    pub(super) bytes_out: AtomicU64,
}

/// The newest attempt of each stream, by session and stream number.
type Sessions = HashMap<(u64, u16), (u32, Weak<ServerConn>)>;

/// The target side of the transport.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) identity: Arc<Identity>,
    pub(super) regions: Arc<RegionTable>,
    pub(super) options: Arc<TcpOptions>,
    pub(super) counters: ServerCounters,
    loops: Vec<Arc<EventLoop>>,
    next_loop: AtomicUsize,
    next_conn: AtomicU64,
    conns: Mutex<HashMap<u64, Arc<ServerConn>>>,
    sessions: Mutex<Sessions>,
    closing: AtomicBool,
}

impl Server {
    /// Listens and serves on `loops`; the port bound.
    pub(super) fn start(
        identity: Arc<Identity>,
        regions: Arc<RegionTable>,
        options: Arc<TcpOptions>,
        loops: Vec<Arc<EventLoop>>,
    ) -> io::Result<(Arc<Self>, u16)> {
        let (listener, port) = socket::listen(options.bind, options.ports)?;
        let server = Arc::new(Server {
            identity,
            regions,
            options,
            counters: ServerCounters::default(),
            loops,
            next_loop: AtomicUsize::new(0),
            next_conn: AtomicU64::new(0),
            conns: Mutex::new(HashMap::new()),
            sessions: Mutex::new(HashMap::new()),
            closing: AtomicBool::new(false),
        });
        if let Some(first) = server.loops.first() {
            let acceptor = Arc::new(Acceptor {
                listener: Socket::from(listener),
                server: Arc::downgrade(&server),
                event_loop: Arc::downgrade(first),
                key: OnceLock::new(),
                paused: AtomicBool::new(false),
            });
            let source = Arc::clone(&acceptor) as Arc<dyn Source>;
            let key = first.add(acceptor.listener.as_fd(), source, EventFlags::IN)?;
            let _ = acceptor.key.set(key);
        }
        Ok((server, port))
    }

    /// What this target accepts.
    pub(super) fn limits(&self) -> Limits {
        Limits {
            entries: MAX_ENTRIES,
            frame_bytes: MAX_FRAME_BYTES,
            open_frames: MAX_OPEN_FRAMES,
            heartbeat_ms: self.options.heartbeat_interval.as_millis() as u32,
        }
    }

    /// Whether new requests are refused.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Live connections.
    pub(super) fn connections(&self) -> usize {
        lock(&self.conns).len()
    }

    fn accept(self: &Arc<Self>, socket: OwnedFd, peer: SocketAddr) -> io::Result<()> {
        let connections = self.connections();
        if self.is_closing() || connections >= self.options.max_connections + SURPLUS {
            // No hello was read, so there is nothing to answer: the peer sees a closed connection.
            return Ok(());
        }
        let surplus = connections >= self.options.max_connections;
        socket::configure(&SockRef::from(&socket), &self.options)?;
        socket::tune_for_peer(&SockRef::from(&socket), peer.ip());
        let id = self.next_conn.fetch_add(1, Ordering::Relaxed);
        let index = self.next_loop.fetch_add(1, Ordering::Relaxed) % self.loops.len().max(1);
        let Some(event_loop) = self.loops.get(index) else { return Ok(()) };
        let conn = Arc::new(ServerConn::new(id, socket, peer, Arc::clone(self), Arc::clone(event_loop), surplus));
        lock(&self.conns).insert(id, Arc::clone(&conn));
        if let Err(error) = conn.watch() {
            self.forget(id);
            return Err(error);
        }
        // The hello has a deadline.
        event_loop.want_ticks();
        Ok(())
    }

    /// Ends the older attempts of this stream, so that nothing they sent is placed any more.
    pub(super) fn adopt(&self, hello: &Hello, conn: &Arc<ServerConn>) -> bool {
        let key = (hello.session, hello.stream);
        let older = {
            let mut sessions = lock(&self.sessions);
            match sessions.get(&key) {
                Some((attempt, _)) if *attempt >= hello.attempt => return false,
                _ => sessions.insert(key, (hello.attempt, Arc::downgrade(conn))),
            }
        };
        if let Some(older) = older.and_then(|(_, conn)| conn.upgrade()) {
            older.close("a newer connection of the same stream took over");
        }
        true
    }

    /// Drops a connection that ended.
    pub(super) fn forget(&self, id: u64) {
        let conn = lock(&self.conns).remove(&id);
        if let Some(session) = conn.as_ref().and_then(|c| c.session()) {
            let mut sessions = lock(&self.sessions);
            let own = |(_, held): &(u32, Weak<ServerConn>)| {
                conn.as_ref().is_some_and(|c| std::ptr::eq(held.as_ptr(), Arc::as_ptr(c)))
            };
            if sessions.get(&session).is_some_and(own) {
                sessions.remove(&session);
            }
        }
    }

    /// Closes every connection that is moving bytes of `region`.
    pub(super) fn evict(&self, region: &Arc<LocalRegion>) {
        let conns: Vec<Arc<ServerConn>> = lock(&self.conns).values().cloned().collect();
        for conn in conns {
            if conn.holds(region) {
                conn.close("the buffer was unregistered");
            }
        }
    }

    /// Refuses new connections and requests.
    pub(super) fn gate(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Waits until no connection is inside a request, at most until `deadline`.
    pub(super) fn drain(&self, deadline: Instant) {
        while Instant::now() < deadline {
            let conns: Vec<Arc<ServerConn>> = lock(&self.conns).values().cloned().collect();
            if !conns.iter().any(|c| c.is_busy()) {
                return;
            }
            std::thread::park_timeout(std::time::Duration::from_millis(5));
        }
    }

    /// Closes every connection.
    pub(super) fn close(&self) {
        let conns: Vec<Arc<ServerConn>> = lock(&self.conns).values().cloned().collect();
        for conn in conns {
            conn.close("shut down");
        }
    }
}

/// The listening socket.
struct Acceptor {
    listener: Socket,
    server: Weak<Server>,
    event_loop: Weak<EventLoop>,
    key: OnceLock<SourceKey>,
    /// Descriptors ran out: not watched until the next tick, for a listener stays ready.
    paused: AtomicBool,
}

impl Acceptor {
    fn watch(&self, interest: EventFlags) {
        if let (Some(event_loop), Some(key)) = (self.event_loop.upgrade(), self.key.get()) {
            // Failing that, the loop asks too often; nothing is lost.
            let _ = event_loop.modify(self.listener.as_fd(), *key, interest);
        }
    }
}

impl Source for Acceptor {
    fn ready(&self, _: EventFlags, _: Instant) -> Next {
        let Some(server) = self.server.upgrade() else { return Next::Remove };
        // Bounded, so that a flood of connections cannot starve the others.
        for _ in 0..64 {
            match self.listener.accept() {
                Ok((socket, address)) => {
                    let peer = address.as_socket().unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)));
                    if let Err(error) = server.accept(socket.into(), peer) {
                        tracing::warn!(%error, %peer, "connection dropped");
                    }
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if !self.paused.swap(true, Ordering::AcqRel) {
                        tracing::warn!(%error, "accept failed, new connections wait");
                    }
                    self.watch(EventFlags::empty());
                    return Next::Tick;
                }
            }
        }
        self.paused.store(false, Ordering::Release);
        Next::Keep
    }

    fn tick(&self, _: Instant) -> Next {
        if self.paused.load(Ordering::Acquire) {
            self.watch(EventFlags::IN);
        }
        Next::Keep
    }
}
