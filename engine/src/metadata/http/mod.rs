//! The `http` store: client of Mooncake's HTTP metadata server and of ours.
//!
//! With Mooncake's server there are GET, PUT and DELETE of a key, nothing else: session keys are removed on close only,
//! where they still have the value that was put, and an existing `rpc_meta` key is not replaced ([`StoreError::Exists`]). With our own server, known by a header of its
//! answers, there are leases, guarded puts, listings and watches as well (see `wire`).
//!
//! Invariants:
//! * every call ends within `request_timeout`, a watch's long polls aside;
//! * nothing of the extension is sent to a server that did not say that it speaks it, but for the headers it ignores.

mod backend;
mod connection;
mod watch;

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};

use hyper::{Method, StatusCode};
use tokio::{runtime::Handle, sync::mpsc, time::timeout};

use self::{
    backend::HttpBackend,
    connection::{Answer, Call, Connections},
    watch::Watcher,
};
use super::{
    Entry, Expect, Lifetime, MetadataStore, StoreCapabilities, StoreError, StoreFuture, StoreOptions, WATCH_DEPTH,
    WatchEvent, session::Keeper, stop::StopSource, uri::HttpUri, wire,
};
use crate::memory::lock;

/// Longest connect, as Mooncake has it.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1_500);

/// Client of one HTTP metadata server.
pub struct HttpStore {
    backend: Arc<HttpBackend>,
    keeper: Arc<Keeper<HttpBackend>>,
    request_timeout: Duration,
    /// Session keys on a server without sessions, with the value that was put last.
    unleased: Mutex<BTreeMap<String, Vec<u8>>>,
    stop: StopSource,
}

impl HttpStore {
    /// Connects and learns which server answers.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] if none does within `connect_timeout` and `open_without_server` is off.
    pub async fn open(uri: &HttpUri, options: &StoreOptions) -> Result<Self, StoreError> {
        let connections = Connections::new(uri.clone(), options.connect_timeout.min(CONNECT_TIMEOUT));
        let runtime = Handle::try_current().map_err(|error| StoreError::Unreachable {
            store: connections.describe().to_owned(),
            reason: error.to_string(),
        })?;
        let stop = StopSource::new();
        let backend = Arc::new(HttpBackend::new(connections, options));
        let keeper = Keeper::new(backend.clone(), options.lease_ttl, stop.signal(), runtime);
        let request_timeout = options.request_timeout;
        let store = HttpStore { backend, keeper, request_timeout, unleased: Mutex::default(), stop };
        match store.backend.probe(options.connect_timeout).await {
            Err(StoreError::Unreachable { .. }) if options.open_without_server => {}
            outcome => outcome?,
        }
        Ok(store)
    }

    /// Runs one call of the store within its time.
    async fn timed<T>(&self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        if self.stop.is_stopped() {
            return Err(StoreError::Closed { store: self.describe() });
        }
        let limit = self.request_timeout;
        timeout(limit, call).await.unwrap_or_else(|_| {
            let reason = format!("no answer within {} ms", limit.as_millis());
            Err(StoreError::Unreachable { store: self.describe(), reason })
        })
    }

    async fn extension(&self, operation: &'static str) -> Result<(), StoreError> {
        if self.backend.learn_extension().await? {
            Ok(())
        } else {
            Err(StoreError::Unsupported { store: self.describe(), operation })
        }
    }

    async fn send(&self, call: &Call) -> Result<Answer, StoreError> {
        self.backend.call(call, self.request_timeout).await
    }

    async fn put_any(&self, key: &str, value: &[u8], lifetime: Lifetime) -> Result<u64, StoreError> {
        if lifetime == Lifetime::Session && self.backend.learn_extension().await? {
            return Ok(self.keeper.put(key, value, None).await?.unwrap_or_default());
        }
        self.keeper.forget(key).await;
        let answer = self.send(&put_call(key, value)).await?;
        match answer.status {
            StatusCode::OK if lifetime == Lifetime::Session => {
                lock(&self.unleased).insert(key.to_owned(), value.to_vec());
            }
            StatusCode::OK => drop(lock(&self.unleased).remove(key)),
            StatusCode::BAD_REQUEST if key.contains(wire::GUARDED) && !answer.is_ours() => {
                return Err(StoreError::Exists { store: self.describe(), key: key.to_owned() });
            }
            _ => return Err(self.backend.refused("put", key, &answer)),
        }
        Ok(answer.number(wire::REVISION).unwrap_or_default())
    }

    async fn put_guarded(
        &self,
        key: &str,
        expect: Expect,
        value: &[u8],
        lifetime: Lifetime,
    ) -> Result<Option<u64>, StoreError> {
        self.extension("compare_and_put").await?;
        if lifetime == Lifetime::Session {
            return self.keeper.put(key, value, Some(expect)).await;
        }
        let answer = self.send(&guard_call(put_call(key, value), expect)).await?;
        match answer.status {
            StatusCode::OK => {
                self.keeper.forget(key).await;
                Ok(Some(answer.number(wire::REVISION).unwrap_or_default()))
            }
            StatusCode::PRECONDITION_FAILED => Ok(None),
            _ => Err(self.backend.refused("compare_and_put", key, &answer)),
        }
    }

    async fn remove_any(&self, key: &str) -> Result<bool, StoreError> {
        self.keeper.forget(key).await;
        lock(&self.unleased).remove(key);
        let answer = self.send(&Call::new(Method::DELETE, key_query(key))).await?;
        match answer.status {
            StatusCode::OK => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            _ => Err(self.backend.refused("remove", key, &answer)),
        }
    }

    /// Removes a session key on a server without sessions, unless somebody else has put it since.
    async fn remove_own(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        if self.backend.get(key).await?.is_some_and(|entry| entry.value == value) {
            self.send(&Call::new(Method::DELETE, key_query(key))).await?;
        }
        Ok(())
    }

    async fn end(&self) -> Result<(), StoreError> {
        let lease = self.keeper.close().await;
        let unleased = std::mem::take(&mut *lock(&self.unleased));
        let mut outcome = Ok(());
        for (key, value) in unleased {
            outcome = outcome.and(self.remove_own(&key, &value).await);
        }
        if lease.is_some() {
            outcome = outcome.and(self.backend.end_session().await);
        }
        self.backend.connections().close();
        outcome
    }
}

impl MetadataStore for HttpStore {
    fn describe(&self) -> String {
        self.backend.connections().describe().to_owned()
    }

    fn capabilities(&self) -> StoreCapabilities {
        let ours = self.backend.speaks_extension();
        StoreCapabilities { leases: ours, watch: ours, compare_and_put: ours, list: ours }
    }

    fn put<'a>(&'a self, key: &'a str, value: &'a [u8], lifetime: Lifetime) -> StoreFuture<'a, u64> {
        Box::pin(self.timed(self.put_any(key, value, lifetime)))
    }

    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>> {
        Box::pin(self.timed(self.backend.get(key)))
    }

    fn remove<'a>(&'a self, key: &'a str) -> StoreFuture<'a, bool> {
        Box::pin(self.timed(self.remove_any(key)))
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
        Box::pin(self.timed(async move {
            self.extension("list").await?;
            Ok(self.backend.list(prefix).await?.1)
        }))
    }

    fn watch<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, mpsc::Receiver<WatchEvent>> {
        Box::pin(self.timed(async move {
            self.extension("watch").await?;
            let (revision, listing) = self.backend.list(prefix).await?;
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
            timeout(self.request_timeout, self.end()).await.unwrap_or_else(|_| {
                let reason = "no answer while closing; session keys go away with their lease".to_owned();
                Err(StoreError::Unreachable { store: self.describe(), reason })
            })
        })
    }
}

impl fmt::Debug for HttpStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpStore").field("server", &self.describe()).finish_non_exhaustive()
    }
}

fn key_query(key: &str) -> String {
    format!("key={}", super::percent::encode(key))
}

fn put_call(key: &str, value: &[u8]) -> Call {
    Call { body: value.to_vec().into(), ..Call::new(Method::PUT, key_query(key)) }
}

/// Adds the guard; such a put must not be repeated.
fn guard_call(call: Call, expect: Expect) -> Call {
    let call = Call { repeatable: false, ..call };
    match expect {
        Expect::Absent => call.header("if-none-match", "*"),
        Expect::Revision(revision) => call.header("if-match", &format!("\"{revision}\"")),
    }
}
