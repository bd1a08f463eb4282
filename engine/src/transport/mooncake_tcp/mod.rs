//! TCP in Mooncake's own protocol, so that an official peer can be either end. See `docs/mooncake-wire.md`.
//!
//! Two loops: `tw-mooncake-out` owns the connections to targets, `tw-mooncake-in` the data port and the connections from
//! initiators. The second exists only while a data port is asked for: the protocol has no access control, whoever reaches
//! the port can read and write every registered buffer.
//!
//! Invariants:
//! * registered memory is touched only by these two threads, inside a system call of a connection that is open;
//! * a write is done when the target said so after placing the last byte, also in version 1.

mod dial;
mod inbound;
mod lane;
mod link;
mod poller;
mod replies;
mod request;
mod target;
#[cfg(test)]
mod tests;
mod worker;

use std::{
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tidewire_core::{TransferError, mooncake::host::HostPort};

use self::{
    link::{LinkShared, MooncakeLink, unreachable},
    poller::Mailbox,
    target::Target,
    worker::{Command, Worker},
};
use super::{Capabilities, Link, Peer, Transport, TransportKind};
use crate::memory::{LocalRegion, RegionTable, lock};

pub use self::target::TargetStats;

/// Settings of the transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MooncakeTcpOptions {
    /// Connections to one peer, at most.
    pub lanes_per_peer: usize,
    /// Longest slice in bytes; longer requests are cut.
    pub max_slice_bytes: u64,
    /// Slices a link takes before it leaves the rest with the caller.
    pub max_open_slices: usize,
    /// For one connection.
    pub connect_timeout: Duration,
    /// Longest time without a byte moving while one is owed.
    pub progress_timeout: Duration,
    /// Speak version 1 to every target.
    pub force_v1: bool,
    /// Connections from initiators, at most; beyond, the longest idle one is closed.
    pub max_inbound: usize,
}

impl Default for MooncakeTcpOptions {
    fn default() -> Self {
        MooncakeTcpOptions {
            lanes_per_peer: 4,
            max_slice_bytes: 4 << 20,
            max_open_slices: 1 << 16,
            connect_timeout: Duration::from_secs(5),
            progress_timeout: Duration::from_secs(30),
            force_v1: false,
            max_inbound: 8192,
        }
    }
}

/// The transport: links to official targets, and the data port for official initiators.
#[derive(Debug)]
pub struct MooncakeTcp {
    options: MooncakeTcpOptions,
    outgoing: Mutex<Outgoing>,
    target: Option<Target>,
    next_link: AtomicU64,
}

#[derive(Debug)]
enum Outgoing {
    NotStarted,
    Running(Arc<Mailbox<Command>>, JoinHandle<()>),
    Stopped,
}

impl MooncakeTcp {
    /// Makes the transport. With a `data_port` (a non-blocking listener, as [`crate::control::listen::listen`] makes it) it
    /// serves the buffers of `regions` to whoever connects there; without, it only opens links.
    ///
    /// # Errors
    /// [`TransferError::Os`] if the loop of the data port cannot be started.
    pub fn start(
        options: MooncakeTcpOptions,
        regions: Arc<RegionTable>,
        data_port: Option<TcpListener>,
    ) -> Result<Self, TransferError> {
        let target = data_port
            .map(|listener| Target::start(listener, regions, &options))
            .transpose()
            .map_err(|error| TransferError::os("start of tw-mooncake-in", &error))?;
        let (outgoing, next_link) = (Mutex::new(Outgoing::NotStarted), AtomicU64::new(0));
        Ok(MooncakeTcp { options, outgoing, target, next_link })
    }

    /// Where the data port listens; `None` without one.
    pub fn data_address(&self) -> Option<SocketAddr> {
        self.target.as_ref().map(Target::address)
    }

    /// What the data port has served so far.
    pub fn target_stats(&self) -> TargetStats {
        self.target.as_ref().map(Target::stats).unwrap_or_default()
    }

    fn mailbox(&self) -> Result<Arc<Mailbox<Command>>, TransferError> {
        let mut outgoing = lock(&self.outgoing);
        if matches!(*outgoing, Outgoing::NotStarted) {
            let (mailbox, thread) = Worker::spawn(self.options.clone())
                .map_err(|error| TransferError::os("start of tw-mooncake-out", &error))?;
            *outgoing = Outgoing::Running(mailbox, thread);
        }
        match &*outgoing {
            Outgoing::Running(mailbox, _) => Ok(Arc::clone(mailbox)),
            _ => Err(TransferError::ShutDown),
        }
    }
}

/// Where a peer takes data connections; `None` if it has no data port.
fn data_address(peer: &Peer) -> Option<HostPort> {
    let descriptor = &peer.descriptor;
    if !descriptor.speaks("tcp") || descriptor.tcp_data_port == 0 {
        return None;
    }
    let host = match descriptor.tcp_data_host.as_str() {
        "" => HostPort::parse(&peer.address).host,
        host => host.to_owned(),
    };
    Some(HostPort::new(&host, descriptor.tcp_data_port))
}

impl Transport for MooncakeTcp {
    fn kind(&self) -> TransportKind {
        TransportKind::MooncakeTcp
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { max_slice_bytes: self.options.max_slice_bytes, synchronous: false, target_checks_range: true }
    }

    fn connect(&self, peer: Arc<Peer>) -> Result<Arc<dyn Link>, TransferError> {
        let address = data_address(&peer).ok_or_else(|| TransferError::Unavailable {
            what: format!("mooncake data port of {}", peer.segment),
            reason: format!("it publishes protocol {} and no port", peer.descriptor.protocol),
        })?;
        let mailbox = self.mailbox()?;
        let dialled = dial::finish(&address, self.options.connect_timeout);
        let (socket, address) = dialled.map_err(|error| unreachable(&peer, &format!("{address}: {error}")))?;
        let acknowledged = peer.descriptor.tcp_proto_version >= 2 && !self.options.force_v1;
        let key = self.next_link.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(peer = %address, segment = %peer.segment, acknowledged, "mooncake link");
        let shared = Arc::new(LinkShared::new(key, address, acknowledged, peer));
        mailbox.put(Command::Add { link: Arc::clone(&shared), socket }).map_err(|_| TransferError::ShutDown)?;
        Ok(Arc::new(MooncakeLink { shared, mailbox, max_open_slices: self.options.max_open_slices }))
    }

    fn evict(&self, region: &Arc<LocalRegion>, drain: Duration) -> Result<(), String> {
        self.target.as_ref().map_or(Ok(()), |target| target.evict(region, drain))
    }

    fn shutdown(&self, drain: Duration) {
        let deadline = Instant::now() + drain;
        let outgoing = std::mem::replace(&mut *lock(&self.outgoing), Outgoing::Stopped);
        if let Some(target) = &self.target {
            target.stop(deadline);
        }
        if let Outgoing::Running(mailbox, thread) = outgoing {
            // A loop that has ended already settled everything.
            let _ = mailbox.put(Command::Stop { deadline });
            if thread.join().is_err() {
                tracing::error!("loop of mooncake connections panicked");
            }
        }
        if let Some(target) = &self.target {
            target.join();
        }
    }
}

impl Drop for MooncakeTcp {
    fn drop(&mut self) {
        self.shutdown(Duration::ZERO);
    }
}
