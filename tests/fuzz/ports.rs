//! Garbage and half-sent frames on every port of a live engine, and of the metadata server.
//!
//! After it, and while half-open connections are still held, a healthy peer must be served as before: a write and a read
//! with every byte compared, or a key put and got.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect as connect_unix, send, socket_with,
};
use tidewire_core::mooncake::control::{self, ControlKind};
use tidewire_engine::{
    Config, Location, Opcode, TransferEngine, TransferRequest, TransportKind,
    metadata::{
        self, Lifetime,
        server::{MetadataServer, ServerOptions},
        uri,
    },
};

use crate::{mutate::Mutator, setting, targets::seeds};

const TIMEOUT: Duration = Duration::from_secs(10);
/// Connections left half-open while the healthy peer is served.
const HELD: usize = 64;

fn mutator(name: &str, seeds: Vec<Vec<u8>>) -> Mutator {
    let seed = setting("TIDEWIRE_FUZZ_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    println!("{name}: seed {seed}");
    Mutator::new(seed, seeds)
}

/// Sends mutated frames to `addr` for the bounded time; returns some connections that are still open.
fn pester(name: &str, addr: SocketAddr, frames: Vec<Vec<u8>>) -> Vec<TcpStream> {
    let mut mutator = mutator(name, frames);
    let until = Instant::now() + Duration::from_secs(setting("TIDEWIRE_FUZZ_SECONDS").unwrap_or(1));
    let mut held = Vec::new();
    let mut count = 0u64;
    while Instant::now() < until {
        count += 1;
        let mut stream = TcpStream::connect_timeout(&addr, TIMEOUT).expect("the port still accepts");
        stream.set_write_timeout(Some(TIMEOUT)).unwrap();
        // An error only says that the other side has hung up already, which is its right.
        let _ = stream.write_all(mutator.next_input());
        match count % 4 {
            0 if held.len() < HELD => held.push(stream),
            1 => drop(stream.shutdown(Shutdown::Write)),
            _ => {}
        }
    }
    println!("{name}: {count} connections, {} held", held.len());
    held
}

/// What the engine tells peers, asked for as an official peer does.
fn descriptor(addr: SocketAddr) -> serde_json::Value {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.write_all(&control::encode_frame(ControlKind::Metadata, b"{}")).unwrap();
    let mut length = [0; control::LENGTH_BYTES];
    stream.read_exact(&mut length).unwrap();
    let mut body = vec![0; u64::from_le_bytes(length) as usize];
    stream.read_exact(&mut body).unwrap();
    serde_json::from_slice(&body[1..]).unwrap()
}

fn port(descriptor: &serde_json::Value, path: &str) -> SocketAddr {
    let port = descriptor.pointer(path).and_then(serde_json::Value::as_u64).unwrap_or(0);
    assert_ne!(port, 0, "no port at {path} of {descriptor}");
    SocketAddr::from(([127, 0, 0, 1], port as u16))
}

/// Sends mutated packets to the same-host socket.
fn pester_local(socket_name: &str) {
    let mut mutator = mutator("same-host socket", seeds::local_message());
    let until = Instant::now() + Duration::from_secs(setting("TIDEWIRE_FUZZ_SECONDS").unwrap_or(1));
    let address = SocketAddrUnix::new_abstract_name(socket_name.as_bytes()).unwrap();
    let mut held = Vec::new();
    while Instant::now() < until {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        connect_unix(&socket, &address).expect("the socket still accepts");
        for _ in 0..4 {
            let _ = send(&socket, mutator.next_input(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        }
        if held.len() < HELD {
            held.push(socket);
        }
    }
}

/// Writes a pattern to the target and reads it back through `kind`.
fn moves_every_byte(target: &TransferEngine, kind: TransportKind) {
    const LEN: usize = 300_001;
    let remote = target.allocate(LEN, Location::Any).unwrap();
    let healthy = TransferEngine::builder("127.0.0.1").transports(&[kind]).build().unwrap();
    let local = healthy.allocate(2 * LEN, Location::Any).unwrap();
    let pattern: Vec<u8> = (0..LEN).map(|i| (i * 31 % 251) as u8).collect();
    local.write_at(0, &pattern).unwrap();
    let segment = healthy.open_segment(target.segment_name()).unwrap();
    for (opcode, source) in [(Opcode::Write, local.addr()), (Opcode::Read, local.addr() + LEN as u64)] {
        let request =
            TransferRequest { opcode, source, target: segment, target_offset: remote.addr(), length: LEN as u64 };
        healthy.transfer_sync(&[request], TIMEOUT).unwrap_or_else(|error| panic!("{opcode:?} over {kind:?}: {error}"));
    }
    let mut back = vec![0; LEN];
    local.read_at(LEN, &mut back).unwrap();
    assert!(back == pattern, "bytes over {kind:?} differ");
}

#[test]
fn an_engine_serves_its_peers_after_garbage_on_every_port() {
    let mut config = Config::from_env();
    config.mooncake_port = true;
    let engine = TransferEngine::builder("127.0.0.1").config(config).build().unwrap();
    let control_addr = SocketAddr::from(([127, 0, 0, 1], engine.rpc_port()));
    let told = descriptor(control_addr);
    let (native, mooncake) = (port(&told, "/tidewire/data_port"), port(&told, "/tcp_data_port"));
    let local_socket =
        told.pointer("/tidewire/local_socket").and_then(serde_json::Value::as_str).unwrap_or("").to_owned();

    let hellos = seeds::native_hello().into_iter().chain(seeds::native_frame()).collect();
    let held: Vec<TcpStream> = thread::scope(|scope| {
        let pests = [
            scope.spawn(|| pester("control port", control_addr, seeds::mooncake_control())),
            scope.spawn(|| pester("native port", native, hellos)),
            scope.spawn(|| pester("mooncake port", mooncake, seeds::mooncake_data())),
        ];
        if local_socket.is_empty() {
            println!("SKIP garbage on the same-host socket: the engine offers none here");
        } else {
            pester_local(&local_socket);
        }
        pests.into_iter().flat_map(|pest| pest.join().unwrap()).collect()
    });
    assert!(!held.is_empty());
    engine.probe(engine.segment_name()).unwrap();
    for kind in [TransportKind::Tcp, TransportKind::MooncakeTcp, TransportKind::Shm] {
        if kind != TransportKind::Shm || !local_socket.is_empty() {
            moves_every_byte(&engine, kind);
        }
    }
}

#[test]
fn the_metadata_server_serves_after_garbage() {
    let requests = [
        "GET /metadata?key=mooncake%2Fram%2Fa HTTP/1.1\r\nHost: a\r\n\r\n",
        "PUT /metadata?key=mooncake%2Framb HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}",
        "PUT /metadata?key=x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "DELETE /metadata?key=%ZZ HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    ];
    let requests = requests.iter().map(|text| text.as_bytes().to_vec()).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = MetadataServer::start(any_port, ServerOptions::default()).await.unwrap();
        let addr = server.local_addr();
        let held = tokio::task::spawn_blocking(move || pester("metadata server", addr, requests)).await.unwrap();
        assert!(!held.is_empty());
        let store =
            metadata::open(&uri::parse(&server.uri()).unwrap(), &metadata::StoreOptions::default()).await.unwrap();
        store.put("mooncake/ram/after", b"{}", Lifetime::Permanent).await.unwrap();
        assert_eq!(store.get("mooncake/ram/after").await.unwrap().expect("the key").value, b"{}");
        store.close().await.unwrap();
        server.stop().await;
    });
}
