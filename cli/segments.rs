//! `tidewire segments`: who is registered, since when alive, and whether they answer.
//!
//! Asks the metadata store and then each segment's control port; it registers nothing itself.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Args;
use serde::Serialize;
use tidewire_core::mooncake::{descriptor::SegmentDescriptor, host::HostPort, keys::KeySpace, rpc_meta::RpcMeta};
use tidewire_engine::{
    config::Config,
    control::{ClientTimeouts, ControlClient},
    metadata::{self, Entry, MetadataStore, StoreError, StoreOptions, StoreUri, p2p::P2pStore, uri},
};

use crate::{error::CliError, table::Table, units::binary_size};

/// Longest wait for a segment's answer.
const PROBE: Duration = Duration::from_secs(2);

/// Lists registered segments.
#[derive(Args, Clone, Debug)]
pub struct SegmentsFlags {
    /// Where they are registered [default: setting TIDEWIRE_METADATA].
    #[arg(long, value_name = "URI")]
    pub metadata: Option<String>,
    /// Only these; needed (as HOST:PORT) where there is no server to ask.
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// Print one line of JSON per segment.
    #[arg(long)]
    pub json: bool,
}

/// One segment as listed.
#[derive(Clone, Debug, Serialize)]
struct Listed {
    name: String,
    address: Option<String>,
    protocol: String,
    transports: Vec<String>,
    generation: Option<String>,
    leased: bool,
    lease_ttl_s: Option<f64>,
    buffers: usize,
    bytes: u64,
    reachable: bool,
    probe_ms: Option<f64>,
    problem: Option<String>,
}

/// Prints the segments to stdout.
///
/// # Errors
/// When the store does not answer or does not know a name. A segment that does not answer is a row, not an error.
pub fn run(flags: &SegmentsFlags) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::io("starting a runtime"))?;
    let listed = runtime.block_on(list(flags))?;
    if flags.json {
        for one in &listed {
            let line = serde_json::to_string(one).map_err(std::io::Error::from);
            println!("{}", line.map_err(CliError::io("writing JSON"))?);
        }
        return Ok(());
    }
    print!("{}", render(&listed));
    Ok(())
}

async fn list(flags: &SegmentsFlags) -> Result<Vec<Listed>, CliError> {
    let config = Config::from_env();
    let text = flags.metadata.as_deref().unwrap_or(&config.metadata);
    let uri = uri::parse(text).map_err(CliError::store("reading --metadata"))?;
    let keys = KeySpace::new(&config.cluster_id);
    let client =
        ControlClient { timeouts: ClientTimeouts { connect: PROBE, reply: PROBE }, ..ControlClient::default() };
    let p2p = matches!(uri, StoreUri::P2p);
    let store: Arc<dyn MetadataStore> = if p2p {
        if flags.names.is_empty() {
            let hint = "name segments as HOST:PORT, or give --metadata http://… or etcd://…";
            return Err(CliError::usage("without a metadata server there is no list of segments", hint));
        }
        Arc::new(P2pStore::new(client.clone(), keys.clone()))
    } else {
        metadata::open(&uri, &store_options(&config)).await.map_err(CliError::store("opening the metadata store"))?
    };
    let entries = find(&*store, &keys, &flags.names).await;
    let mut listed = Vec::new();
    for (name, entry) in entries.map_err(CliError::store("asking the metadata store"))? {
        let address = if p2p { Some(HostPort::parse(&name)) } else { address_of(&*store, &keys, &name).await };
        listed.push(look_at(name, &entry, address, &client).await);
    }
    if let Err(error) = store.close().await {
        tracing::warn!(%error, "the metadata store did not close");
    }
    Ok(listed)
}

fn store_options(config: &Config) -> StoreOptions {
    let set = |text: &String| (!text.is_empty()).then(|| text.clone());
    let mut options = StoreOptions::default();
    options.lease_ttl = config.lease_ttl;
    options.connect_timeout = config.store_connect_timeout;
    options.request_timeout = config.store_timeout;
    options.etcd_user = set(&config.etcd_user);
    options.etcd_password = set(&config.etcd_password);
    options.tls_ca = set(&config.etcd_tls_ca).map(Into::into);
    options.tls_cert = set(&config.etcd_tls_cert).map(Into::into);
    options.tls_key = set(&config.etcd_tls_key).map(Into::into);
    options
}

/// The descriptors of `names`, or of all.
async fn find(
    store: &dyn MetadataStore,
    keys: &KeySpace,
    names: &[String],
) -> Result<Vec<(String, Entry)>, StoreError> {
    let mut found = Vec::new();
    if names.is_empty() {
        for entry in store.list(keys.prefix()).await? {
            if let Some(name) = keys.segment_of(&entry.key) {
                found.push((name.to_owned(), entry));
            }
        }
        return Ok(found);
    }
    for name in names {
        let entry = store.get(&keys.ram(name)).await?;
        let missing = || StoreError::Refused {
            store: store.describe(),
            operation: "get",
            key: keys.ram(name),
            reason: "no such segment".to_owned(),
        };
        found.push((name.clone(), entry.ok_or_else(missing)?));
    }
    Ok(found)
}

async fn address_of(store: &dyn MetadataStore, keys: &KeySpace, name: &str) -> Option<HostPort> {
    let entry = store.get(&keys.rpc_meta(name)).await.ok()??;
    RpcMeta::decode(&entry.value).ok().map(|meta| meta.address())
}

async fn look_at(name: String, entry: &Entry, address: Option<HostPort>, client: &ControlClient) -> Listed {
    let started = Instant::now();
    let (probed, unknown) = match &address {
        Some(address) => (Some(client.probe(address).await), None),
        None => (None, Some("its control address is not published".to_owned())),
    };
    let probe_ms = matches!(probed, Some(Ok(()))).then(|| started.elapsed().as_secs_f64() * 1e3);
    let silent = probed.and_then(Result::err).map(|error| error.chain());
    let decoded = SegmentDescriptor::decode(&entry.value);
    let broken = decoded.as_ref().err().map(|error| format!("its descriptor cannot be read: {error}"));
    let descriptor = decoded.unwrap_or_default();
    let native = descriptor.tidewire.as_ref();
    Listed {
        name,
        address: address.map(|address| address.to_string()),
        transports: native.map_or_else(Vec::new, |native| native.transports.clone()),
        generation: native.map(|native| native.generation.clone()),
        leased: entry.leased,
        lease_ttl_s: entry.ttl.map(|ttl| ttl.as_secs_f64()),
        buffers: descriptor.buffers.len(),
        bytes: descriptor.buffers.iter().map(|buffer| buffer.length).fold(0, u64::saturating_add),
        protocol: descriptor.protocol,
        reachable: probe_ms.is_some(),
        probe_ms,
        problem: broken.or(unknown).or(silent),
    }
}

fn render(listed: &[Listed]) -> String {
    let or_dash = |text: Option<String>| text.filter(|text| !text.is_empty()).unwrap_or_else(|| "-".to_owned());
    let mut table =
        Table::new(["segment", "control", "protocol", "generation", "lease", "buffers", "bytes", "reachable"]);
    for one in listed {
        let lease = match (one.leased, one.lease_ttl_s) {
            (true, Some(seconds)) => format!("{seconds:.0} s"),
            (true, None) => "yes".to_owned(),
            (false, _) => "none".to_owned(),
        };
        let protocol = match one.transports.as_slice() {
            [] => one.protocol.clone(),
            native => format!("{} (native: {})", one.protocol, native.join(",")),
        };
        let reachable = match (one.probe_ms, &one.problem) {
            (Some(ms), None) => format!("yes, {ms:.1} ms"),
            (Some(ms), Some(problem)) => format!("yes, {ms:.1} ms, but {problem}"),
            (None, problem) => format!("no: {}", or_dash(problem.clone())),
        };
        table.row([
            one.name.clone(),
            or_dash(one.address.clone()),
            protocol,
            or_dash(one.generation.clone()),
            lease,
            one.buffers.to_string(),
            binary_size(one.bytes),
            reachable,
        ]);
    }
    if listed.is_empty() { "no segment is registered\n".to_owned() } else { table.render() }
}
