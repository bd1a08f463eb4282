//! Registering that fails half-way.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tidewire_engine::{
    Config, Location, TransferEngine, TransferError, TransportKind,
    memory::{LocalRegion, RegionPin},
    metadata::{
        Entry, Expect, Lifetime, MetadataStore, StoreCapabilities, StoreError, StoreFuture, WatchEvent,
        memory::MemoryStore,
    },
    transport::{Capabilities, Link, Peer, Transport},
};

use crate::support::wait_until;

/// A transport that refuses every region, and stays in the first.
#[derive(Debug, Default)]
struct Clinging {
    pin: Mutex<Option<RegionPin>>,
}

impl Transport for Clinging {
    fn kind(&self) -> TransportKind {
        TransportKind::Fake
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { max_slice_bytes: 1 << 20, synchronous: true, target_checks_range: true }
    }

    fn connect(&self, _: Arc<Peer>) -> Result<Arc<dyn Link>, TransferError> {
        Err(refusal())
    }

    fn register(&self, region: &Arc<LocalRegion>) -> Result<(), TransferError> {
        *self.pin.lock().unwrap() = region.pin();
        Err(refusal())
    }

    fn shutdown(&self, _: Duration) {}
}

fn refusal() -> TransferError {
    TransferError::Unavailable { what: "clinging".to_owned(), reason: "as it is".to_owned() }
}

#[test]
#[allow(unsafe_code, reason = "registers memory of its own")]
fn memory_that_a_failed_registration_cannot_free_is_reported_as_in_use() {
    let transport = Arc::new(Clinging::default());
    let mut config = Config::default();
    config.transports = vec![TransportKind::Local];
    config.unregister_drain = Duration::from_millis(20);
    let engine = TransferEngine::builder("127.0.0.1").config(config).transport(transport.clone()).build().unwrap();
    let mut memory = vec![0u8; 4096];
    let base = memory.as_mut_ptr();
    // SAFETY: `memory` outlives the engine.
    let result = unsafe { engine.register_memory(base, 4096, Location::Any) };
    match result {
        Err(TransferError::StillInUse { range, .. }) => assert_eq!(range.addr(), base as u64),
        other => panic!("{other:?}"),
    }
    transport.pin.lock().unwrap().take();
    engine.unregister_memory(base as u64).unwrap();
    // SAFETY: as above.
    let result = unsafe { engine.register_memory_batch(&[(base, 100), (base.wrapping_add(100), 100)], Location::Any) };
    assert!(matches!(result, Err(TransferError::StillInUse { .. })), "{result:?}");
    transport.pin.lock().unwrap().take();
    engine.unregister_memory(base as u64).unwrap();
    assert!(matches!(engine.unregister_memory(base as u64), Err(TransferError::NotRegistered { .. })));
    drop(engine);
}

/// A store that applies a write and answers it with an error.
#[derive(Debug)]
struct Late {
    inner: MemoryStore,
    late: AtomicBool,
}

impl MetadataStore for Late {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn capabilities(&self) -> StoreCapabilities {
        self.inner.capabilities()
    }

    fn put<'a>(&'a self, key: &'a str, value: &'a [u8], lifetime: Lifetime) -> StoreFuture<'a, u64> {
        Box::pin(async move {
            let revision = self.inner.put(key, value, lifetime).await?;
            if self.late.swap(false, Ordering::AcqRel) {
                let reason = "no answer".to_owned();
                return Err(StoreError::Unreachable { store: self.describe(), reason });
            }
            Ok(revision)
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>> {
        self.inner.get(key)
    }

    fn remove<'a>(&'a self, key: &'a str) -> StoreFuture<'a, bool> {
        self.inner.remove(key)
    }

    fn compare_and_put<'a>(
        &'a self,
        key: &'a str,
        expect: Expect,
        value: &'a [u8],
        lifetime: Lifetime,
    ) -> StoreFuture<'a, Option<u64>> {
        self.inner.compare_and_put(key, expect, value, lifetime)
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<Entry>> {
        self.inner.list(prefix)
    }

    fn watch<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, tokio::sync::mpsc::Receiver<WatchEvent>> {
        self.inner.watch(prefix)
    }

    fn close(&self) -> StoreFuture<'_, ()> {
        self.inner.close()
    }
}

#[test]
fn buffer_of_a_failed_registration_does_not_stay_published() {
    let config = || {
        let mut config = Config::default();
        config.metadata = "memory://late".to_owned();
        config.transports = vec![TransportKind::Tcp];
        config
    };
    let store = Arc::new(Late { inner: MemoryStore::open("late"), late: AtomicBool::new(false) });
    let owner = TransferEngine::builder("127.0.0.1:owner").config(config()).store(store.clone()).build().unwrap();
    let reader = TransferEngine::builder("127.0.0.1:reader").config(config()).build().unwrap();
    let kept = owner.allocate(64, Location::Any).unwrap();
    let segment = reader.open_segment(owner.segment_name()).unwrap();
    store.late.store(true, Ordering::Release);
    let failed = owner.allocate(4096, Location::Any);
    assert!(matches!(failed, Err(TransferError::Metadata { .. })), "{failed:?}");
    wait_until("a buffer that is not registered is published", || {
        reader.open_segment_no_cache(owner.segment_name()).unwrap();
        let buffers = reader.segment_info(segment).unwrap().buffers;
        buffers.iter().map(|buffer| buffer.addr).eq([kept.addr()])
    });
}
