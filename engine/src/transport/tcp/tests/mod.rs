//! Two transports in one process over loopback: what is particular to TCP. The rules of every transport are in
//! `tests/conformance`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod faulty_target;
mod flow;
mod initiator;
mod raw;

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use tidewire_core::{
    ByteRange, Generation, Location, Opcode, TaskState,
    error::RefuseReason,
    mooncake::descriptor::{NativeExtension, SegmentDescriptor},
    native::{
        frame::{FrameHeader, FrameKind, FrameStatus, HEADER_LEN, push_entry},
        hello::{HELLO_LEN, Hello, Welcome},
    },
};

use super::*;
use crate::{
    batch::BatchCore,
    transport::{Drive, Slice},
};

const GENERATION: Generation = Generation(77);
const TOKEN: [u8; 16] = [9; 16];

struct End {
    memory: Vec<u8>,
    transport: Arc<TcpTransport>,
    regions: Arc<RegionTable>,
}

impl End {
    fn new(len: usize, options: TcpOptions) -> Self {
        let memory = vec![0; len];
        let regions = Arc::new(RegionTable::default());
        regions.register(memory.as_ptr() as u64, len as u64, Location::Any, None).unwrap();
        let identity = Identity { segment: "end".into(), generation: GENERATION, token: TOKEN, host_id: String::new() };
        let transport = TcpTransport::start(options, Arc::new(identity), Arc::clone(&regions)).unwrap();
        End { memory, transport, regions }
    }

    fn addr(&self) -> u64 {
        self.memory.as_ptr() as u64
    }

    fn peer(&self) -> Arc<Peer> {
        self.peer_with(&"09".repeat(16), GENERATION)
    }

    fn peer_with(&self, token: &str, generation: Generation) -> Arc<Peer> {
        let extension = NativeExtension {
            version: 1,
            generation: generation.to_string(),
            token: token.into(),
            data_port: self.transport.port(),
            ..Default::default()
        };
        let descriptor = SegmentDescriptor { name: "end".into(), tidewire: Some(extension), ..Default::default() };
        Arc::new(Peer { segment: "end".into(), address: "127.0.0.1:1".into(), descriptor: Arc::new(descriptor) })
    }

    /// A raw connection past the handshake.
    fn raw(&self, session: u64, attempt: u32) -> (TcpStream, Welcome) {
        let mut socket = TcpStream::connect(("127.0.0.1", self.transport.port())).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let hello = Hello {
            oldest: 1,
            newest: 1,
            features: 1,
            token: TOKEN,
            generation: GENERATION,
            session,
            stream: 0,
            attempt,
        };
        socket.write_all(&hello.encode()).unwrap();
        let mut answer = [0; HELLO_LEN];
        socket.read_exact(&mut answer).unwrap();
        let welcome = Welcome::decode(&answer).unwrap();
        (socket, welcome)
    }
}

fn pair(len: usize, options: TcpOptions) -> (End, End, Arc<dyn Link>) {
    let (a, b) = (End::new(len, options.clone()), End::new(len, options));
    let link = a.transport.connect(b.peer()).unwrap();
    (a, b, link)
}

fn start(link: &Arc<dyn Link>, opcode: Opcode, ranges: &[(u64, u64, u64)]) -> Arc<BatchCore> {
    let batch = BatchCore::new(ranges.len());
    let submit = batch.begin(&vec![1; ranges.len()], vec![], None).unwrap();
    let mut slices = Vec::new();
    for (index, (local, target, len)) in ranges.iter().enumerate() {
        let target = ByteRange::new(*target, *len).unwrap();
        slices.push(Slice { opcode, local: *local, target, token: submit.token(index, *len) });
    }
    link.submit(&mut slices);
    assert!(slices.is_empty());
    batch
}

fn soon() -> Drive {
    Drive { deadline: Instant::now() + Duration::from_secs(20), spin: Duration::from_micros(20) }
}

fn frame(kind: FrameKind, id: u64, entries: &[(u64, u64)], payload_len: u64) -> Vec<u8> {
    let mut table = Vec::new();
    for (addr, len) in entries {
        push_entry(&mut table, ByteRange::new(*addr, *len).unwrap());
    }
    let header = FrameHeader {
        kind,
        checksum: false,
        entries_or_status: entries.len() as u16,
        id,
        payload_len,
        table_crc_or_entry: crc32c::crc32c(&table),
    };
    [header.encode().as_slice(), &table].concat()
}

#[test]
fn checksummed_slices_of_odd_sizes_arrive_whole() {
    let options = TcpOptions { checksum: true, frame_bytes: 100_000, streams: 3, ..Default::default() };
    let (mut a, b, link) = pair(3 << 20, options);
    for (i, byte) in a.memory.iter_mut().enumerate() {
        *byte = (i * 31 + i / 251) as u8;
    }
    let mut ranges = Vec::new();
    let (mut at, mut len) = (0, 1);
    while at + len < 3 << 20 {
        ranges.push((a.addr() + at, b.addr() + at, len));
        (at, len) = (at + len, (len * 7 + 3) % 99_991 + 1);
    }
    let batch = start(&link, Opcode::Write, &ranges);
    assert!(link.drive(&batch, soon()));
    assert_eq!(batch.status().state, TaskState::Completed, "{:?}", batch.status().error);
    assert_eq!(a.memory[..at as usize], b.memory[..at as usize]);

    a.memory.fill(0);
    let batch = start(&link, Opcode::Read, &ranges);
    assert!(link.drive(&batch, soon()));
    assert_eq!(batch.status().state, TaskState::Completed, "{:?}", batch.status().error);
    assert_eq!(a.memory[..at as usize], b.memory[..at as usize]);
}

#[test]
fn a_bad_range_fails_alone() {
    let (a, b, link) = pair(1 << 20, TcpOptions::default());
    for opcode in [Opcode::Write, Opcode::Read] {
        let good = (a.addr(), b.addr(), 4096);
        let beyond = (a.addr(), b.addr() + (1 << 20) - 10, 11);
        let wild = (a.addr(), 16, 8);
        let batch = start(&link, opcode, &[good, beyond, good, wild, good]);
        assert!(link.drive(&batch, soon()));
        let states: Vec<TaskState> = (0..5).map(|i| batch.task_status(i).unwrap().state).collect();
        use TaskState::{Completed as C, Failed as F};
        assert_eq!(states, [C, F, C, F, C]);
        let error = batch.task_status(1).unwrap().error.unwrap();
        assert!(matches!(error, TransferError::OutOfBounds { range, .. } if range.len() == 11), "{error}");
    }
}

#[test]
fn strangers_are_refused_by_name() {
    let (a, b) = (End::new(4096, TcpOptions::default()), End::new(4096, TcpOptions::default()));
    let refused = |peer| match a.transport.connect(peer) {
        Err(TransferError::HandshakeRefused { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(b.peer_with(&"0a".repeat(16), GENERATION)), RefuseReason::Token);
    assert_eq!(refused(b.peer_with(&"09".repeat(16), Generation(1))), RefuseReason::Generation);
    assert_eq!(b.transport.target_status().refused, 2);
    let malformed = a.transport.connect(b.peer_with("zz", GENERATION)).unwrap_err();
    assert!(matches!(malformed, TransferError::Unreachable { .. }), "{malformed}");
}

#[test]
fn cancel_fails_one_batch_and_repeats_the_others() {
    let options = TcpOptions { streams: 1, ..Default::default() };
    let (a, b, link) = pair(32 << 20, options);
    let many: Vec<_> = (0..32).map(|i| (a.addr() + (i << 20), b.addr() + (i << 20), 1 << 20)).collect();
    let doomed = start(&link, Opcode::Write, &many);
    let kept = start(&link, Opcode::Write, &many[..4]);
    link.cancel(&doomed, &|_| TransferError::Cancelled);
    assert!(doomed.is_settled());
    assert_eq!(doomed.status().state, TaskState::Cancelled);
    assert!(link.drive(&kept, soon()));
    assert_eq!(kept.status().state, TaskState::Completed, "{:?}", kept.status().error);
    assert_eq!(link.open_slices(), 0);
}

#[test]
fn a_detached_link_settles_without_a_driver() {
    let (a, b, link) = pair(8 << 20, TcpOptions::default());
    for opcode in [Opcode::Write, Opcode::Read] {
        let batch = start(&link, opcode, &[(a.addr(), b.addr(), 1 << 20), (a.addr() + (4 << 20), b.addr(), 1 << 20)]);
        link.detach();
        assert!(batch.park(Instant::now() + Duration::from_secs(20)));
        assert_eq!(batch.status().state, TaskState::Completed);
    }
}

#[test]
fn a_connection_that_pauses_for_fairness_goes_on_by_itself() {
    // Longer than the bytes a connection moves in one turn, at odd lengths, many times; with heartbeats out of the way
    // a frame left behind anywhere would wait for the deadline.
    let hour = Duration::from_secs(3600);
    let options = TcpOptions { heartbeat_interval: hour, heartbeat_timeout: hour, streams: 1, ..Default::default() };
    let (a, b, link) = pair(24 << 20, options);
    for round in 0..60u64 {
        let opcode = if round % 2 == 0 { Opcode::Write } else { Opcode::Read };
        let len = (1 << 20) - round * 17;
        let ranges: Vec<_> = (0..23).map(|i| (a.addr() + i * len, b.addr() + i * len, len)).collect();
        let batch = start(&link, opcode, &ranges);
        assert!(link.drive(&batch, soon()), "round {round}");
        assert_eq!(batch.status().state, TaskState::Completed);
    }
}

#[test]
fn a_target_at_its_limit_refuses_by_name_and_serves_on() {
    let a = End::new(8 << 20, TcpOptions { streams: 3, ..Default::default() });
    let b = End::new(8 << 20, TcpOptions { max_connections: 1, ..Default::default() });
    let link = a.transport.connect(b.peer()).unwrap();
    let ranges: Vec<_> = (0..8).map(|i| (a.addr() + (i << 20), b.addr() + (i << 20), 1 << 20)).collect();
    for _ in 0..5 {
        let batch = start(&link, Opcode::Write, &ranges);
        assert!(link.drive(&batch, soon()));
        assert_eq!(batch.status().state, TaskState::Completed, "{:?}", batch.status().error);
    }
    let other = End::new(4096, TcpOptions::default());
    let refused = other.transport.connect(b.peer()).unwrap_err();
    assert!(matches!(refused, TransferError::HandshakeRefused { reason: RefuseReason::Limit, .. }), "{refused}");
}

#[test]
fn a_taken_port_leaves_no_thread_behind() {
    let taken = End::new(4096, TcpOptions::default());
    let port = taken.transport.port();
    let threads = || {
        let names = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        names
            .filter(|t| std::fs::read_to_string(t.path().join("comm")).is_ok_and(|n| n.starts_with("tw-tcp-9")))
            .count()
    };
    for _ in 0..3 {
        let options = TcpOptions { ports: (port, port), threads: 10, ..Default::default() };
        let identity = Identity { segment: "x".into(), generation: GENERATION, token: TOKEN, host_id: String::new() };
        let error = TcpTransport::start(options, Arc::new(identity), Arc::default()).unwrap_err();
        assert!(matches!(error, TransferError::Os { .. }), "{error}");
    }
    assert_eq!(threads(), 0);
}

#[test]
fn many_threads_share_one_link() {
    let (a, b, link) = pair(16 << 20, TcpOptions::default());
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let (link, from, to) = (&link, a.addr() + (thread << 20), b.addr() + (thread << 20));
            scope.spawn(move || {
                for round in 0..200u64 {
                    let opcode = if round % 3 == 0 { Opcode::Read } else { Opcode::Write };
                    let batch = start(link, opcode, &[(from, to, 4096), (from + 8192, to + 8192, 1 + round * 100)]);
                    assert!(link.drive(&batch, soon()), "thread {thread} round {round}");
                    assert_eq!(batch.status().state, TaskState::Completed);
                }
            });
        }
    });
    assert_eq!(link.open_slices(), 0);
}

#[test]
fn a_peer_that_goes_away_fails_the_open_slices_by_name() {
    let (a, b, link) = pair(4 << 20, TcpOptions::default());
    let (port, target) = (b.transport.port(), b.addr());
    drop(b);
    let batch = start(&link, Opcode::Write, &[(a.addr(), target, 1 << 20)]);
    let started = Instant::now();
    assert!(link.drive(&batch, soon()));
    assert!(started.elapsed() < Duration::from_secs(3));
    let error = batch.status().error.unwrap();
    assert!(matches!(&error, TransferError::PeerDown { segment, .. } if segment == "end"), "{error} (port {port})");
    assert!(link.failure().is_some());
    let after = start(&link, Opcode::Write, &[(a.addr(), target, 1)]);
    assert!(after.is_settled(), "a failed link fails new slices at once");
}
