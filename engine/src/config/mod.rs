//! Settings: one row per setting in [`params`], read from the environment, printed as `docs/CONFIG.md`.
//!
//! Precedence: a value set in code on [`Config`] or on the builder, then `TIDEWIRE_*`, then a Mooncake alias, then the
//! default. A value that cannot be used is a warning and the default, never a failure.
//!
//! Invariants:
//! * every field of [`Config`] has exactly one row; [`Config::default`] is what the rows say;
//! * reading is pure ([`Config::from_vars`]); logging what was found happens once per process ([`Config::from_env`]).

pub mod env;
pub mod kind;
pub mod markdown;
pub mod params;

use std::time::Duration;

use tidewire_core::TransportKind;

pub use env::Remark;
pub use kind::Param;
pub use params::PARAMS;

/// Settings of one engine. Public fields: change what you need after [`Config::from_env`] or [`Config::default`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// Connection string of the metadata store.
    pub metadata: String,
    /// Part of the metadata keys that separates clusters; empty: none.
    pub cluster_id: String,
    /// Transports to start, best first; empty: all.
    pub transports: Vec<TransportKind>,
    /// Address that listeners bind; empty: the host part of the local name.
    pub bind_address: String,
    /// Address that peers are told; empty: the bind address, or the host part of the local name.
    pub advertise_address: String,
    /// Port of the control listener; 0: drawn from the range.
    pub control_port: u16,
    /// Lower end of the port range.
    pub port_min: u16,
    /// Upper end of the port range, inclusive.
    pub port_max: u16,
    /// Whether the port for official Mooncake peers is open.
    pub mooncake_port: bool,
    /// Longest control message in bytes.
    pub control_max_len_bytes: u64,
    /// Limit of connecting to a control port.
    pub control_connect_timeout: Duration,
    /// Limit of a whole control call.
    pub control_timeout: Duration,
    /// Port of the native data listener; 0: drawn by the kernel.
    pub tcp_port: u16,
    /// Connections per peer; 0: by the number of cores.
    pub tcp_streams: u32,
    /// Event-loop threads; 0: by the number of cores.
    pub tcp_threads: u32,
    /// Longest payload of one frame.
    pub tcp_frame_bytes: u32,
    /// Send and receive buffer of each data socket; 0: what the system chooses.
    pub tcp_socket_buffer_bytes: u64,
    /// How long an event loop polls after work before it sleeps.
    pub tcp_loop_spin: Duration,
    /// Bytes in flight per connection.
    pub tcp_window_bytes: u64,
    /// CRC32C over payloads, end to end.
    pub tcp_crc: bool,
    /// Limit of connecting to a data port.
    pub tcp_connect_timeout: Duration,
    /// How long the data listener waits for a hello.
    pub tcp_hello_timeout: Duration,
    /// Silence after which a heartbeat is sent.
    pub tcp_heartbeat_interval: Duration,
    /// Silence after which a peer with open operations is given up.
    pub tcp_heartbeat_timeout: Duration,
    /// Connections that the data listener takes.
    pub tcp_max_connections: u32,
    /// How long a waiting caller polls before it sleeps.
    pub spin: Duration,
    /// Connections per official Mooncake peer.
    pub mooncake_lanes: u32,
    /// Version of the Mooncake data protocol that is forced; 0: what the peer publishes.
    pub mooncake_proto: u32,
    /// Silence after which an official Mooncake peer is given up.
    pub mooncake_progress_timeout: Duration,
    /// Time without progress after which a batch is ended.
    pub batch_timeout: Duration,
    /// Time that open batches get at shutdown.
    pub drain_timeout: Duration,
    /// Time that operations get to leave a buffer before they are ended.
    pub unregister_drain: Duration,
    /// Slices that may be open towards one peer.
    pub max_queued_slices: u64,
    /// Notifications kept for the application.
    pub max_notifications: u64,
    /// Whether registering waits until the store has the new descriptor.
    pub publish_wait: bool,
    /// Whether a live owner of the segment's name is replaced.
    pub take_over: bool,
    /// Whether the soft limit on open descriptors is raised to the hard one.
    pub raise_fd_limit: bool,
    /// Limit of one call to the metadata store.
    pub store_timeout: Duration,
    /// Limit of connecting to the metadata store.
    pub store_connect_timeout: Duration,
    /// Lifetime of published keys after the process died.
    pub lease_ttl: Duration,
    /// User of etcd; empty: none.
    pub etcd_user: String,
    /// Password of that user.
    pub etcd_password: String,
    /// File with the certificate authority of etcd; empty: no TLS.
    pub etcd_tls_ca: String,
    /// File with the client certificate.
    pub etcd_tls_cert: String,
    /// File with the key of the client certificate.
    pub etcd_tls_key: String,
}

impl Default for Config {
    fn default() -> Self {
        let mut config = Config::blank();
        for param in PARAMS {
            param.set_default(&mut config);
        }
        config
    }
}

impl Config {
    /// All fields empty; the rows fill it.
    fn blank() -> Self {
        Config {
            metadata: String::new(),
            cluster_id: String::new(),
            transports: Vec::new(),
            bind_address: String::new(),
            advertise_address: String::new(),
            control_port: 0,
            port_min: 0,
            port_max: 0,
            mooncake_port: false,
            control_max_len_bytes: 0,
            control_connect_timeout: Duration::ZERO,
            control_timeout: Duration::ZERO,
            tcp_port: 0,
            tcp_streams: 0,
            tcp_threads: 0,
            tcp_frame_bytes: 0,
            tcp_socket_buffer_bytes: 0,
            tcp_loop_spin: Duration::ZERO,
            tcp_window_bytes: 0,
            tcp_crc: false,
            tcp_connect_timeout: Duration::ZERO,
            tcp_hello_timeout: Duration::ZERO,
            tcp_heartbeat_interval: Duration::ZERO,
            tcp_heartbeat_timeout: Duration::ZERO,
            tcp_max_connections: 0,
            spin: Duration::ZERO,
            mooncake_lanes: 0,
            mooncake_proto: 0,
            mooncake_progress_timeout: Duration::ZERO,
            batch_timeout: Duration::ZERO,
            drain_timeout: Duration::ZERO,
            unregister_drain: Duration::ZERO,
            max_queued_slices: 0,
            max_notifications: 0,
            publish_wait: false,
            take_over: false,
            raise_fd_limit: false,
            store_timeout: Duration::ZERO,
            store_connect_timeout: Duration::ZERO,
            lease_ttl: Duration::ZERO,
            etcd_user: String::new(),
            etcd_password: String::new(),
            etcd_tls_ca: String::new(),
            etcd_tls_cert: String::new(),
            etcd_tls_key: String::new(),
        }
    }

    /// Reads the environment of the process. What was found odd is logged, once per process.
    pub fn from_env() -> Self {
        static LOGGED: std::sync::Once = std::sync::Once::new();
        let vars = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        let (config, remarks) = Config::from_vars(vars);
        LOGGED.call_once(|| remarks.iter().for_each(Remark::log));
        config
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests;
