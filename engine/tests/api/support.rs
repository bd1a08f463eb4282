//! Engines, buffers and a scripted peer.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tidewire_engine::{
    Buffer, Config, Location, Opcode, SegmentId, TransferEngine, TransferRequest, TransportKind,
    memory::{
        RegionTable,
        alloc::{self, SharedAllocation},
    },
    transport::fake::FakeTransport,
};

/// Longest time a test waits for what must happen.
pub const LIMIT: Duration = Duration::from_secs(10);

/// An engine with the given transports, deaf to the environment.
pub fn engine(kinds: &[TransportKind]) -> TransferEngine {
    TransferEngine::builder("127.0.0.1").config(Config::default()).transports(kinds).build().unwrap()
}

pub fn buffer(engine: &TransferEngine, len: usize) -> Buffer {
    engine.allocate(len, Location::Cpu(0)).unwrap()
}

pub fn write(source: u64, target: SegmentId, target_offset: u64, length: u64) -> TransferRequest {
    TransferRequest { opcode: Opcode::Write, source, target, target_offset, length }
}

pub fn read(source: u64, target: SegmentId, target_offset: u64, length: u64) -> TransferRequest {
    TransferRequest { opcode: Opcode::Read, ..write(source, target, target_offset, length) }
}

/// Bytes that differ along the buffer and between seeds.
pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8).wrapping_add(seed)).collect()
}

pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

/// An initiator whose only way to a peer is a scripted transport.
pub struct Scripted {
    pub engine: TransferEngine,
    pub fake: Arc<FakeTransport>,
    pub segment: SegmentId,
    pub here: Buffer,
    /// What the peer has.
    pub there: Arc<SharedAllocation>,
    /// Gives the descriptor; takes part in nothing else.
    pub peer: TransferEngine,
}

pub const SCRIPTED_LEN: usize = 1 << 16;

pub fn scripted(change: impl FnOnce(&mut Config)) -> Scripted {
    let regions = Arc::new(RegionTable::default());
    let there = alloc::allocate(SCRIPTED_LEN).unwrap();
    regions.register(there.addr(), SCRIPTED_LEN as u64, Location::Any, None).unwrap();
    let fake = FakeTransport::new(regions);
    let peer = engine(&[TransportKind::Local]);
    let mut config = Config::default();
    config.transports = vec![TransportKind::Local];
    config.unregister_drain = Duration::from_millis(50);
    change(&mut config);
    let engine = TransferEngine::builder("127.0.0.1").config(config).transport(fake.clone()).build().unwrap();
    let here = buffer(&engine, SCRIPTED_LEN);
    here.write_at(0, &pattern(SCRIPTED_LEN, 3)).unwrap();
    let segment = engine.open_segment(peer.segment_name()).unwrap();
    Scripted { engine, fake, segment, here, there, peer }
}

impl Scripted {
    /// Writes of `len` bytes each, side by side.
    pub fn writes(&self, count: u64, len: u64) -> Vec<TransferRequest> {
        (0..count).map(|i| write(self.here.addr() + i * len, self.segment, self.there.addr() + i * len, len)).collect()
    }

    /// The first bytes of the peer's memory.
    pub fn arrived(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.there.copy_out(0, &mut bytes).unwrap();
        bytes
    }
}
