//! Discovery without a server: the name of a segment is its control address, and the peer itself answers.
//!
//! What this process puts stays here, for its own control server to hand out. `get` of a descriptor key asks the peer the
//! key names. There is nothing to list and nothing to watch.
//!
//! # Source
//! Mooncake's `P2PHANDSHAKE`.

use std::{
    collections::HashMap,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tidewire_core::mooncake::{host::HostPort, keys::KeySpace};

use super::{Entry, Expect, Lifetime, MetadataStore, StoreCapabilities, StoreError, StoreFuture, WatchEvent};
use crate::{control::ControlClient, memory::lock};

const NAME: &str = "p2p";

/// The embedded default store.
#[derive(Debug)]
pub struct P2pStore {
    client: ControlClient,
    keys: KeySpace,
    own: Mutex<HashMap<String, (Vec<u8>, u64)>>,
    revision: AtomicU64,
    closed: AtomicBool,
}

impl P2pStore {
    /// A store that asks peers through `client`.
    pub fn new(client: ControlClient, keys: KeySpace) -> Self {
        P2pStore { client, keys, own: Mutex::default(), revision: AtomicU64::new(0), closed: AtomicBool::new(false) }
    }

    /// What this process put under `key`.
    pub fn own_value(&self, key: &str) -> Option<Vec<u8>> {
        lock(&self.own).get(key).map(|(value, _)| value.clone())
    }

    fn own_entry(&self, key: &str) -> Option<Entry> {
        let own = lock(&self.own);
        let (value, revision) = own.get(key)?;
        Some(Entry { key: key.to_owned(), value: value.clone(), revision: *revision, leased: true, ttl: None })
    }

    fn check_open(&self) -> Result<(), StoreError> {
        match self.closed.load(Ordering::Acquire) {
            true => Err(StoreError::Closed { store: NAME.to_owned() }),
            false => Ok(()),
        }
    }

    fn unsupported<T>(&self, operation: &'static str) -> Result<T, StoreError> {
        self.check_open()?;
        Err(StoreError::Unsupported { store: NAME.to_owned(), operation })
    }

    fn next_revision(&self) -> u64 {
        self.revision.fetch_add(1, Ordering::Relaxed) + 1
    }

    async fn ask(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let Some(segment) = self.keys.segment_of(key) else { return Ok(None) };
        let address = HostPort::parse(segment);
        let unreachable = |reason| StoreError::Unreachable { store: format!("{NAME} {address}"), reason };
        let value = self.client.fetch_descriptor_json(&address).await.map_err(|error| unreachable(error.chain()))?;
        Ok(value.map(|value| Entry { key: key.to_owned(), value, revision: 0, leased: false, ttl: None }))
    }
}

impl Default for P2pStore {
    fn default() -> Self {
        P2pStore::new(ControlClient::default(), KeySpace::default())
    }
}

impl MetadataStore for P2pStore {
    fn describe(&self) -> String {
        NAME.to_owned()
    }

    fn capabilities(&self) -> StoreCapabilities {
        // A value is served by its owner's process, so it is gone with it: that is a lease of no length.
        StoreCapabilities { leases: true, watch: false, compare_and_put: true, list: false }
    }

    fn put<'a>(&'a self, key: &'a str, value: &'a [u8], _lifetime: Lifetime) -> StoreFuture<'a, u64> {
        Box::pin(async move {
            let mut own = lock(&self.own);
            self.check_open()?;
            let revision = self.next_revision();
            own.insert(key.to_owned(), (value.to_vec(), revision));
            Ok(revision)
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>> {
        Box::pin(async move {
            self.check_open()?;
            match self.own_entry(key) {
                Some(entry) => Ok(Some(entry)),
                None => self.ask(key).await,
            }
        })
    }

    fn remove<'a>(&'a self, key: &'a str) -> StoreFuture<'a, bool> {
        Box::pin(async move {
            self.check_open()?;
            Ok(lock(&self.own).remove(key).is_some())
        })
    }

    fn compare_and_put<'a>(
        &'a self,
        key: &'a str,
        expect: Expect,
        value: &'a [u8],
        _lifetime: Lifetime,
    ) -> StoreFuture<'a, Option<u64>> {
        Box::pin(async move {
            let mut own = lock(&self.own);
            self.check_open()?;
            let holds = match (expect, own.get(key)) {
                (Expect::Absent, seen) => seen.is_none(),
                (Expect::Revision(expected), Some((_, seen))) => *seen == expected,
                (Expect::Revision(_), None) => false,
            };
            Ok(holds.then(|| {
                let revision = self.next_revision();
                own.insert(key.to_owned(), (value.to_vec(), revision));
                revision
            }))
        })
    }

    fn list<'a>(&'a self, _prefix: &'a str) -> StoreFuture<'a, Vec<Entry>> {
        Box::pin(async { self.unsupported("list") })
    }

    fn watch<'a>(&'a self, _prefix: &'a str) -> StoreFuture<'a, tokio::sync::mpsc::Receiver<WatchEvent>> {
        Box::pin(async { self.unsupported("watch") })
    }

    fn close(&self) -> StoreFuture<'_, ()> {
        Box::pin(async {
            let mut own = lock(&self.own);
            // Under the lock: a put that comes after this says so.
            self.closed.store(true, Ordering::Release);
            own.clear();
            Ok(())
        })
    }
}
