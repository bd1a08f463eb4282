//! An initiator that asks for ever and never takes the answers.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    time::Duration,
};

use tidewire_engine::{
    control::ControlClient,
    core::{
        ByteRange, Generation, Location, Opcode,
        mooncake::{
            descriptor::{NativeExtension, SegmentDescriptor},
            host::HostPort,
        },
        native::{
            frame::{FrameHeader, FrameKind, push_entry},
            hello::{HELLO_LEN, Hello, Welcome},
        },
    },
};

use super::target::{Target, engine, request};

const LEN: u64 = 1 << 20;

/// What a segment publishes, asked of its control port.
pub fn descriptor(segment: &str) -> SegmentDescriptor {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answer = runtime.block_on(ControlClient::default().fetch_descriptor(&HostPort::parse(segment)));
    answer.unwrap().unwrap()
}

fn shake_hands(native: &NativeExtension) -> TcpStream {
    let mut socket = TcpStream::connect(("127.0.0.1", native.data_port)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let hello = Hello {
        oldest: 1,
        newest: 1,
        features: 0,
        token: u128::from_str_radix(&native.token, 16).unwrap().to_be_bytes(),
        generation: Generation(u64::from_str_radix(&native.generation, 16).unwrap()),
        session: 4242,
        stream: 0,
        attempt: 1,
    };
    socket.write_all(&hello.encode()).unwrap();
    let mut answer = [0; HELLO_LEN];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(Welcome::decode(&answer).unwrap().refused, None);
    socket
}

/// Resident memory of a process in KiB.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Writes requests until the socket takes no more for a second; bytes taken.
fn flood(socket: &mut TcpStream, request: &[u8]) -> usize {
    // More than the buffers of any socket; a target that goes on reading takes it all.
    const ENDLESS: usize = 128 << 20;
    let many = request.repeat(1000);
    socket.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let mut sent = 0;
    while sent < ENDLESS {
        match socket.write(&many[sent % request.len()..]) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return sent,
            Err(error) => panic!("the target closed the connection after {sent} bytes: {error}"),
        }
    }
    panic!("the target took {sent} bytes of requests without their answers being read")
}

#[test]
fn who_never_reads_is_not_read_from_and_costs_no_memory() {
    let target = Target::start(LEN, "tcp");
    let native = descriptor(&target.name).tidewire.unwrap();
    let mut table = Vec::new();
    push_entry(&mut table, ByteRange::new(target.addr, LEN).unwrap());
    let header = FrameHeader {
        kind: FrameKind::Read,
        checksum: false,
        entries_or_status: 1,
        id: 1,
        payload_len: LEN,
        table_crc_or_entry: crc32c::crc32c(&table),
    };
    let read = [header.encode().as_slice(), &table].concat();
    let near = engine("tcp");
    let buffer = near.allocate(LEN as usize, Location::Any).unwrap();
    let segment = near.open_segment(&target.name).unwrap();
    let transfer = || {
        let requests = [Opcode::Write, Opcode::Read].map(|op| request(op, buffer.addr(), segment, target.addr, LEN));
        for request in requests {
            near.transfer_sync(&[request], Duration::from_secs(10)).unwrap();
        }
    };
    transfer();
    let before = resident(target.pid());
    let mut greedy = shake_hands(&native);
    let sent = flood(&mut greedy, &read);
    assert!(sent > read.len() * 64, "{sent}");
    for _ in 0..20 {
        transfer();
    }
    near.probe(&target.name).unwrap();
    let after = resident(target.pid());
    println!("{sent} bytes of requests taken; resident {before} KiB before, {after} KiB after");
    // 64 answers of 1 MiB each may be open; they are sent from where they lie.
    assert!(after < before + (16 << 10), "{before} KiB before, {after} KiB after");
    // The connection is held up, not lost: the answers come once they are read.
    let mut payload = vec![0; 2 * (32 + LEN as usize)];
    greedy.read_exact(&mut payload).unwrap();
    assert_eq!(FrameHeader::decode(&payload).unwrap().kind, FrameKind::ReadData);
}
