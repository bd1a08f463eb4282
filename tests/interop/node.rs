//! One Tidewire engine's worth of parts: memory, registration, control server, data port, links.

use std::{
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tidewire_core::{
    BatchStatus, ByteRange, Location, Opcode,
    mooncake::{
        descriptor::{BufferDescriptor, SegmentDescriptor},
        host::HostPort,
        keys::KeySpace,
    },
};
use tidewire_engine::{
    batch::BatchCore,
    control::{
        ControlClient, ControlHandler, ControlServer, NotifyRefused, ServerConfig,
        listen::{PortChoice, listen},
    },
    memory::RegionTable,
    metadata::{MetadataStore, p2p::P2pStore},
    transport::{
        Link, Peer, Slice, Transport,
        mooncake_tcp::{MooncakeTcp, MooncakeTcpOptions},
    },
};
use tokio::runtime::Handle;

/// Longest time a batch may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Entry of a batch: direction, offset in the own memory, address in the target, length.
pub type Entry = (Opcode, usize, u64, usize);

#[derive(Debug, Default)]
struct Handler {
    descriptor: Mutex<SegmentDescriptor>,
    notes: Mutex<Vec<(String, String)>>,
}

impl ControlHandler for Handler {
    fn metadata(&self, _request: &[u8]) -> Vec<u8> {
        self.descriptor.lock().unwrap().encode()
    }

    fn notify(&self, name: String, message: String) -> Result<(), NotifyRefused> {
        self.notes.lock().unwrap().push((name, message));
        Ok(())
    }
}

pub struct Node {
    pub control: Handle,
    pub client: ControlClient,
    pub transport: MooncakeTcp,
    pub base: u64,
    /// Segment name.
    pub name: String,
    memory: Vec<u8>,
    regions: Arc<RegionTable>,
    handler: Arc<Handler>,
    _server: ControlServer,
    ending: Option<(tokio::sync::oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Node {
    pub fn new(len: usize, options: MooncakeTcpOptions) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let control = runtime.handle().clone();
        let handler = Arc::new(Handler::default());
        let config = ServerConfig { port: PortChoice::Fixed(0), ..ServerConfig::default() };
        let server = ControlServer::start(config, handler.clone(), &control).unwrap();
        let name = server.address().to_string();
        let mut memory = vec![0u8; len];
        let base = memory.as_mut_ptr() as u64;
        let regions = Arc::new(RegionTable::default());
        regions.register(base, len as u64, Location::Any, None).unwrap();
        let port = listen("127.0.0.1", &PortChoice::Fixed(0)).unwrap();
        let transport = MooncakeTcp::start(options, Arc::clone(&regions), Some(port)).unwrap();
        let mut descriptor = SegmentDescriptor::tcp(&*name, "127.0.0.1", transport.data_address().unwrap().port());
        descriptor.buffers.push(BufferDescriptor::memory(&*name, base, len as u64));
        *handler.descriptor.lock().unwrap() = descriptor;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn(move || {
            // Ends by the drop of the sender.
            let _ = runtime.block_on(stopped);
        });
        let client = ControlClient::default();
        let ending = Some((stop, thread));
        Node { control, client, transport, base, name, memory, regions, handler, _server: server, ending }
    }

    /// Finds a segment by its name and connects to it.
    pub fn open(&self, name: &str) -> Arc<dyn Link> {
        let store = P2pStore::new(self.client.clone(), KeySpace::default());
        let entry = self.control.block_on(store.get(&KeySpace::default().ram(name))).unwrap().unwrap();
        let descriptor = Arc::new(SegmentDescriptor::decode(&entry.value).unwrap());
        assert_eq!(descriptor.name, name);
        let peer = Peer { segment: name.to_owned(), address: name.to_owned(), descriptor };
        self.transport.connect(Arc::new(peer)).unwrap()
    }

    pub fn submit(&self, link: &Arc<dyn Link>, entries: &[Entry]) -> Arc<BatchCore> {
        let max = self.transport.capabilities().max_slice_bytes;
        let batch = BatchCore::new(entries.len());
        let pin = self.regions.at(self.base).unwrap().pin().unwrap();
        let counts: Vec<u32> = entries.iter().map(|e| (e.3 as u64).div_ceil(max) as u32).collect();
        let submit = batch.begin(&counts, vec![pin], None).unwrap();
        let mut slices = Vec::new();
        for (index, &(opcode, offset, remote, len)) in entries.iter().enumerate() {
            for done in (0..len as u64).step_by(max as usize) {
                let piece = max.min(len as u64 - done);
                let target = ByteRange::new(remote + done, piece).unwrap();
                let local = self.base + offset as u64 + done;
                slices.push(Slice { opcode, local, target, token: submit.token(index, piece) });
            }
        }
        link.submit(&mut slices);
        assert!(slices.is_empty());
        batch
    }

    pub fn run(&self, link: &Arc<dyn Link>, entries: &[Entry]) -> BatchStatus {
        let batch = self.submit(link, entries);
        assert!(batch.park(Instant::now() + PATIENCE), "batch hangs: {}", link.describe());
        batch.status()
    }

    /// Unregisters the memory; who moves its bytes after `drain` is cut off.
    pub fn unregister(&self, drain: Duration) {
        self.regions.unregister(self.base, drain, |region| self.transport.evict(region, drain)).unwrap();
    }

    pub fn notes(&self) -> Vec<(String, String)> {
        std::mem::take(&mut self.handler.notes.lock().unwrap())
    }

    /// The memory, as others left it.
    pub fn memory(&self) -> &[u8] {
        std::hint::black_box(&self.memory)
    }

    /// The memory, to be filled.
    pub fn memory_mut(&mut self) -> &mut [u8] {
        std::hint::black_box(&mut self.memory)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.ending.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

/// Control address of a segment in p2p discovery.
pub fn address(name: &str) -> HostPort {
    HostPort::parse(name)
}

/// Bytes that depend on the seed and do not repeat.
pub fn random_bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    };
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| next().to_le_bytes()).collect();
    bytes.truncate(len);
    bytes
}
