//! Engines that want one name: starting at once, being replaced, ending while a write is on its way.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tidewire_engine::{
    Config, Location, TransferEngine, TransferError, TransportKind,
    metadata::{
        Entry, Expect, Lifetime, MetadataStore, StoreCapabilities, StoreFuture, WatchEvent, memory::MemoryStore,
    },
};
use tokio::sync::{Barrier, Semaphore, mpsc::Receiver};

use crate::support::{LIMIT, wait_until};

const NAME: &str = "127.0.0.1:claimed";
const RPC_META: &str = "mooncake/rpc_meta/127.0.0.1:claimed";
const RAM: &str = "mooncake/ram/127.0.0.1:claimed";

/// A memory store whose calls can be held up, without sessions: what is put stays until it is removed.
#[derive(Debug)]
struct Held {
    inner: MemoryStore,
    guarded: bool,
    /// Engines that look at the name for the first time wait for each other here.
    first_look: Option<Barrier>,
    looks: AtomicUsize,
    /// While on, puts of a descriptor take a permit first.
    hold: AtomicBool,
    arrived: AtomicUsize,
    release: Semaphore,
}

impl Held {
    fn new(name: &str, guarded: bool, racers: usize) -> Arc<Self> {
        Arc::new(Held {
            inner: MemoryStore::open(name),
            guarded,
            first_look: (racers > 0).then(|| Barrier::new(racers)),
            looks: AtomicUsize::new(racers),
            hold: AtomicBool::new(false),
            arrived: AtomicUsize::new(0),
            release: Semaphore::new(0),
        })
    }

    fn value(&self, key: &str) -> Option<Vec<u8>> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(self.inner.get(key)).unwrap().map(|entry| entry.value)
    }
}

impl MetadataStore for Held {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn capabilities(&self) -> StoreCapabilities {
        StoreCapabilities { compare_and_put: self.guarded, ..self.inner.capabilities() }
    }

    fn put<'a>(&'a self, key: &'a str, value: &'a [u8], _lifetime: Lifetime) -> StoreFuture<'a, u64> {
        Box::pin(async move {
            if key == RAM && self.hold.load(Ordering::SeqCst) {
                self.arrived.fetch_add(1, Ordering::SeqCst);
                drop(self.release.acquire().await);
            }
            self.inner.put(key, value, Lifetime::Permanent).await
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>> {
        Box::pin(async move {
            let found = self.inner.get(key).await;
            let take = |left: usize| left.checked_sub(1);
            if let Some(barrier) = self.first_look.as_ref().filter(|_| key == RPC_META)
                && self.looks.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok()
            {
                barrier.wait().await;
            }
            found
        })
    }

    fn remove<'a>(&'a self, key: &'a str) -> StoreFuture<'a, bool> {
        self.inner.remove(key)
    }

    fn compare_and_put<'a>(
        &'a self,
        key: &'a str,
        expect: Expect,
        value: &'a [u8],
        _lifetime: Lifetime,
    ) -> StoreFuture<'a, Option<u64>> {
        self.inner.compare_and_put(key, expect, value, Lifetime::Permanent)
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<Entry>> {
        self.inner.list(prefix)
    }

    fn watch<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Receiver<WatchEvent>> {
        self.inner.watch(prefix)
    }

    fn close(&self) -> StoreFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

fn start(store: &Arc<Held>) -> Result<TransferEngine, TransferError> {
    let mut config = Config::default();
    config.transports = vec![TransportKind::Tcp];
    TransferEngine::builder(NAME).config(config).store(store.clone()).build()
}

#[test]
fn of_two_engines_that_start_at_once_under_one_name_one_gets_it() {
    let store = Held::new("claim-race", true, 2);
    let built: Vec<_> = std::thread::scope(|scope| {
        let racers: Vec<_> = (0..2).map(|_| scope.spawn(|| start(&store))).collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    let refused: Vec<_> = built.iter().filter_map(|engine| engine.as_ref().err()).collect();
    assert!(matches!(refused[..], [TransferError::Setting { .. }]), "{built:?}");
    let winner = built.iter().find_map(|engine| engine.as_ref().ok()).unwrap();
    let published = String::from_utf8(store.value(RPC_META).unwrap()).unwrap();
    assert!(published.contains(&winner.rpc_port().to_string()), "{published}");
}

#[test]
fn a_replaced_engine_writes_no_descriptor_where_puts_have_no_guards() {
    let store = Held::new("claim-replaced", false, 0);
    let engine = start(&store).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let other = br#"{"ip_or_host_name":"127.0.0.1","rpc_port":1}"#;
    for (key, value) in [(RPC_META, &other[..]), (RAM, b"theirs")] {
        runtime.block_on(store.inner.put(key, value, Lifetime::Permanent)).unwrap();
    }
    let refused = engine.allocate(4096, Location::Any).unwrap_err();
    assert!(matches!(&refused, TransferError::Metadata { reason, .. } if reason.contains(":1 ")), "{refused}");
    engine.shutdown(LIMIT);
    assert_eq!(store.value(RAM).unwrap(), b"theirs");
    assert_eq!(store.value(RPC_META).unwrap(), other);
}

#[test]
fn a_descriptor_on_its_way_does_not_outlive_the_engine() {
    let store = Held::new("claim-late", true, 0);
    let engine = start(&store).unwrap();
    store.hold.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        // Whether the buffer is registered in the end does not matter.
        let buffer = scope.spawn(|| engine.allocate(4096, Location::Any).map(drop));
        wait_until("the descriptor is on its way", || store.arrived.load(Ordering::SeqCst) > 0);
        let end = scope.spawn(|| engine.shutdown(LIMIT));
        // Time for an engine that does not wait to remove its keys.
        let deadline = Instant::now() + Duration::from_millis(300);
        while Instant::now() < deadline && store.value(RPC_META).is_some() {
            std::thread::yield_now();
        }
        store.release.add_permits(1_000);
        end.join().unwrap();
        let _ = buffer.join().unwrap();
    });
    drop(engine);
    assert_eq!((store.value(RPC_META), store.value(RAM)), (None, None));
}
