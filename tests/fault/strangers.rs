//! Strangers on every port: garbage, half frames, oversize frames, a thousand idle connections.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use tidewire_engine::{
    TransferEngine,
    core::{Location, Opcode},
};

use super::target::{engine, request};

pub struct Ports {
    pub control: u16,
    pub native: u16,
    pub mooncake: u16,
}

pub fn ports(engine: &TransferEngine) -> Ports {
    let status = engine.status();
    Ports { control: engine.rpc_port(), native: status.data_port, mooncake: status.mooncake_port }
}

pub fn connect(port: u16) -> TcpStream {
    let socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket
}

/// Time of a write, a read and a probe between two engines.
pub fn exercise(near: &TransferEngine, far: &TransferEngine) -> Duration {
    let source = near.allocate(1 << 16, Location::Any).unwrap();
    let target = far.allocate(1 << 16, Location::Any).unwrap();
    let segment = near.open_segment_no_cache(far.segment_name()).unwrap();
    let started = Instant::now();
    for opcode in [Opcode::Write, Opcode::Read] {
        let request = request(opcode, source.addr(), segment, target.addr(), 1 << 16);
        near.transfer_sync(&[request], Duration::from_secs(20)).unwrap();
    }
    near.probe(far.segment_name()).unwrap();
    started.elapsed()
}

#[test]
fn garbage_on_every_port_closes_that_connection_only() {
    let far = engine("tcp,mooncake-tcp");
    let near = engine("tcp");
    let ports = ports(&far);
    let garbage = [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".repeat(40),
        vec![0xff; 4096],
        vec![0; 4096],
        // A control frame that announces more than the limit, and a data header that does.
        [&u64::MAX.to_le_bytes()[..], &[1; 64]].concat(),
        [&(1u64 << 40).to_le_bytes()[..], &16u64.to_le_bytes(), &[0x81], &[0; 7], &[3; 256]].concat(),
    ];
    for port in [ports.control, ports.native, ports.mooncake] {
        assert_ne!(port, 0);
        for bytes in &garbage {
            let mut socket = connect(port);
            let _ = socket.write_all(bytes);
            let _ = socket.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let _ = socket.take(1 << 20).read_to_end(&mut answer);
            assert!(answer.len() < 4096, "port {port} answered {} bytes", answer.len());
        }
    }
    assert!(exercise(&near, &far) < Duration::from_secs(5));
}

#[test]
fn half_sent_frames_and_a_thousand_idle_connections_delay_nobody() {
    // Both ends of each connection are in this process.
    if tidewire_engine::runtime::descriptors::raise_limit().is_some_and(|limit| limit < 3_000) {
        println!("SKIP a thousand connections: the hard limit on open descriptors is below 3000");
        return;
    }
    let far = engine("tcp,mooncake-tcp");
    let near = engine("tcp");
    let ports = ports(&far);
    let alone = exercise(&near, &far);
    let mut held = Vec::new();
    for port in [ports.control, ports.native, ports.mooncake] {
        for index in 0..334 {
            let mut socket = connect(port);
            // Every third says nothing, the others the start of something.
            let start: &[u8] = match index % 3 {
                0 => b"",
                1 => b"TIDEWIRE",
                _ => &[200, 0, 0, 0, 0, 0, 0, 0, 1],
            };
            let _ = socket.write_all(start);
            held.push(socket);
        }
    }
    let crowded = (0..3).map(|_| exercise(&near, &far)).min().unwrap();
    println!("alone {alone:?}, among {} idle connections {crowded:?}", held.len());
    assert!(crowded < Duration::from_secs(1), "{crowded:?}");
}

#[test]
fn connections_leave_no_descriptor_behind() {
    let far = engine("tcp,mooncake-tcp");
    let ports = ports(&far);
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let round = || {
        for port in [ports.control, ports.native, ports.mooncake] {
            for _ in 0..50 {
                let mut socket = connect(port);
                let _ = socket.write_all(&[7; 64]);
                let _ = socket.shutdown(std::net::Shutdown::Write);
                let _ = socket.take(1 << 20).read_to_end(&mut Vec::new());
            }
        }
    };
    round();
    let before = count();
    for _ in 0..4 {
        round();
    }
    // Other tests of this binary open and close descriptors meanwhile; a leak of one per connection would be 600.
    let deadline = Instant::now() + Duration::from_secs(10);
    while count() > before + 200 {
        assert!(Instant::now() < deadline, "{before} descriptors before, {} after", count());
        std::thread::yield_now();
    }
}
