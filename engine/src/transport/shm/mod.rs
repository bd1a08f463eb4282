//! Same-host transports: `shm` copies through a mapping of the peer's memory, `cma` by the peer's addresses.
//!
//! A [`SameHost`] is one engine's presence on its host: an abstract Unix socket where peers on the same host attach, and
//! the connections to the peers it attached to. Both transports share it. To attach, an initiator shows the access token
//! and generation it read from the descriptor; the kernel vouches for its user. It gets a control page, then asks region
//! by region; memory that the engine allocated comes as a file to map.
//!
//! Nothing of the target takes part in a copy. What makes that safe for the owner is the control page: the initiator
//! counts itself in before it touches a region, so that unregistering can lock it out and wait for it. A process that is
//! stopped inside a copy through a mapping is cut off by replacing the file under the owner's addresses; one stopped
//! inside a copy by address cannot be, and the region then stays registered ([`TransferError::StillInUse`]).
//!
//! A peer that attached can map the whole file of an allocation of which one region was registered, and could ignore the
//! control page: it is a process of the same user with the segment's token, which could as well attach a debugger.
//!
//! Threads: `tw-local` (epoll: grants, revocations, deaths; asleep when nothing happens) and `tw-local-copy` (slices that
//! had to wait for a grant). All other copies run on the thread that submits.

mod answers;
mod asks;
mod attach;
mod client;
mod ending;
mod grants;
pub(super) mod link;
mod reactor;
mod service;
mod socket;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    fmt, fs, io,
    os::unix::fs::MetadataExt,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tidewire_core::TransferError;

use self::{
    client::Client,
    link::SameHostLink,
    reactor::{Reactor, Shared},
    service::Service,
};
use super::{Capabilities, Identity, Link, Peer, Transport, TransportKind};
use crate::memory::{ForeignAccess, LocalRegion, RegionTable, lock};

/// Longest slice: long enough that the cost per slice vanishes, short enough that a cancellation waits milliseconds.
const MAX_SLICE_BYTES: u64 = 16 << 20;

/// How long [`SameHost::stop`] waits for peers inside its regions.
const STOP_DRAIN: Duration = Duration::from_secs(1);

/// Settings of the same-host transports.
#[derive(Clone, Debug)]
pub struct SameHostOptions {
    /// How long attaching to a peer may take, and an attaching peer may take for its hello.
    pub connect_timeout: Duration,
    /// How long a peer may take to answer a question before the slices that wait for it fail.
    pub answer_timeout: Duration,
    /// Attached peers at most; further ones are hung up on.
    pub max_peers: usize,
    /// Regions of one peer that are kept mapped at most.
    pub max_mappings: usize,
    /// Slices of one link that wait for a grant at most; more stay with the caller.
    pub max_waiting: usize,
    /// Use `process_vm_readv` and `process_vm_writev` where the kernel allows.
    pub allow_cma: bool,
}

impl Default for SameHostOptions {
    fn default() -> Self {
        SameHostOptions {
            connect_timeout: Duration::from_secs(3),
            answer_timeout: Duration::from_secs(3),
            max_peers: 1024,
            max_mappings: 4096,
            max_waiting: 1024,
            allow_cma: true,
        }
    }
}

/// An engine's presence on its host.
pub struct SameHost {
    shared: Arc<Shared>,
    host_id: String,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl fmt::Debug for SameHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SameHost").field("socket", &self.shared.socket_name).finish_non_exhaustive()
    }
}

/// What must be equal for two processes to share memory: boot, network namespace (abstract sockets live there) and pid
/// namespace (`process_vm_readv` takes ids of it).
///
/// # Errors
/// [`TransferError::Os`] when `/proc` cannot be read.
pub fn host_id() -> Result<String, TransferError> {
    let inode = |path| fs::metadata(path).map(|m| m.ino()).map_err(|e| TransferError::os("stat of a namespace", &e));
    let boot =
        fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(|e| TransferError::os("read boot id", &e))?;
    Ok(format!("{}:{:x}:{:x}", boot.trim(), inode("/proc/self/ns/net")?, inode("/proc/self/ns/pid")?))
}

impl SameHost {
    /// Listens on a random abstract socket and starts the threads.
    ///
    /// # Errors
    /// [`TransferError::Unavailable`] naming what this host lacks.
    pub fn start(
        identity: Arc<Identity>,
        regions: Arc<RegionTable>,
        options: SameHostOptions,
    ) -> Result<Arc<Self>, TransferError> {
        let unavailable = |what: &str| {
            let what = what.to_owned();
            move |e: io::Error| TransferError::Unavailable { what, reason: e.to_string() }
        };
        let host_id = host_id()?;
        let mut random = [0u8; 16];
        getrandom::fill(&mut random)
            .map_err(|e| TransferError::Unavailable { what: "random numbers".to_owned(), reason: e.to_string() })?;
        let socket_name = format!("tidewire-{:032x}", u128::from_ne_bytes(random));
        let listener = socket::listen_on(&socket_name).map_err(unavailable("abstract unix socket"))?;
        let service = Arc::new(Service {
            identity,
            regions,
            attached: Mutex::new(HashMap::new()),
            fences: AtomicU64::new(0),
            gated: AtomicBool::new(false),
        });
        let (jobs, queue) = mpsc::channel();
        let shared = Shared::new(service, socket_name, options, jobs).map_err(unavailable("epoll"))?;
        let shared = Arc::new(shared);
        let foreign: Weak<dyn ForeignAccess> = Arc::<Service>::downgrade(&shared.service);
        shared.service.regions.add_foreign_access(foreign);
        let reactor = Reactor::new(Arc::clone(&shared), listener).map_err(unavailable("epoll"))?;
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(unavailable("thread"))
        };
        let host = Arc::new(SameHost { shared, host_id, threads: Mutex::default() });
        lock(&host.threads).push(spawn("tw-local", Box::new(move || reactor.run()))?);
        lock(&host.threads).push(spawn("tw-local-copy", Box::new(move || client::copy_loop(&queue)))?);
        Ok(host)
    }

    /// Name of the abstract socket, without the leading NUL; for the descriptor.
    pub fn socket_name(&self) -> &str {
        &self.shared.socket_name
    }

    /// Identity of this host; for the descriptor.
    pub fn host_id(&self) -> &str {
        &self.host_id
    }

    /// The transport that maps what it can, and copies the rest by address where the kernel allows.
    pub fn shm(self: &Arc<Self>) -> Arc<dyn Transport> {
        Arc::new(SameHostTransport { host: Arc::clone(self), kind: TransportKind::Shm })
    }

    /// The transport that copies everything by address.
    pub fn cma(self: &Arc<Self>) -> Arc<dyn Transport> {
        Arc::new(SameHostTransport { host: Arc::clone(self), kind: TransportKind::Cma })
    }

    /// Peers attached to this engine's memory.
    pub fn attached_peers(&self) -> usize {
        lock(&self.shared.service.attached).len()
    }

    /// How often a peer had to be cut off because it did not leave a region in time.
    pub fn fences(&self) -> u64 {
        self.shared.service.fences.load(Ordering::Relaxed)
    }

    /// Closes the links, takes all grants back, hangs up on the peers and ends the threads. Waits at most a second for peers
    /// that are inside a region; [`Transport::shutdown`] before it waits as long as it is told.
    pub fn stop(&self) {
        self.shared.service.shut(Instant::now() + STOP_DRAIN);
        for client in self.shared.clients() {
            client.close();
        }
        self.shared.stop();
        for thread in lock(&self.threads).drain(..) {
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a same-host thread panicked");
            }
        }
    }
}

impl Drop for SameHost {
    fn drop(&mut self) {
        self.stop();
    }
}

/// One of the two transports of a [`SameHost`].
#[derive(Debug)]
struct SameHostTransport {
    host: Arc<SameHost>,
    kind: TransportKind,
}

impl Transport for SameHostTransport {
    fn kind(&self) -> TransportKind {
        self.kind
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { max_slice_bytes: MAX_SLICE_BYTES, synchronous: false, target_checks_range: true }
    }

    fn connect(&self, peer: Arc<Peer>) -> Result<Arc<dyn Link>, TransferError> {
        let deadline = Instant::now() + self.host.shared.options.connect_timeout;
        let client = Client::attach(&self.host.shared, peer, self.kind, &self.host.host_id, deadline)?;
        Ok(Arc::new(SameHostLink::new(client)))
    }

    fn evict(&self, region: &Arc<LocalRegion>, drain: Duration) -> Result<(), String> {
        self.host.shared.service.evict(region, drain)
    }

    fn shutdown(&self, drain: Duration) {
        self.host.shared.service.shut(Instant::now() + drain);
        for client in self.host.shared.clients() {
            if client.kind() == self.kind {
                client.close();
            }
        }
    }
}
