//! The settings, one row each. `docs/CONFIG.md` is printed from this table.

use std::time::Duration;

use super::kind::{Alias, Form, Kind, Param};

const fn same(name: &'static str) -> Alias {
    Alias { name, form: Form::Same }
}

const fn seconds(name: &'static str) -> Alias {
    Alias { name, form: Form::Times(1000) }
}

/// Row of a number.
macro_rules! number {
    ($name:literal, $field:ident: $type:ty, $default:expr, $min:expr, $max:expr, $unit:literal, [$($alias:expr),*], $help:literal) => {
        Param {
            name: $name,
            aliases: &[$($alias),*],
            kind: Kind::Number {
                default: $default,
                min: $min,
                max: $max,
                set: |config, value| config.$field = value as $type,
                get: |config| config.$field as u64,
            },
            unit: $unit,
            help: $help,
            secret: false,
        }
    };
}

/// Row of a duration, in milliseconds.
macro_rules! millis {
    ($name:literal, $field:ident, $default:expr, $min:expr, $max:expr, [$($alias:expr),*], $help:literal) => {
        Param {
            name: $name,
            aliases: &[$($alias),*],
            kind: Kind::Number {
                default: $default,
                min: $min,
                max: $max,
                set: |config, value| config.$field = Duration::from_millis(value),
                get: |config| config.$field.as_millis() as u64,
            },
            unit: "ms",
            help: $help,
            secret: false,
        }
    };
}

/// Row of a flag.
macro_rules! flag {
    ($name:literal, $field:ident, $default:expr, [$($alias:expr),*], $help:literal) => {
        Param {
            name: $name,
            aliases: &[$($alias),*],
            kind: Kind::Flag {
                default: $default,
                set: |config, value| config.$field = value,
                get: |config| config.$field,
            },
            unit: "",
            help: $help,
            secret: false,
        }
    };
}

/// Row of a text.
macro_rules! text {
    ($name:literal, $field:ident, $default:expr, $secret:expr, [$($alias:expr),*], $help:literal) => {
        Param {
            name: $name,
            aliases: &[$($alias),*],
            kind: Kind::Text {
                default: $default,
                set: |config, value| value.clone_into(&mut config.$field),
                get: |config| &config.$field,
            },
            unit: "",
            help: $help,
            secret: $secret,
        }
    };
}

const TRANSPORTS: Param = Param {
    name: "TIDEWIRE_TRANSPORTS",
    aliases: &[Alias { name: "MC_FORCE_TCP", form: Form::Presence("local,tcp,mooncake-tcp") }],
    kind: Kind::Transports { set: |config, value| config.transports = value, get: |config| &config.transports },
    unit: "",
    help: "Transports to start, separated by commas: local, shm, cma, tcp, mooncake-tcp; empty: all.",
    secret: false,
};

/// Every setting.
pub const PARAMS: &[Param] = &[
    text!(
        "TIDEWIRE_METADATA",
        metadata,
        "P2PHANDSHAKE",
        false,
        [],
        "Metadata store: P2PHANDSHAKE, etcd://host:port, http://host:port/metadata or memory://name."
    ),
    text!(
        "TIDEWIRE_METADATA_CLUSTER_ID",
        cluster_id,
        "",
        false,
        [same("MC_METADATA_CLUSTER_ID")],
        "Separates clusters that share a metadata store: part of every key."
    ),
    TRANSPORTS,
    text!(
        "TIDEWIRE_BIND_ADDRESS",
        bind_address,
        "",
        false,
        [],
        "Address that listeners bind; empty: the host part of the local name, which must then be an address of this host."
    ),
    text!(
        "TIDEWIRE_ADVERTISE_ADDRESS",
        advertise_address,
        "",
        false,
        [same("MC_TCP_BIND_ADDRESS")],
        "Address that peers are told; empty: the bind address, or the host part of the local name for a wildcard."
    ),
    number!(
        "TIDEWIRE_CONTROL_PORT",
        control_port: u16,
        0,
        0,
        65535,
        "",
        [],
        "Port of the control listener; 0: a free one in the range of TIDEWIRE_PORT_MIN and TIDEWIRE_PORT_MAX."
    ),
    number!(
        "TIDEWIRE_PORT_MIN",
        port_min: u16,
        15000,
        1024,
        65535,
        "",
        [same("MC_MIN_RPC_PORT"), same("MC_MIN_PRC_PORT")],
        "Lower end of the range of ports."
    ),
    number!(
        "TIDEWIRE_PORT_MAX",
        port_max: u16,
        17000,
        1024,
        65535,
        "",
        [same("MC_MAX_RPC_PORT"), same("MC_MAX_PRC_PORT")],
        "Upper end of the range of ports, inclusive."
    ),
    flag!(
        "TIDEWIRE_MOONCAKE_PORT",
        mooncake_port,
        false,
        [],
        "Opens the data port for official Mooncake peers. That protocol has no access control."
    ),
    number!(
        "TIDEWIRE_CONTROL_MAX_LEN",
        control_max_len_bytes: u64,
        1 << 20,
        1 << 20,
        128 << 20,
        "bytes",
        [same("MC_HANDSHAKE_MAX_LENGTH")],
        "Longest control message that is sent or accepted."
    ),
    millis!(
        "TIDEWIRE_CONTROL_CONNECT_TIMEOUT_MS",
        control_connect_timeout,
        5000,
        10,
        3_599_000,
        [seconds("MC_HANDSHAKE_CONNECT_TIMEOUT")],
        "Limit of connecting to a peer's control port."
    ),
    millis!(
        "TIDEWIRE_CONTROL_TIMEOUT_MS",
        control_timeout,
        10_000,
        10,
        3_600_000,
        [],
        "Limit of a whole control call: discovery, notification or probe."
    ),
    number!(
        "TIDEWIRE_TCP_PORT",
        tcp_port: u16,
        0,
        0,
        65535,
        "",
        [],
        "Port of the native data listener; 0: a free one."
    ),
    number!(
        "TIDEWIRE_TCP_STREAMS",
        tcp_streams: u32,
        0,
        0,
        64,
        "",
        [same("MC_TCP_LANES_PER_PEER"), same("MC_TCP_MAX_CONNECTIONS_PER_PEER")],
        "Connections per peer of the native protocol; 0: by the number of cores."
    ),
    number!(
        "TIDEWIRE_TCP_THREADS",
        tcp_threads: u32,
        0,
        0,
        64,
        "",
        [same("MC_NUM_TCP_IO_THREADS")],
        "Event-loop threads; 0: by the number of cores."
    ),
    number!(
        "TIDEWIRE_TCP_FRAME",
        tcp_frame_bytes: u32,
        1 << 20,
        4096,
        16 << 20,
        "bytes",
        [],
        "Longest payload of one frame; longer requests are cut."
    ),
    number!(
        "TIDEWIRE_TCP_SOCKET_BUFFER",
        tcp_socket_buffer_bytes: u64,
        0,
        0,
        1 << 30,
        "bytes",
        [],
        "Send and receive buffer of each data socket; 0: what the system chooses."
    ),
    number!(
        "TIDEWIRE_TCP_WINDOW",
        tcp_window_bytes: u64,
        8 << 20,
        64 << 10,
        1 << 30,
        "bytes",
        [],
        "Bytes in flight per connection before further slices wait."
    ),
    flag!("TIDEWIRE_TCP_CRC", tcp_crc, false, [], "CRC32C over every payload of the native protocol, end to end."),
    millis!(
        "TIDEWIRE_TCP_CONNECT_TIMEOUT_MS",
        tcp_connect_timeout,
        3000,
        10,
        600_000,
        [],
        "Limit of connecting to a peer's data port, handshake included."
    ),
    millis!(
        "TIDEWIRE_TCP_HELLO_TIMEOUT_MS",
        tcp_hello_timeout,
        5000,
        10,
        600_000,
        [],
        "How long the native data listener waits for the hello of a new connection."
    ),
    millis!(
        "TIDEWIRE_TCP_HEARTBEAT_INTERVAL_MS",
        tcp_heartbeat_interval,
        1000,
        10,
        600_000,
        [],
        "Silence of a peer with open operations after which it is asked for a sign of life."
    ),
    millis!(
        "TIDEWIRE_TCP_HEARTBEAT_TIMEOUT_MS",
        tcp_heartbeat_timeout,
        3000,
        50,
        600_000,
        [],
        "Silence of a peer with open operations after which they fail."
    ),
    number!(
        "TIDEWIRE_TCP_MAX_CONNECTIONS",
        tcp_max_connections: u32,
        8192,
        1,
        1 << 20,
        "",
        [],
        "Connections that the native data listener takes; further ones are refused with a reason."
    ),
    Param {
        name: "TIDEWIRE_SPIN_US",
        aliases: &[],
        kind: Kind::Number {
            default: 50,
            min: 0,
            max: 1_000_000,
            set: |config, value| config.spin = Duration::from_micros(value),
            get: |config| config.spin.as_micros() as u64,
        },
        unit: "us",
        help: "How long a waiting caller polls before it sleeps, unless there is only one core; 0: it sleeps at once.",
        secret: false,
    },
    Param {
        name: "TIDEWIRE_TCP_LOOP_SPIN_US",
        aliases: &[],
        kind: Kind::Number {
            default: 20,
            min: 0,
            max: 1_000_000,
            set: |config, value| config.tcp_loop_spin = Duration::from_micros(value),
            get: |config| config.tcp_loop_spin.as_micros() as u64,
        },
        unit: "us",
        help: "How long an event loop polls after work before it sleeps.",
        secret: false,
    },
    number!(
        "TIDEWIRE_MOONCAKE_LANES",
        mooncake_lanes: u32,
        4,
        1,
        16,
        "",
        [same("MC_TCP_LANES_PER_PEER"), same("MC_TCP_MAX_CONNECTIONS_PER_PEER")],
        "Connections per official Mooncake peer."
    ),
    number!(
        "TIDEWIRE_MOONCAKE_PROTO",
        mooncake_proto: u32,
        0,
        0,
        2,
        "",
        [same("MC_TCP_PROTO")],
        "Version of Mooncake's data protocol that is forced; 0: what the peer publishes."
    ),
    millis!(
        "TIDEWIRE_MOONCAKE_PROGRESS_TIMEOUT_MS",
        mooncake_progress_timeout,
        30_000,
        50,
        3_600_000,
        [seconds("MC_TCP_PROGRESS_TIMEOUT_SEC"), seconds("MC_TCP_STATUS_TIMEOUT_SEC")],
        "Silence of an official Mooncake peer after which its open operations fail."
    ),
    millis!(
        "TIDEWIRE_BATCH_TIMEOUT_MS",
        batch_timeout,
        30_000,
        10,
        86_400_000,
        [seconds("MC_TRANSFER_TIMEOUT"), seconds("MC_SLICE_TIMEOUT")],
        "Time without a settled slice after which a batch is ended."
    ),
    millis!(
        "TIDEWIRE_DRAIN_TIMEOUT_MS",
        drain_timeout,
        2000,
        0,
        3_600_000,
        [],
        "Time that open batches get when an engine is dropped."
    ),
    millis!(
        "TIDEWIRE_UNREGISTER_DRAIN_MS",
        unregister_drain,
        1000,
        0,
        600_000,
        [],
        "Time that operations get to leave a buffer that is unregistered before they are ended."
    ),
    number!(
        "TIDEWIRE_MAX_QUEUED_SLICES",
        max_queued_slices: u64,
        1 << 20,
        1,
        1 << 32,
        "",
        [],
        "Slices that may be open towards one peer; a submit beyond it is refused."
    ),
    number!(
        "TIDEWIRE_MAX_NOTIFICATIONS",
        max_notifications: u64,
        1 << 16,
        1,
        1 << 24,
        "",
        [],
        "Notifications kept for the application; a further one is refused to its sender."
    ),
    flag!(
        "TIDEWIRE_PUBLISH_WAIT",
        publish_wait,
        true,
        [],
        "Registering returns only after the metadata store has the buffer. Off, and beyond 256 buffers in any case: it is published soon after."
    ),
    flag!(
        "TIDEWIRE_TAKE_OVER",
        take_over,
        false,
        [],
        "Takes the segment name over from an owner that still answers. One that does not answer is always replaced."
    ),
    flag!(
        "TIDEWIRE_RAISE_FD_LIMIT",
        raise_fd_limit,
        true,
        [],
        "Raises the soft limit on open descriptors to the hard one when the engine is built. It is the limit of the whole process."
    ),
    millis!(
        "TIDEWIRE_STORE_TIMEOUT_MS",
        store_timeout,
        3000,
        10,
        600_000,
        [],
        "Limit of one call to the metadata store."
    ),
    millis!(
        "TIDEWIRE_STORE_CONNECT_TIMEOUT_MS",
        store_connect_timeout,
        3000,
        10,
        600_000,
        [],
        "Limit of connecting to the metadata store."
    ),
    millis!(
        "TIDEWIRE_LEASE_TTL_MS",
        lease_ttl,
        10_000,
        1000,
        3_600_000,
        [],
        "How long published keys stay after the process died, in stores that have leases."
    ),
    text!("TIDEWIRE_ETCD_USER", etcd_user, "", false, [], "User of etcd."),
    text!("TIDEWIRE_ETCD_PASSWORD", etcd_password, "", true, [], "Password of the user of etcd."),
    text!("TIDEWIRE_ETCD_TLS_CA", etcd_tls_ca, "", false, [], "File with the certificate authority of etcd, PEM."),
    text!("TIDEWIRE_ETCD_TLS_CERT", etcd_tls_cert, "", false, [], "File with the client certificate for etcd, PEM."),
    text!("TIDEWIRE_ETCD_TLS_KEY", etcd_tls_key, "", false, [], "File with the key of that certificate, PEM."),
];
