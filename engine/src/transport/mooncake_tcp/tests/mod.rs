//! Mooncake's data protocol against a peer that is written out byte by byte; what both sides' tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod initiator;
mod target;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use tidewire_core::{
    BatchStatus, ByteRange, Location, Opcode, TaskState, TransferError,
    mooncake::data::{DataHeader, DataStatus, HEADER_BYTES, STATUS_BYTES},
    mooncake::descriptor::SegmentDescriptor,
};

use super::{MooncakeTcp, MooncakeTcpOptions};
use crate::{
    batch::BatchCore,
    control::listen::{PortChoice, listen},
    memory::RegionTable,
    transport::{Link, Peer, Slice, Transport},
};

const PATIENCE: Duration = Duration::from_secs(20);

/// One engine's worth: memory, its registration, the transport.
struct Node {
    memory: Vec<u8>,
    base: u64,
    regions: Arc<RegionTable>,
    transport: MooncakeTcp,
}

impl Node {
    fn new(len: usize, listening: bool, options: MooncakeTcpOptions) -> Self {
        let mut memory = vec![0u8; len];
        let base = memory.as_mut_ptr() as u64;
        let regions = Arc::new(RegionTable::default());
        regions.register(base, len as u64, Location::Any, None).unwrap();
        let port = listening.then(|| listen("127.0.0.1", &PortChoice::Fixed(0)).unwrap());
        let transport = MooncakeTcp::start(options, Arc::clone(&regions), port).unwrap();
        Node { memory, base, regions, transport }
    }

    fn target(len: usize) -> Self {
        Node::new(len, true, MooncakeTcpOptions::default())
    }

    fn initiator(len: usize) -> Self {
        Node::new(len, false, MooncakeTcpOptions::default())
    }

    fn address(&self) -> SocketAddr {
        self.transport.data_address().unwrap()
    }

    fn link_to(&self, address: SocketAddr, version: u32) -> Arc<dyn Link> {
        let mut descriptor = SegmentDescriptor::tcp("seg", address.ip().to_string(), address.port());
        descriptor.tcp_proto_version = version;
        let peer = Peer { segment: "seg".into(), address: "127.0.0.1:1".into(), descriptor: Arc::new(descriptor) };
        self.transport.connect(Arc::new(peer)).unwrap()
    }

    /// Submits entries `(opcode, local offset, target address, length)` as one batch.
    fn submit(&self, link: &Arc<dyn Link>, entries: &[(Opcode, usize, u64, u64)]) -> Arc<BatchCore> {
        let max = self.transport.capabilities().max_slice_bytes;
        let batch = BatchCore::new(entries.len());
        let region = self.regions.at(self.base).unwrap();
        let counts: Vec<u32> = entries.iter().map(|e| e.3.div_ceil(max) as u32).collect();
        let submit = batch.begin(&counts, vec![region.pin().unwrap()], None).unwrap();
        let mut slices = Vec::new();
        for (index, &(opcode, offset, remote, len)) in entries.iter().enumerate() {
            let mut done = 0;
            while done < len {
                let piece = max.min(len - done);
                let target = ByteRange::new(remote + done, piece).unwrap();
                let local = self.base + offset as u64 + done;
                slices.push(Slice { opcode, local, target, token: submit.token(index, piece) });
                done += piece;
            }
        }
        link.submit(&mut slices);
        assert!(slices.is_empty(), "no back-pressure expected");
        batch
    }

    fn run(&self, link: &Arc<dyn Link>, entries: &[(Opcode, usize, u64, u64)]) -> BatchStatus {
        let batch = self.submit(link, entries);
        assert!(batch.park(Instant::now() + PATIENCE), "batch hangs: {:?}", link.describe());
        batch.status()
    }
}

fn fill(memory: &mut [u8], seed: u64) {
    let mut state = seed | 1;
    for byte in memory {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        *byte = (state >> 56) as u8;
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::yield_now();
    }
}

/// A raw connection to a data port.
struct Raw(TcpStream);

impl Raw {
    fn new(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Raw(stream)
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Whatever comes until the peer closes or resets.
    fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = self.0.read_to_end(&mut bytes);
        bytes
    }
}

fn header(opcode: u8, addr: u64, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    bytes[..8].copy_from_slice(&size.to_le_bytes());
    bytes[8..16].copy_from_slice(&addr.to_le_bytes());
    bytes[16] = opcode;
    // Official senders leave garbage here.
    bytes[17..].fill(0xa5);
    bytes
}
