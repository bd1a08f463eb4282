//! The control port: calls over loopback, strangers, limits.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tidewire_core::{
    Notify,
    mooncake::{
        control::{ControlKind, encode_frame, encode_old_frame},
        descriptor::SegmentDescriptor,
        host::HostPort,
        keys::KeySpace,
    },
};
use tokio::runtime::Runtime;

use super::{listen::PortChoice, *};
use crate::metadata::{Expect, Lifetime, MetadataStore, StoreError, p2p::P2pStore};

#[derive(Debug, Default)]
struct Handler {
    notes: Mutex<Vec<(String, String)>>,
    refuse: bool,
}

impl ControlHandler for Handler {
    fn metadata(&self, _request: &[u8]) -> Vec<u8> {
        SegmentDescriptor::tcp("peer", "", 7).encode()
    }

    fn notify(&self, name: String, message: String) -> Result<(), NotifyRefused> {
        if self.refuse {
            return Err(NotifyRefused::Full { queued: 1 });
        }
        self.notes.lock().unwrap().push((name, message));
        Ok(())
    }
}

struct World {
    runtime: Runtime,
    handler: Arc<Handler>,
    server: Option<ControlServer>,
    address: SocketAddr,
}

impl World {
    fn new(change: impl FnOnce(&mut ServerConfig), refuse: bool) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let handler = Arc::new(Handler { refuse, ..Handler::default() });
        let mut config = ServerConfig { port: PortChoice::Fixed(0), ..ServerConfig::default() };
        change(&mut config);
        let server = ControlServer::start(config, handler.clone(), runtime.handle()).unwrap();
        World { runtime, handler, address: server.address(), server: Some(server) }
    }

    fn host(&self) -> HostPort {
        HostPort::new("127.0.0.1", self.address.port())
    }

    /// Sends raw bytes and returns what comes back until the server closes.
    fn exchange(&self, bytes: &[u8]) -> Vec<u8> {
        let (address, bytes) = (self.address, bytes.to_vec());
        self.runtime.block_on(async move {
            tokio::task::spawn_blocking(move || {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                stream.write_all(&bytes).unwrap();
                let mut reply = Vec::new();
                // A reset counts as closed without reply.
                let _ = stream.read_to_end(&mut reply);
                reply
            })
            .await
            .unwrap()
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            self.runtime.block_on(server.stop(Duration::from_secs(5)));
        }
    }
}

#[test]
fn replies_have_mooncakes_bytes() {
    let world = World::new(|_| {}, false);
    let frame = |kind, json: &str| encode_frame(kind, format!("{json}\n").as_bytes());
    assert_eq!(world.exchange(b"\x03\0\0\0\0\0\0\0\x03{}"), frame(ControlKind::Probe, r#"{"status":"success"}"#));
    let note = encode_frame(ControlKind::Notify, "{\"name\":\"a\\nb\",\"notify_msg\":\"é\"}".as_bytes());
    assert_eq!(world.exchange(&note), frame(ControlKind::Notify, r#"{"name":"","notify_msg":"success"}"#));
    assert_eq!(*world.handler.notes.lock().unwrap(), [("a\nb".to_owned(), "é".to_owned())]);
    let empty = r#"{"local_gid":"","local_lid":0,"local_nic_path":"","payload":"","peer_nic_path":"","qp_num":[],"reply_msg":""}"#;
    assert_eq!(world.exchange(&encode_frame(ControlKind::Connection, b"{}")), frame(ControlKind::Connection, empty));
    assert_eq!(world.exchange(&encode_old_frame(b"{}")), encode_old_frame(format!("{empty}\n").as_bytes()));
}

#[test]
fn garbage_is_closed_without_reply() {
    let world = World::new(|config| config.request_timeout = Duration::from_millis(300), false);
    let mut oversize = encode_frame(ControlKind::Probe, b"{}");
    oversize[..8].copy_from_slice(&((1u64 << 20) + 1).to_le_bytes());
    let half = encode_frame(ControlKind::Probe, b"{}")[..9].to_vec();
    for bad in [
        vec![0; 8],
        vec![0xff; 64],
        oversize,
        half,
        b"\x03".to_vec(),
        b"\x03\0\0\0\0\0\0\0\x04{}".to_vec(),
        b"\x03\0\0\0\0\0\0\0\xfe{}".to_vec(),
        b"\x03\0\0\0\0\0\0\0\x01{ ".to_vec(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ] {
        let started = Instant::now();
        assert_eq!(world.exchange(&bad), b"", "{bad:?}");
        assert!(started.elapsed() < Duration::from_secs(5));
    }
    world.runtime.block_on(ControlClient::default().probe(&world.host())).unwrap();
}

#[test]
fn what_was_announced_and_not_sent_takes_no_room_from_others() {
    let world = World::new(|config| config.max_buffered_bytes = 256 << 10, false);
    let half: Vec<_> = (0..8)
        .map(|_| {
            let mut socket = TcpStream::connect(world.address).unwrap();
            socket.write_all(&(256_u64 << 10).to_le_bytes()).unwrap();
            socket.write_all(b"\x01{").unwrap();
            socket
        })
        .collect();
    let frame =
        |bytes: usize| encode_frame(ControlKind::Metadata, format!("{{\"a\":\"{}\"}}", "x".repeat(bytes)).as_bytes());
    world.runtime.block_on(ControlClient::default().probe(&world.host())).unwrap();
    assert!(!world.exchange(&frame(200 << 10)).is_empty(), "a long request is answered");
    assert!(world.exchange(&frame(600 << 10)).is_empty(), "one that is longer than the room is not");
    assert!(!world.exchange(&frame(200 << 10)).is_empty(), "and leaves nothing behind");
    drop(half);
}

#[test]
fn thousand_idle_connections_delay_nobody() {
    let world = World::new(|_| {}, false);
    let idle: Vec<_> = (0..1000)
        .map(|_| {
            let socket = TcpStream::connect(world.address).unwrap();
            world.runtime.block_on(tokio::task::yield_now());
            socket
        })
        .collect();
    let started = Instant::now();
    world.runtime.block_on(ControlClient::default().probe(&world.host())).unwrap();
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    drop(idle);
}

#[test]
fn beyond_the_limit_the_oldest_connection_goes() {
    let world = World::new(|config| config.max_connections = 4, false);
    let idle: Vec<_> = (0..4).map(|_| TcpStream::connect(world.address).unwrap()).collect();
    world.runtime.block_on(ControlClient::default().probe(&world.host())).unwrap();
    idle[0].set_read_timeout(Some(Duration::from_secs(4))).unwrap();
    assert_eq!((&idle[0]).read(&mut [0; 1]).unwrap_or(0), 0, "the oldest is closed");
    idle[3].set_nonblocking(true).unwrap();
    assert!((&idle[3]).read(&mut [0; 1]).is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock));
}

#[test]
fn client_calls_work_and_refusals_are_errors() {
    let (world, unwilling) = (World::new(|_| {}, false), World::new(|_| {}, true));
    let client = ControlClient::default();
    let note = Notify { name: "n".to_owned(), message: "m".to_owned() };
    let seen = world.runtime.block_on(client.fetch_descriptor(&world.host())).unwrap().unwrap();
    assert_eq!((seen.name.as_str(), seen.tcp_data_port), ("peer", 7));
    world.runtime.block_on(client.notify(&world.host(), &note)).unwrap();
    assert_eq!(world.handler.notes.lock().unwrap().len(), 1);
    let refused = unwilling.runtime.block_on(client.notify(&unwilling.host(), &note));
    assert!(matches!(refused, Err(ControlError::Rejected { call: "notify", .. })), "{refused:?}");
}

#[test]
fn silent_and_absent_peers_are_typed_errors() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = HostPort::new("127.0.0.1", silent.local_addr().unwrap().port());
    let mut client = ControlClient::default();
    client.timeouts.reply = Duration::from_millis(100);
    let late = runtime.block_on(client.probe(&address)).unwrap_err();
    assert!(matches!(&late, ControlError::TimedOut { step: "answer", .. }), "{late:?}");
    drop(silent);
    let refused = runtime.block_on(client.probe(&address)).unwrap_err();
    assert!(matches!(&refused, ControlError::Connect { .. }), "{refused:?}");
    assert!(refused.chain().contains(&address.to_string()));
    let unknown = runtime.block_on(client.probe(&HostPort::new("no.such.host.invalid", 1))).unwrap_err();
    assert!(matches!(&unknown, ControlError::Resolve { .. } | ControlError::TimedOut { .. }), "{unknown:?}");
}

#[test]
fn stop_closes_the_port_and_idle_connections() {
    let mut world = World::new(|_| {}, false);
    let mut idle = TcpStream::connect(world.address).unwrap();
    idle.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    world.runtime.block_on(ControlClient::default().probe(&world.host())).unwrap();
    let started = Instant::now();
    world.runtime.block_on(world.server.take().unwrap().stop(Duration::from_secs(10)));
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(idle.read(&mut [0; 1]).unwrap_or(0), 0);
    assert!(TcpStream::connect(world.address).is_err());
}

#[test]
fn ports_are_drawn_from_the_range_and_taken_ones_skipped() {
    let free = listen::listen("127.0.0.1", &PortChoice::Fixed(0)).unwrap();
    let taken = free.local_addr().unwrap().port();
    let refused = listen::listen("127.0.0.1", &PortChoice::Range(taken..=taken)).unwrap_err();
    assert!(matches!(refused, ControlError::Listen { .. }) && refused.chain().contains(&taken.to_string()));
    let drawn = listen::listen("[::1]", &PortChoice::default());
    if let Ok(drawn) = drawn {
        let address = drawn.local_addr().unwrap();
        assert!((15000..=17000).contains(&address.port()) && address.ip().is_loopback());
    }
}

#[test]
fn p2p_store_keeps_its_own_and_asks_peers() {
    let world = World::new(|_| {}, false);
    let (store, keys) = (P2pStore::default(), KeySpace::default());
    let peer_key = keys.ram(&world.host().to_string());
    world.runtime.block_on(async {
        let revision = store.put("mooncake/ram/me", b"mine", Lifetime::Session).await.unwrap();
        assert_eq!(store.get("mooncake/ram/me").await.unwrap().unwrap().value, b"mine");
        assert_eq!(store.own_value("mooncake/ram/me").as_deref(), Some(&b"mine"[..]));
        let lost = store.compare_and_put("mooncake/ram/me", Expect::Absent, b"x", Lifetime::Session).await.unwrap();
        assert_eq!(lost, None);
        let guard = Expect::Revision(revision);
        assert!(store.compare_and_put("mooncake/ram/me", guard, b"x", Lifetime::Session).await.unwrap().is_some());
        let entry = store.get(&peer_key).await.unwrap().unwrap();
        assert_eq!(SegmentDescriptor::decode(&entry.value).unwrap().name, "peer");
        assert!(matches!(store.list("mooncake/").await, Err(StoreError::Unsupported { .. })));
        assert!(matches!(store.watch("mooncake/").await, Err(StoreError::Unsupported { .. })));
        assert!(store.remove("mooncake/ram/me").await.unwrap());
        let absent = store.get("mooncake/ram/127.0.0.1:1").await.unwrap_err();
        assert!(matches!(&absent, StoreError::Unreachable { store, .. } if store.contains("127.0.0.1:1")));
    });
}
