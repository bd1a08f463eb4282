//! Nodes, memory and batches for the rules, and what differs between the siblings.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tidewire_core::{
    BatchStatus, ByteRange, Generation, Location, Opcode, TransferError,
    mooncake::descriptor::{BufferDescriptor, NativeExtension, SegmentDescriptor},
};
use tidewire_engine::{
    batch::BatchCore,
    control::listen::{PortChoice, listen},
    memory::{RegionTable, alloc::SharedAllocation, alloc::allocate},
    transport::{
        Drive, Identity, Link, Peer, Slice, Transport, TransportKind,
        fake::FakeTransport,
        local::LocalTransport,
        mooncake_tcp::{MooncakeTcp, MooncakeTcpOptions},
        shm::{SameHost, SameHostOptions},
        tcp::{TcpOptions, TcpTransport},
    },
};

/// Longest any rule waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What differs between the siblings.
pub trait Fixture: 'static {
    /// Name that a child process is told.
    const NAME: &'static str;
    const KIND: TransportKind;
    /// An engine's worth of the transport.
    fn node(segment: &str) -> Node;
    /// Whether this machine lets it work; says so if not.
    fn is_possible() -> bool {
        true
    }
    /// Two nodes, of which the first reaches the second.
    fn pair() -> (Node, Node) {
        (Self::node("initiator"), Self::node("target"))
    }
    /// Whether the `number`-th region of a target is memory that peers can map.
    fn is_shared(_number: usize) -> bool {
        false
    }
}

/// One side: an identity, its regions, a transport and what to publish of it.
pub struct Node {
    pub identity: Arc<Identity>,
    pub regions: Arc<RegionTable>,
    pub transport: Arc<dyn Transport>,
    pub extension: NativeExtension,
    /// Whatever else must live as long; dropped last.
    _keep: Box<dyn Any + Send + Sync>,
}

static NODES: AtomicU64 = AtomicU64::new(1);

impl Node {
    pub fn identity(segment: &str) -> Arc<Identity> {
        let number = NODES.fetch_add(1, Ordering::Relaxed);
        Arc::new(Identity {
            segment: segment.to_owned(),
            generation: Generation(u64::from(std::process::id()) << 32 | number),
            token: (u128::from(number) << 64 | 0x5eed).to_be_bytes(),
            host_id: tidewire_engine::transport::shm::host_id().unwrap(),
        })
    }

    pub fn extension(identity: &Identity, transports: &[TransportKind]) -> NativeExtension {
        NativeExtension {
            version: 1,
            generation: identity.generation.to_string(),
            token: format!("{:032x}", u128::from_be_bytes(identity.token)),
            transports: transports.iter().map(|k| k.name().to_owned()).collect(),
            host_id: identity.host_id.clone(),
            pid: std::process::id(),
            ..NativeExtension::default()
        }
    }

    /// Registers `memory`; with its file if `shared`.
    pub fn register(&self, memory: &Arc<SharedAllocation>, shared: bool) {
        let backing = shared.then(|| memory.window(0));
        let region = self.regions.register(memory.addr(), memory.len() as u64, Location::Any, backing).unwrap();
        self.transport.register(&region).unwrap();
    }

    /// Registers the inner part of `memory`, `margin` bytes from both ends: nothing registered is its neighbour.
    pub fn register_inner(&self, memory: &Arc<SharedAllocation>, margin: u64, shared: bool) {
        let backing = shared.then(|| memory.window(margin));
        let (addr, len) = (memory.addr() + margin, memory.len() as u64 - 2 * margin);
        let region = self.regions.register(addr, len, Location::Any, backing).unwrap();
        self.transport.register(&region).unwrap();
    }

    pub fn unregister(&self, memory: &SharedAllocation, drain: Duration) -> Result<(), TransferError> {
        let evict = |region: &Arc<_>| self.transport.evict(region, drain);
        self.regions.unregister(memory.addr(), drain, evict).map(|_| ())
    }

    /// What discovery would say of this node now.
    pub fn descriptor(&self) -> SegmentDescriptor {
        let buffers = self.regions.snapshot();
        SegmentDescriptor {
            name: self.identity.segment.clone(),
            protocol: "tcp".to_owned(),
            buffers: buffers
                .iter()
                .map(|r| BufferDescriptor {
                    name: "cpu:0".to_owned(),
                    addr: r.range().addr(),
                    length: r.range().len(),
                    ..BufferDescriptor::default()
                })
                .collect(),
            tcp_data_host: self.extension.data_host.clone(),
            tcp_data_port: if self.transport.kind() == TransportKind::MooncakeTcp {
                self.extension.data_port
            } else {
                0
            },
            tcp_proto_version: 2,
            tidewire: Some(self.extension.clone()),
            ..SegmentDescriptor::default()
        }
    }

    pub fn try_connect(&self, descriptor: SegmentDescriptor) -> Result<Arc<dyn Link>, TransferError> {
        let segment = descriptor.name.clone();
        let address = "127.0.0.1:1".to_owned();
        self.transport.connect(Arc::new(Peer { segment, address, descriptor: Arc::new(descriptor) }))
    }

    pub fn connect(&self, target: &Node) -> Arc<dyn Link> {
        self.try_connect(target.descriptor()).unwrap()
    }

    /// Cuts `ops` into slices of a new batch.
    pub fn prepare(&self, ops: &[Op]) -> (Arc<BatchCore>, Vec<Slice>) {
        let longest = self.transport.capabilities().max_slice_bytes;
        let batch = BatchCore::new(ops.len());
        let counts: Vec<u32> = ops.iter().map(|op| op.len.div_ceil(longest) as u32).collect();
        let pins = ops.iter().filter_map(|op| self.regions.find(ByteRange::new(op.local, op.len)?)?.pin()).collect();
        let submit = batch.begin(&counts, pins, None).unwrap();
        let mut slices = Vec::new();
        for (index, op) in ops.iter().enumerate() {
            for start in (0..op.len).step_by(longest as usize) {
                let len = longest.min(op.len - start);
                slices.push(Slice {
                    opcode: op.opcode,
                    local: op.local + start,
                    target: ByteRange::new(op.target + start, len).unwrap(),
                    token: submit.token(index, len),
                });
            }
        }
        (batch, slices)
    }

    /// Moves `ops` over `link` and waits.
    pub fn run(&self, link: &dyn Link, ops: &[Op]) -> (Arc<BatchCore>, BatchStatus) {
        let (batch, slices) = self.prepare(ops);
        push(link, &batch, slices);
        let deadline = Instant::now() + PATIENCE;
        assert!(link.drive(&batch, Drive { deadline, spin: Duration::ZERO }), "batch does not settle: {batch:?}");
        let status = batch.status();
        (batch, status)
    }
}

/// Submits all `slices`, waiting where the link pushes back.
pub fn push(link: &dyn Link, batch: &Arc<BatchCore>, mut slices: Vec<Slice>) {
    let deadline = Instant::now() + PATIENCE;
    while !slices.is_empty() {
        link.submit(&mut slices);
        if !slices.is_empty() {
            assert!(Instant::now() < deadline, "link takes no slices: {}", link.describe());
            let soon = Instant::now() + Duration::from_millis(1);
            link.drive(batch, Drive { deadline: soon, spin: Duration::ZERO });
        }
    }
}

/// Waits until `done`, and fails the test if that takes too long.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited too long for: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    pub opcode: Opcode,
    pub local: u64,
    pub target: u64,
    pub len: u64,
}

impl Op {
    pub fn write(local: u64, target: u64, len: u64) -> Op {
        Op { opcode: Opcode::Write, local, target, len }
    }

    pub fn read(local: u64, target: u64, len: u64) -> Op {
        Op { opcode: Opcode::Read, local, target, len }
    }
}

/// Memory of `len` bytes, filled with a pattern of `seed`.
pub fn patterned(len: usize, seed: u64) -> Arc<SharedAllocation> {
    let memory = allocate(len).unwrap();
    memory.copy_in(0, &pattern(len, seed)).unwrap();
    memory
}

/// Bytes that differ from place to place: random blocks of a prime length, each with its number.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    const BLOCK: usize = 4093;
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = (0..len.min(BLOCK).div_ceil(8)).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    let block: Vec<u8> = words.take(len.min(BLOCK)).collect();
    let mut bytes = Vec::with_capacity(len);
    for number in 0..len.div_ceil(BLOCK.max(1)) {
        let start = bytes.len();
        bytes.extend_from_slice(&block[..block.len().min(len - start)]);
        if let Some(head) = bytes.get_mut(start..start + 8) {
            head.copy_from_slice(&(number as u64 ^ seed).to_le_bytes());
        }
    }
    bytes
}

pub fn bytes_of(memory: &SharedAllocation, offset: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.copy_out(offset, &mut bytes).unwrap();
    bytes
}

pub struct Local;
pub struct Fake;
/// `shm` over memory that the engine allocated.
pub struct Shm;
/// `shm` over memory of which every second region is the caller's own.
pub struct ShmMixed;
pub struct Cma;
pub struct Tcp;
/// Mooncake's protocol, which knows no tokens.
pub struct Mooncake;

impl Fixture for Local {
    const NAME: &'static str = "local";
    const KIND: TransportKind = TransportKind::Local;

    fn node(segment: &str) -> Node {
        let (identity, regions) = (Node::identity(segment), Arc::new(RegionTable::default()));
        let transport = LocalTransport::new(Arc::clone(&regions));
        let extension = Node::extension(&identity, &[TransportKind::Local]);
        Node { identity, regions, transport, extension, _keep: Box::new(()) }
    }

    fn pair() -> (Node, Node) {
        let one = Self::node("self");
        let two = Node {
            identity: Arc::clone(&one.identity),
            regions: Arc::clone(&one.regions),
            transport: Arc::clone(&one.transport),
            extension: one.extension.clone(),
            _keep: Box::new(()),
        };
        (one, two)
    }
}

impl Fixture for Fake {
    const NAME: &'static str = "fake";
    const KIND: TransportKind = TransportKind::Fake;

    fn node(segment: &str) -> Node {
        let (identity, regions) = (Node::identity(segment), Arc::new(RegionTable::default()));
        let transport = FakeTransport::new(Arc::clone(&regions));
        let extension = Node::extension(&identity, &[TransportKind::Fake]);
        Node { identity, regions, transport, extension, _keep: Box::new(()) }
    }

    fn pair() -> (Node, Node) {
        let target = Self::node("target");
        let mut initiator = Self::node("initiator");
        initiator.transport = FakeTransport::new(Arc::clone(&target.regions));
        (initiator, target)
    }
}

/// A node with both same-host transports, of which `kind` is used.
pub fn same_host(segment: &str, kind: TransportKind, options: SameHostOptions) -> (Node, Arc<SameHost>) {
    let (identity, regions) = (Node::identity(segment), Arc::new(RegionTable::default()));
    let host = SameHost::start(Arc::clone(&identity), Arc::clone(&regions), options).unwrap();
    let mut extension = Node::extension(&identity, &[TransportKind::Shm, TransportKind::Cma]);
    extension.local_socket = host.socket_name().to_owned();
    let transport = if kind == TransportKind::Shm { host.shm() } else { host.cma() };
    let _keep = Box::new(Arc::clone(&host));
    (Node { identity, regions, transport, extension, _keep }, host)
}

impl Fixture for Shm {
    const NAME: &'static str = "shm";
    const KIND: TransportKind = TransportKind::Shm;

    fn node(segment: &str) -> Node {
        same_host(segment, Self::KIND, SameHostOptions { allow_cma: false, ..SameHostOptions::default() }).0
    }

    fn is_shared(_number: usize) -> bool {
        true
    }
}

impl Fixture for ShmMixed {
    const NAME: &'static str = "shm-mixed";
    const KIND: TransportKind = TransportKind::Shm;

    fn is_possible() -> bool {
        !crate::cma::skip(Self::NAME)
    }

    fn node(segment: &str) -> Node {
        same_host(segment, Self::KIND, SameHostOptions::default()).0
    }

    fn is_shared(number: usize) -> bool {
        number.is_multiple_of(2)
    }
}

impl Fixture for Cma {
    const NAME: &'static str = "cma";
    const KIND: TransportKind = TransportKind::Cma;

    fn is_possible() -> bool {
        !crate::cma::skip(Self::NAME)
    }

    fn node(segment: &str) -> Node {
        same_host(segment, Self::KIND, SameHostOptions::default()).0
    }
}

impl Fixture for Tcp {
    const NAME: &'static str = "tcp";
    const KIND: TransportKind = TransportKind::Tcp;

    fn node(segment: &str) -> Node {
        let (identity, regions) = (Node::identity(segment), Arc::new(RegionTable::default()));
        let options = TcpOptions { heartbeat_timeout: Duration::from_secs(2), ..TcpOptions::default() };
        let transport = TcpTransport::start(options, Arc::clone(&identity), Arc::clone(&regions)).unwrap();
        let mut extension = Node::extension(&identity, &[TransportKind::Tcp]);
        extension.data_host = "127.0.0.1".to_owned();
        extension.data_port = transport.port();
        Node { identity, regions, transport, extension, _keep: Box::new(()) }
    }
}

impl Fixture for Mooncake {
    const NAME: &'static str = "mooncake-tcp";
    const KIND: TransportKind = TransportKind::MooncakeTcp;

    fn node(segment: &str) -> Node {
        let (identity, regions) = (Node::identity(segment), Arc::new(RegionTable::default()));
        let options = MooncakeTcpOptions { progress_timeout: Duration::from_secs(2), ..MooncakeTcpOptions::default() };
        let port = listen("127.0.0.1", &PortChoice::Fixed(0)).unwrap();
        let transport = MooncakeTcp::start(options, Arc::clone(&regions), Some(port)).unwrap();
        let mut extension = Node::extension(&identity, &[TransportKind::MooncakeTcp]);
        extension.data_host = "127.0.0.1".to_owned();
        extension.data_port = transport.data_address().unwrap().port();
        Node { identity, regions, transport: Arc::new(transport), extension, _keep: Box::new(()) }
    }
}
