//! Starts the transports of an engine and keeps the reason of each that is not there.

use std::{
    net::{IpAddr, ToSocketAddrs},
    sync::Arc,
};

use tidewire_core::{TransferError, TransportKind};

use crate::{
    config::Config,
    control::listen::{self, PortChoice},
    memory::RegionTable,
    segment::own::Endpoints,
    transport::{
        Identity, Transport,
        local::LocalTransport,
        mooncake_tcp::{MooncakeTcp, MooncakeTcpOptions},
        shm::{SameHost, SameHostOptions},
        tcp::{TcpOptions, TcpTransport},
    },
};

/// Transports of an engine.
#[derive(Debug, Default)]
pub struct TransportSet {
    /// Those that were started.
    pub started: Vec<Arc<dyn Transport>>,
    /// Kinds that links may be made over; Mooncake's may be started for its port alone.
    pub offered: Vec<TransportKind>,
    /// The others, with the reason.
    pub unavailable: Vec<(TransportKind, String)>,
    /// Where peers reach them.
    pub endpoints: Endpoints,
    /// The presence on this host, which outlives its transports' shutdown.
    pub same_host: Option<Arc<SameHost>>,
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
    let mut set = TransportSet::default();
    set.endpoints.host = addresses.advertised.clone();
    given.into_iter().for_each(|transport| set.add(transport));
    set.add(LocalTransport::new(Arc::clone(regions)));
    set.start_same_host(config, identity, regions);
    if wanted(config, TransportKind::Tcp) {
        let options = tcp_options(config, resolve(&addresses.bind)?);
        let tcp = TcpTransport::start(options, Arc::clone(identity), Arc::clone(regions))?;
        set.endpoints.data_port = tcp.port();
        set.add(tcp);
    }
    set.start_mooncake(config, addresses, regions)?;
    for kind in TransportKind::ALL {
        if kind != TransportKind::Fake && !wanted(config, kind) {
            set.unavailable.push((kind, "not asked for (TIDEWIRE_TRANSPORTS)".to_owned()));
        }
    }
    let native = [TransportKind::Shm, TransportKind::Cma, TransportKind::Tcp];
    set.endpoints.transports =
        native.into_iter().filter(|kind| set.offered.contains(kind)).map(|kind| kind.name().to_owned()).collect();
    Ok(set)
}

impl TransportSet {
    fn add(&mut self, transport: Arc<dyn Transport>) {
        self.offered.push(transport.kind());
        self.started.push(transport);
    }

    fn start_same_host(&mut self, config: &Config, identity: &Arc<Identity>, regions: &Arc<RegionTable>) {
        let [shm, cma] = [TransportKind::Shm, TransportKind::Cma].map(|kind| wanted(config, kind));
        if !shm && !cma {
            return;
        }
        let options = SameHostOptions {
            allow_cma: cma,
            connect_timeout: config.tcp_connect_timeout,
            answer_timeout: config.tcp_heartbeat_timeout,
            ..SameHostOptions::default()
        };
        let host = match SameHost::start(Arc::clone(identity), Arc::clone(regions), options) {
            Ok(host) => host,
            Err(error) => {
                tracing::warn!(%error, "same-host transports are not available, peers on this host are reached over tcp");
                let kinds = [(shm, TransportKind::Shm), (cma, TransportKind::Cma)];
                let missing = kinds.into_iter().filter(|(wanted, _)| *wanted);
                self.unavailable.extend(missing.map(|(_, kind)| (kind, error.to_string())));
                return;
            }
        };
        host.socket_name().clone_into(&mut self.endpoints.local_socket);
        if shm {
            self.add(host.shm());
        }
        if cma {
            self.add(host.cma());
        }
        self.same_host = Some(host);
    }

    fn start_mooncake(
        &mut self,
        config: &Config,
        addresses: &Addresses,
        regions: &Arc<RegionTable>,
    ) -> Result<(), TransferError> {
        let offered = wanted(config, TransportKind::MooncakeTcp);
        if !offered && !config.mooncake_port {
            return Ok(());
        }
        let port = PortChoice::Range(config.port_min..=config.port_max);
        let listener = config.mooncake_port.then(|| listen::listen(&addresses.bind, &port)).transpose();
        let listener = listener.map_err(|error| TransferError::Setting {
            name: "TIDEWIRE_MOONCAKE_PORT".to_owned(),
            reason: error.chain(),
        })?;
        let options = MooncakeTcpOptions {
            lanes_per_peer: config.mooncake_lanes as usize,
            connect_timeout: config.tcp_connect_timeout,
            progress_timeout: config.mooncake_progress_timeout,
            force_v1: config.mooncake_proto == 1,
            ..MooncakeTcpOptions::default()
        };
        let transport = MooncakeTcp::start(options, Arc::clone(regions), listener)?;
        self.endpoints.mooncake_port = transport.data_address().map_or(0, |address| address.port());
        self.started.push(Arc::new(transport));
        if offered {
            self.offered.push(TransportKind::MooncakeTcp);
        }
        Ok(())
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
        hello_timeout: config.tcp_hello_timeout,
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
