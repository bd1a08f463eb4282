//! Assembles an engine: control thread, store, control listener, transports, own segment.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::Duration,
};

use tidewire_core::{
    Generation, TransferError, TransportKind,
    mooncake::{
        host::{self, HostPort},
        keys::KeySpace,
    },
};

use super::{
    engine::{EngineInner, TransferEngine},
    inbox::Inbox,
    table::BatchTable,
    ticker::Ticker,
    transports::{self, Addresses},
};
use crate::{
    config::Config,
    control::{
        ClientTimeouts, ControlClient, ControlError, ControlHandler, ControlServer, ServerConfig, listen::PortChoice,
    },
    memory::RegionTable,
    metadata::{self, MetadataStore, StoreOptions, StoreUri, p2p::P2pStore, uri},
    observe::Counters,
    runtime::{ctl::Ctl, descriptors},
    segment::{
        connect::Connector,
        discovery::{Discovery, Resolved},
        own::OwnSegment,
        publish::Publisher,
        table::SegmentTable,
        watch,
    },
    transport::{Identity, Transport, shm},
};

/// What a store may take beyond its own limit before it is given up from outside.
const STORE_SLACK: Duration = Duration::from_millis(500);

/// Builds a [`TransferEngine`].
///
/// The local name is `host`, `host:port`, or with a metadata store any text. With `P2PHANDSHAKE` the segment is called
/// `host:` and the control port, which is drawn; a port in the name means nothing, as with Mooncake. With a store the
/// segment is called by the local name. The host part is the address that listeners bind, unless
/// `TIDEWIRE_BIND_ADDRESS` says another.
#[derive(Debug)]
pub struct EngineBuilder {
    local_name: String,
    config: Config,
    store: Option<Arc<dyn MetadataStore>>,
    given: Vec<Arc<dyn Transport>>,
}

impl EngineBuilder {
    pub(crate) fn new(local_name: String) -> Self {
        EngineBuilder { local_name, config: Config::from_env(), store: None, given: Vec::new() }
    }

    /// Replaces all settings. The default is [`Config::from_env`]; call this before the methods for single settings.
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// Connection string of the metadata store: `P2PHANDSHAKE` (the default), `etcd://…`, `http://…`, `memory://…`.
    pub fn metadata(mut self, uri: impl Into<String>) -> Self {
        self.config.metadata = uri.into();
        self
    }

    /// Restricts the transports; an empty list means all. [`TransportKind::Local`] is always there.
    pub fn transports(mut self, kinds: &[TransportKind]) -> Self {
        self.config.transports = kinds.to_vec();
        self
    }

    /// Opens the port for official Mooncake peers. Off by default: that protocol has no access control.
    pub fn mooncake_port(mut self, open: bool) -> Self {
        self.config.mooncake_port = open;
        self
    }

    /// Uses a store of the caller's instead of the one that the connection string names.
    pub fn store(mut self, store: Arc<dyn MetadataStore>) -> Self {
        self.store = Some(store);
        self
    }

    /// Adds a transport of the caller's.
    pub fn transport(mut self, transport: Arc<dyn Transport>) -> Self {
        self.given.push(transport);
        self
    }

    /// Builds the engine. Blocks for the connect timeout of the store; must not be called inside an asynchronous task.
    ///
    /// # Errors
    /// [`TransferError::Setting`] for a name that cannot be bound or is taken, [`TransferError::Metadata`] for a store
    /// that does not answer, [`TransferError::Os`] for threads and sockets.
    pub fn build(self) -> Result<TransferEngine, TransferError> {
        let config = self.config;
        if config.raise_fd_limit {
            descriptors::raise_limit();
        }
        let ctl = Arc::new(Ctl::start()?);
        let counters = Arc::new(Counters::default());
        let discovery = Arc::new(open_store(&config, &ctl, self.store)?);
        let addresses = Addresses::of(&self.local_name, &config);
        let regions = Arc::new(RegionTable::default());

        // The control port is part of the name, so its listener comes first; until the segment is open it answers "null".
        let door = Arc::new(Door::default());
        let control = listen(&config, &addresses, &ctl, door.clone())?;
        let control_address = HostPort::new(&addresses.advertised, control.address().port());
        let segment = if discovery.p2p { control_address.to_string() } else { self.local_name };
        let identity = Arc::new(identity(segment)?);
        let own = Arc::new(OwnSegment::new(Arc::clone(&identity), control_address, Arc::clone(&regions)));
        let limit = config.max_notifications as usize;
        let inbox = Arc::new(Inbox::new(Arc::clone(&own), discovery.p2p, limit, Arc::clone(&counters)));
        door.open(Arc::clone(&inbox));

        let set = transports::start(&config, &addresses, &identity, &regions, self.given)?;
        own.open(set.endpoints);
        let publisher =
            Publisher::new(Arc::clone(&own), Arc::clone(&discovery), Arc::clone(&ctl), Arc::clone(&counters));
        let connector = Arc::new(Connector {
            identity,
            transports: set.started,
            offered: set.offered,
            discovery: Arc::clone(&discovery),
            ctl: Arc::clone(&ctl),
            counters: Arc::clone(&counters),
        });
        let descriptor = own.current().unwrap_or_default();
        let resolved = Resolved::new(&own.identity().segment, own.control.clone(), descriptor);
        let segments = Arc::new(SegmentTable::new(resolved));
        let batches = Arc::new(BatchTable::default());
        let inner = EngineInner {
            ticker: Ticker::start(Arc::clone(&batches))?,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            config,
            own,
            regions,
            connector,
            unavailable: set.unavailable,
            same_host: set.same_host,
            ctl,
            discovery,
            publisher,
            segments,
            batches,
            inbox,
            counters,
            control: Mutex::new(Some(control)),
            gate: AtomicBool::new(false),
        };
        let engine = TransferEngine::from_inner(Arc::new(inner));
        announce(engine.inner())?;
        Ok(engine)
    }
}

/// Publishes the segment and follows the store.
fn announce(inner: &Arc<EngineInner>) -> Result<(), TransferError> {
    let (publisher, take_over) = (Arc::clone(&inner.publisher), inner.config.take_over);
    let limit = inner.store_limit() + inner.config.control_connect_timeout + inner.config.control_timeout;
    let announced = inner.ctl.run(limit, async move { publisher.announce(take_over).await });
    announced.unwrap_or_else(|error| {
        let store = inner.discovery.store.describe();
        Err(TransferError::Metadata { store, reason: error.to_string() })
    })?;
    let segment = inner.own.identity().segment.as_str();
    tracing::info!(segment, store = inner.discovery.store.describe(), "engine is up");
    inner.ctl.spawn(watch::follow(Arc::clone(&inner.discovery), Arc::downgrade(&inner.segments)));
    Ok(())
}

fn open_store(config: &Config, ctl: &Ctl, given: Option<Arc<dyn MetadataStore>>) -> Result<Discovery, TransferError> {
    let keys = KeySpace::new(&config.cluster_id);
    let timeouts = ClientTimeouts { connect: config.control_connect_timeout, reply: config.control_timeout };
    let client = ControlClient { timeouts, ..ControlClient::default() };
    let failed =
        |store: String, error: &dyn std::fmt::Display| TransferError::Metadata { store, reason: error.to_string() };
    if let Some(store) = given {
        return Ok(Discovery {
            store,
            p2p: false,
            newline: false,
            keys,
            client,
            timeout: config.store_timeout + STORE_SLACK,
        });
    }
    let uri = uri::parse(&config.metadata).map_err(|error| failed("connection string".to_owned(), &error))?;
    if uri == StoreUri::P2p {
        let store = Arc::new(P2pStore::new(client.clone(), keys.clone()));
        // A peer that is asked needs as long as a control call.
        let timeout = config.control_connect_timeout + config.control_timeout;
        return Ok(Discovery { store, p2p: true, newline: false, keys, client, timeout });
    }
    let newline = matches!(uri, StoreUri::Etcd(_));
    let options = store_options(config);
    let limit = config.store_connect_timeout + config.store_timeout + Duration::from_secs(1);
    // Its text has no password.
    let name = uri.to_string();
    let opened = ctl.run(limit, async move { metadata::open(&uri, &options).await });
    let opened = opened.map_err(|error| failed(name.clone(), &error))?;
    let store = opened.map_err(|error| failed(name, &error))?;
    Ok(Discovery { store, p2p: false, newline, keys, client, timeout: config.store_timeout + STORE_SLACK })
}

fn store_options(config: &Config) -> StoreOptions {
    let set = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    StoreOptions {
        lease_ttl: config.lease_ttl,
        connect_timeout: config.store_connect_timeout,
        request_timeout: config.store_timeout,
        etcd_user: set(&config.etcd_user),
        etcd_password: set(&config.etcd_password),
        tls_ca: set(&config.etcd_tls_ca).map(PathBuf::from),
        tls_cert: set(&config.etcd_tls_cert).map(PathBuf::from),
        tls_key: set(&config.etcd_tls_key).map(PathBuf::from),
        ..StoreOptions::default()
    }
}

impl Addresses {
    fn of(local_name: &str, config: &Config) -> Self {
        let named = host::split(local_name).0;
        let wildcard = |address: &str| matches!(host::unbracket(address), "0.0.0.0" | "::");
        let bind = if config.bind_address.is_empty() { named } else { &config.bind_address };
        let advertised = match (config.advertise_address.is_empty(), wildcard(bind)) {
            (false, _) => &config.advertise_address,
            (true, false) => bind,
            (true, true) => named,
        };
        Addresses { bind: host::unbracket(bind).to_owned(), advertised: host::unbracket(advertised).to_owned() }
    }
}

fn listen(
    config: &Config,
    addresses: &Addresses,
    ctl: &Ctl,
    handler: Arc<dyn ControlHandler>,
) -> Result<ControlServer, TransferError> {
    let port = match config.control_port {
        0 => PortChoice::Range(config.port_min..=config.port_max),
        port => PortChoice::Fixed(port),
    };
    let server = ServerConfig {
        host: addresses.bind.clone(),
        port,
        max_request_bytes: config.control_max_len_bytes,
        ..ServerConfig::default()
    };
    ControlServer::start(server, handler, ctl.handle()).map_err(|error| {
        let name = match &error {
            ControlError::Listen { source, .. } if source.kind() == std::io::ErrorKind::AddrInUse => {
                "TIDEWIRE_CONTROL_PORT"
            }
            _ => "TIDEWIRE_BIND_ADDRESS",
        };
        TransferError::Setting { name: name.to_owned(), reason: error.chain() }
    })
}

fn identity(segment: String) -> Result<Identity, TransferError> {
    let failed = |error: getrandom::Error| TransferError::Os {
        call: "getrandom",
        errno: error.raw_os_error().unwrap_or(0),
        reason: error.to_string(),
    };
    let mut token = [0; 16];
    getrandom::fill(&mut token).map_err(failed)?;
    let generation = Generation(getrandom::u64().map_err(failed)?.max(1));
    let host_id = shm::host_id().unwrap_or_else(|error| {
        tracing::warn!(%error, "host has no identity, peers on it are reached over tcp");
        String::new()
    });
    Ok(Identity { segment, generation, token, host_id })
}

/// Answers the control port before and after the inbox exists.
#[derive(Debug, Default)]
struct Door {
    inbox: std::sync::OnceLock<Arc<Inbox>>,
}

impl Door {
    fn open(&self, inbox: Arc<Inbox>) {
        // Called once; a second inbox would be dropped.
        let _ = self.inbox.set(inbox);
    }
}

impl ControlHandler for Door {
    fn metadata(&self, request: &[u8]) -> Vec<u8> {
        self.inbox.get().map_or_else(|| b"null".to_vec(), |inbox| inbox.metadata(request))
    }

    fn notify(&self, name: String, message: String) -> Result<(), crate::control::NotifyRefused> {
        match self.inbox.get() {
            Some(inbox) => ControlHandler::notify(inbox.as_ref(), name, message),
            None => Err(crate::control::NotifyRefused::ShuttingDown),
        }
    }

    fn probe(&self) -> bool {
        self.inbox.get().is_some_and(|inbox| inbox.probe())
    }
}
