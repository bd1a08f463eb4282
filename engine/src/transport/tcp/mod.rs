//! TCP transport, native protocol (`docs/PROTOCOL.md`).
//!
//! A [`TcpTransport`] owns the event loops `tw-tcp-<n>`, the target side (`server`) and makes one `link` per peer. A
//! waiting caller drives its link itself; the loops serve the target side and the links nobody waits on.

mod deal;
mod inbound;
mod lead;
mod link;
mod outbound;
mod reactor;
mod server;
mod server_conn;
mod socket;
mod stream;
#[cfg(test)]
mod tests;

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex, Weak},
    time::{Duration, Instant},
};

use tidewire_core::TransferError;

use self::{link::TcpLink, reactor::EventLoop, server::Server};
use super::{Capabilities, Identity, Link, Peer, Transport, TransportKind};
use crate::memory::{LocalRegion, RegionTable, lock};

/// Settings of the TCP transport.
#[derive(Clone, Debug)]
pub struct TcpOptions {
    /// Address the native port listens on; nothing listens anywhere else.
    pub bind: IpAddr,
    /// First and last port to try; (0, 0) lets the system choose.
    pub ports: (u16, u16),
    /// Event loops of the target side.
    pub threads: usize,
    /// Connections per peer.
    pub streams: usize,
    /// Payload bytes sent or asked for and not answered, per stream.
    pub window_bytes: u64,
    /// Payload bytes per frame this side makes, and the longest slice; at most 16 MiB.
    pub frame_bytes: u32,
    /// Whether to ask for payload checksums.
    pub checksum: bool,
    /// Send and receive buffer of each socket; 0 leaves it to the system.
    pub socket_buffer_bytes: usize,
    /// Limit for making a connection, handshake included.
    pub connect_timeout: Duration,
    /// How long the target side waits for a hello.
    pub hello_timeout: Duration,
    /// Silence after which a peer is asked for a sign of life.
    pub heartbeat_interval: Duration,
    /// Silence after which a peer is given up.
    pub heartbeat_timeout: Duration,
    /// How long an event loop polls after work before it sleeps.
    pub loop_spin: Duration,
    /// Connections the target side accepts.
    pub max_connections: usize,
    /// Slices queued per peer before `submit` pushes back.
    pub max_queued_slices: usize,
}

impl Default for TcpOptions {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        TcpOptions {
            bind: IpAddr::V4(Ipv4Addr::LOCALHOST),
            ports: (0, 0),
            threads: (cores / 2).clamp(1, 4),
            streams: cores.clamp(1, 4),
            window_bytes: 8 << 20,
            frame_bytes: 1 << 20,
            checksum: false,
            socket_buffer_bytes: 0,
            connect_timeout: Duration::from_secs(3),
            hello_timeout: Duration::from_secs(5),
            heartbeat_interval: Duration::from_secs(1),
            heartbeat_timeout: Duration::from_secs(3),
            loop_spin: Duration::from_micros(20),
            max_connections: 8192,
            max_queued_slices: 1 << 20,
        }
    }
}

/// Counters of the target side, for status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpTargetStatus {
    /// Live connections.
    pub connections: usize,
    /// Handshakes refused.
    pub refused: u64,
    /// Connections closed for malformed frames.
    pub malformed: u64,
    /// Payload bytes received from writers.
    pub bytes_in: u64,
    /// Payload bytes sent to readers.
    pub bytes_out: u64,
}

/// The TCP transport of one engine.
#[derive(Debug)]
pub struct TcpTransport {
    options: Arc<TcpOptions>,
    loops: Vec<Arc<EventLoop>>,
    server: Arc<Server>,
    port: u16,
    links: Mutex<Vec<Weak<TcpLink>>>,
}

impl TcpTransport {
    /// Starts the event loops and the native port.
    ///
    /// # Errors
    /// [`TransferError::Os`] if the port cannot be bound or a thread cannot be started.
    pub fn start(
        options: TcpOptions,
        identity: Arc<Identity>,
        regions: Arc<RegionTable>,
    ) -> Result<Arc<Self>, TransferError> {
        let options = Arc::new(options);
        let mut loops = Vec::new();
        let started = start_loops(&options, &mut loops).and_then(|()| {
            Server::start(identity, regions, Arc::clone(&options), loops.clone())
                .map_err(|e| TransferError::os("listening on the native tcp port", &e))
        });
        let (server, port) = started.inspect_err(|_| loops.iter().for_each(|l| l.stop()))?;
        Ok(Arc::new(TcpTransport { options, loops, server, port, links: Mutex::new(Vec::new()) }))
    }

    /// The native port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What the target side has seen.
    pub fn target_status(&self) -> TcpTargetStatus {
        use std::sync::atomic::Ordering::Relaxed;
        let counters = &self.server.counters;
        TcpTargetStatus {
            connections: self.server.connections(),
            refused: counters.refused.load(Relaxed),
            malformed: counters.malformed.load(Relaxed),
            bytes_in: counters.bytes_in.load(Relaxed),
            bytes_out: counters.bytes_out.load(Relaxed),
        }
    }
}

fn start_loops(options: &TcpOptions, loops: &mut Vec<Arc<EventLoop>>) -> Result<(), TransferError> {
    for index in 0..options.threads.max(1) {
        let event_loop = EventLoop::start(format!("tw-tcp-{index}"), options.loop_spin)
            .map_err(|e| TransferError::os("starting a tcp event loop", &e))?;
        loops.push(event_loop);
    }
    Ok(())
}

impl Transport for TcpTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            max_slice_bytes: u64::from(self.options.frame_bytes),
            synchronous: false,
            target_checks_range: true,
        }
    }

    fn connect(&self, peer: Arc<Peer>) -> Result<Arc<dyn Link>, TransferError> {
        let link = TcpLink::connect(peer, Arc::clone(&self.options), &self.loops)?;
        let mut links = lock(&self.links);
        links.retain(|l| l.strong_count() > 0);
        links.push(Arc::downgrade(&link));
        Ok(link)
    }

    fn evict(&self, region: &Arc<LocalRegion>, _: Duration) -> Result<(), String> {
        self.server.evict(region);
        Ok(())
    }

    fn shutdown(&self, drain: Duration) {
        self.server.gate();
        self.server.drain(Instant::now() + drain);
        let links: Vec<Arc<TcpLink>> = lock(&self.links).drain(..).filter_map(|l| l.upgrade()).collect();
        for link in links {
            link.close();
        }
        self.server.close();
        for event_loop in &self.loops {
            event_loop.stop();
        }
        // One more time for what was accepted meanwhile.
        self.server.close();
    }
}

impl Drop for TcpTransport {
    fn drop(&mut self) {
        self.shutdown(Duration::ZERO);
    }
}
