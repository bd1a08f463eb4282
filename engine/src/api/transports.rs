//! Starts the transports of an engine and keeps the reason of each that is not there.

use std::{net::IpAddr, net::ToSocketAddrs, sync::Arc};

use tidewire_core::{TransferError, TransportKind};

use crate::{
    config::Config,
    memory::RegionTable,
    segment::own::Endpoints,
    transport::{
        Identity, Transport,
        tcp::{TcpOptions, TcpTransport},
    },
};

/// Transports of an engine.
#[derive(Debug, Default)]
pub struct TransportSet {
    /// Those that were started.
    pub started: Vec<Arc<dyn Transport>>,
    /// The others, with the reason.
    pub unavailable: Vec<(TransportKind, String)>,
    /// Where peers reach them.
    pub endpoints: Endpoints,
}

/// Where listeners are and what peers are told.
#[derive(Debug)]
pub struct Addresses {
    /// Host that listeners bind.
    pub bind: String,
    /// Host that peers are told.
    pub advertised: String,
}

/// Starts what `config` asks for, besides the transports `given` by the caller.
///
/// # Errors
/// Of a listener that cannot be opened. A same-host transport that this host does not allow is no error.
pub fn start(
    config: &Config,
    addresses: &Addresses,
    identity: &Arc<Identity>,
    regions: &Arc<RegionTable>,
    given: Vec<Arc<dyn Transport>>,
) -> Result<TransportSet, TransferError> {
    let mut set = TransportSet { started: given, ..TransportSet::default() };
    set.endpoints.host = addresses.advertised.clone();
    if wanted(config, TransportKind::Tcp) {
        let options = tcp_options(config, resolve(&addresses.bind)?);
        let tcp = TcpTransport::start(options, Arc::clone(identity), Arc::clone(regions))?;
        set.endpoints.data_port = tcp.port();
        set.started.push(tcp);
    }
    for kind in TransportKind::ALL {
        if kind != TransportKind::Fake && !set.has(kind) {
            let reason = if wanted(config, kind) { "not in this build" } else { "not asked for (TIDEWIRE_TRANSPORTS)" };
            set.unavailable.push((kind, reason.to_owned()));
        }
    }
    let offered = [TransportKind::Shm, TransportKind::Cma, TransportKind::Tcp];
    set.endpoints.transports =
        offered.into_iter().filter(|kind| set.has(*kind)).map(|kind| kind.name().to_owned()).collect();
    Ok(set)
}

impl TransportSet {
    fn has(&self, kind: TransportKind) -> bool {
        self.started.iter().any(|transport| transport.kind() == kind)
    }
}

/// Whether the settings ask for `kind`. The own segment is always served.
fn wanted(config: &Config, kind: TransportKind) -> bool {
    kind == TransportKind::Local || config.transports.is_empty() || config.transports.contains(&kind)
}

fn tcp_options(config: &Config, bind: IpAddr) -> TcpOptions {
    let mut options = TcpOptions {
        bind,
        ports: (config.tcp_port, config.tcp_port),
        window_bytes: config.tcp_window_bytes,
        frame_bytes: config.tcp_frame_bytes,
        checksum: config.tcp_crc,
        socket_buffer_bytes: config.tcp_socket_buffer_bytes as usize,
        connect_timeout: config.tcp_connect_timeout,
        heartbeat_interval: config.tcp_heartbeat_interval,
        heartbeat_timeout: config.tcp_heartbeat_timeout,
        loop_spin: config.tcp_loop_spin,
        max_connections: config.tcp_max_connections as usize,
        max_queued_slices: config.max_queued_slices as usize,
        ..TcpOptions::default()
    };
    if config.tcp_threads != 0 {
        options.threads = config.tcp_threads as usize;
    }
    if config.tcp_streams != 0 {
        options.streams = config.tcp_streams as usize;
    }
    options
}

/// The first address of a host.
fn resolve(host: &str) -> Result<IpAddr, TransferError> {
    let failed = |reason: String| TransferError::Setting { name: "TIDEWIRE_BIND_ADDRESS".to_owned(), reason };
    let mut found = (host, 0).to_socket_addrs().map_err(|error| failed(format!("{host}: {error}")))?;
    found.next().map(|address| address.ip()).ok_or_else(|| failed(format!("{host} has no address")))
}
