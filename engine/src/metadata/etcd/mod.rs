//! The `etcd` store.
//!
//! Session keys hang on one lease per store, granted with the first of them. Watches and the lease are kept over frozen
//! and restarted servers (see [`watch`](self) and `session`).
//!
//! Invariants:
//! * every call ends within `request_timeout`;
//! * no key that somebody else has taken is overwritten in the background.

mod backend;
mod link;
mod watch;

use std::{collections::BTreeMap, future::Future, sync::Arc};

use tokio::{runtime::Handle, sync::mpsc, time::timeout};

use self::{
    backend::EtcdBackend,
    link::{Link, Repeat},
    watch::Watcher,
};
use super::{
    Entry, Expect, Lifetime, MetadataStore, StoreCapabilities, StoreError, StoreFuture, StoreOptions, WATCH_DEPTH,
    WatchEvent,
    session::{Keeper, Written},
    stop::StopSource,
    uri::EtcdUri,
};

/// A key that nobody has: reading it tells whether the cluster answers.
const PROBE_KEY: &str = "mooncake/tidewire-probe";
/// Most leases whose time to live is asked for in one listing.
const MAX_TTL_CALLS: usize = 64;

/// Client of one etcd cluster.
#[derive(Debug)]
pub struct EtcdStore {
    backend: Arc<EtcdBackend>,
    keeper: Arc<Keeper<EtcdBackend>>,
    stop: StopSource,
}

impl EtcdStore {
    /// Connects.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] with the endpoints if none answers within `connect_timeout` and
    /// `open_without_server` is off; [`StoreError::Refused`] if etcd refuses the account; [`StoreError::Uri`] if a
    /// certificate cannot be read.
    pub async fn open(uri: &EtcdUri, options: &StoreOptions) -> Result<Self, StoreError> {
        let link = Link::new(uri, options)?;
        let runtime = Handle::try_current().map_err(|error| StoreError::Unreachable {
            store: link.describe().to_owned(),
            reason: error.to_string(),
        })?;
        let ttl = uri.lease_ttl.unwrap_or(options.lease_ttl);
        let backend = Arc::new(EtcdBackend::new(link, ttl));
        let stop = StopSource::new();
        let keeper = Keeper::new(backend.clone(), ttl, stop.signal(), runtime);
        let store = EtcdStore { backend, keeper, stop };
        let link = store.backend.link();
        let probe =
            link.call(
                "open",
                PROBE_KEY,
                Repeat::Yes,
                |client| async move { client.kv_client().get(PROBE_KEY, None).await },
            );
        match timeout(options.connect_timeout, probe).await {
            Ok(Ok(_)) => Ok(store),
            // The account may have other keys than this one.
            Ok(Err(error)) if error.is_permission() => Ok(store),
            Ok(Err(error)) if error.is_open() && options.open_without_server => Ok(store),
            Ok(Err(error)) => Err(error.into()),
            Err(_) if options.open_without_server => Ok(store),
            Err(_) => {
                let reason = format!("no answer within {} ms", options.connect_timeout.as_millis());
                Err(StoreError::Unreachable { store: store.describe(), reason })
            }
        }
    }

    /// Runs one call of the store within its time.
    async fn timed<T>(&self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        if self.stop.is_stopped() {
            return Err(StoreError::Closed { store: self.describe() });
        }
        let limit = self.backend.link().request_timeout();
        timeout(limit, call).await.unwrap_or_else(|_| {
            let reason = format!("no answer within {} ms", limit.as_millis());
            Err(StoreError::Unreachable { store: self.describe(), reason })
        })
    }

    async fn put_any(&self, key: &str, value: &[u8], lifetime: Lifetime) -> Result<u64, StoreError> {
        if lifetime == Lifetime::Session {
            return Ok(self.keeper.put(key, value, None).await?.unwrap_or_default());
        }
        self.keeper.forget(key).await;
        match self.backend.put(key, value, 0).await? {
            Written::At(revision) => Ok(revision),
            Written::Mismatch | Written::LeaseLost => Ok(0),
        }
    }

    async fn put_guarded(
        &self,
        key: &str,
        expect: Expect,
        value: &[u8],
        lifetime: Lifetime,
    ) -> Result<Option<u64>, StoreError> {
        if lifetime == Lifetime::Session {
            return self.keeper.put(key, value, Some(expect)).await;
        }
        match self.backend.put_guarded(key, value, expect, 0).await? {
            Written::At(revision) => {
                self.keeper.forget(key).await;
                Ok(Some(revision))
            }
            Written::Mismatch | Written::LeaseLost => Ok(None),
        }
    }

    /// Lists with the time to live of the leases, as far as there is time and there are few.
    async fn list_with_ttl(&self, prefix: &str) -> Result<Vec<Entry>, StoreError> {
        let (_, listing) = self.backend.list(prefix).await?;
        let mut left: BTreeMap<i64, _> =
            listing.iter().filter(|(_, lease)| *lease != 0).map(|(_, lease)| (*lease, None)).collect();
        if left.len() <= MAX_TTL_CALLS {
            for (lease, ttl) in &mut left {
                *ttl = self.backend.time_left(*lease).await.unwrap_or_default();
            }
        }
        let with_ttl = |(entry, lease)| Entry { ttl: left.get(&lease).copied().flatten(), ..entry };
        Ok(listing.into_iter().map(with_ttl).collect())
    }
}

impl MetadataStore for EtcdStore {
    fn describe(&self) -> String {
        self.backend.link().describe().to_owned()
    }

    fn capabilities(&self) -> StoreCapabilities {
        StoreCapabilities { leases: true, watch: true, compare_and_put: true, list: true }
    }

    fn put<'a>(&'a self, key: &'a str, value: &'a [u8], lifetime: Lifetime) -> StoreFuture<'a, u64> {
        Box::pin(self.timed(self.put_any(key, value, lifetime)))
    }

    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>> {
        Box::pin(self.timed(async move { Ok(self.backend.get(key).await?.map(|(entry, _)| entry)) }))
    }

    fn remove<'a>(&'a self, key: &'a str) -> StoreFuture<'a, bool> {
        Box::pin(self.timed(async move {
            self.keeper.forget(key).await;
            self.backend.remove(key).await
        }))
    }

    fn compare_and_put<'a>(
        &'a self,
        key: &'a str,
        expect: Expect,
        value: &'a [u8],
        lifetime: Lifetime,
    ) -> StoreFuture<'a, Option<u64>> {
        Box::pin(self.timed(self.put_guarded(key, expect, value, lifetime)))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<Entry>> {
        Box::pin(self.timed(self.list_with_ttl(prefix)))
    }

    fn watch<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, mpsc::Receiver<WatchEvent>> {
        Box::pin(self.timed(async move {
            let (revision, listing) = self.backend.list(prefix).await?;
            let listing: Vec<_> = listing.into_iter().map(|(entry, _)| entry).collect();
            let (sender, receiver) = mpsc::channel(WATCH_DEPTH);
            let watcher = Watcher::new(self.backend.clone(), prefix, revision, &listing, sender);
            tokio::spawn(watcher.run(self.stop.signal()));
            Ok(receiver)
        }))
    }

    fn close(&self) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            if !self.stop.stop() {
                return Ok(());
            }
            let end = async {
                match self.keeper.close().await {
                    Some(lease) => self.backend.revoke(lease).await,
                    None => Ok(()),
                }
            };
            timeout(self.backend.link().request_timeout(), end).await.unwrap_or_else(|_| {
                let reason = "no answer while closing; session keys go away with their lease".to_owned();
                Err(StoreError::Unreachable { store: self.describe(), reason })
            })
        })
    }
}
