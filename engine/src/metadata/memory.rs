//! The `memory` store: segments of one process, for tests and single-process use.
//!
//! Stores opened under the same name share one table, which lives as long as the process. Closing or dropping a store
//! removes its session keys at once; there is no time to live.
//!
//! Invariants:
//! * watchers are woken after every change and read the table's history, so none is told out of order.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, OnceLock},
    time::Instant,
};

use tokio::sync::mpsc;

use super::{
    Entry, Expect, Lifetime, MetadataStore, StoreCapabilities, StoreError, StoreFuture, WATCH_DEPTH, WatchEvent,
    known::Known,
    shared::SharedTable,
    stop::{StopSignal, StopSource},
    table::{Compacted, Limits, PutOutcome, Table},
};
use crate::memory::lock;

/// Most changes read from the table at once by a watcher.
const READ_LIMIT: usize = 256;

/// One user of a named table.
pub struct MemoryStore {
    name: String,
    session: String,
    shared: Arc<Shared>,
    stop: StopSource,
}

#[derive(Debug)]
struct Shared {
    table: SharedTable,
    sessions: Mutex<u64>,
}

impl MemoryStore {
    /// Opens the table of that name, making it if it is the first.
    pub fn open(name: &str) -> Self {
        static TABLES: OnceLock<Mutex<BTreeMap<String, Arc<Shared>>>> = OnceLock::new();
        let mut tables = lock(TABLES.get_or_init(Mutex::default));
        let shared = tables.entry(name.to_owned()).or_insert_with(|| {
            let table = SharedTable::new(0, Limits { max_keys: usize::MAX, ..Limits::default() });
            Arc::new(Shared { table, sessions: Mutex::new(0) })
        });
        let shared = shared.clone();
        let mut sessions = lock(&shared.sessions);
        *sessions += 1;
        let session = sessions.to_string();
        drop(sessions);
        MemoryStore { name: name.to_owned(), session, shared, stop: StopSource::new() }
    }

    /// Runs `change` on the table and wakes the watchers.
    fn with_table<T>(&self, change: impl FnOnce(&mut Table) -> T) -> Result<T, StoreError> {
        if self.stop.is_stopped() {
            return Err(StoreError::Closed { store: self.describe() });
        }
        Ok(self.shared.table.with(change))
    }

    fn put_guarded(
        &self,
        key: &str,
        guard: Option<Expect>,
        value: &[u8],
        lifetime: Lifetime,
        operation: &'static str,
    ) -> Result<Option<u64>, StoreError> {
        let session = (lifetime == Lifetime::Session).then_some(self.session.as_str());
        let outcome = self.with_table(|table| {
            if let Some(id) = session {
                table.open_session(id, None, Instant::now());
            }
            table.put(key, Arc::from(value), session, guard)
        })?;
        let reason = match outcome {
            PutOutcome::Done(revision) => return Ok(Some(revision)),
            PutOutcome::Mismatch => return Ok(None),
            PutOutcome::TooLong => "key or value is too long",
            PutOutcome::Full | PutOutcome::UnknownSession => "the store is full",
        };
        Err(StoreError::Refused { store: self.describe(), operation, key: key.to_owned(), reason: reason.to_owned() })
    }
}

impl MetadataStore for MemoryStore {
    fn describe(&self) -> String {
        format!("memory {}", self.name)
    }

    fn capabilities(&self) -> StoreCapabilities {
        StoreCapabilities { leases: true, watch: true, compare_and_put: true, list: true }
    }

    fn put<'a>(&'a self, key: &'a str, value: &'a [u8], lifetime: Lifetime) -> StoreFuture<'a, u64> {
        Box::pin(async move { Ok(self.put_guarded(key, None, value, lifetime, "put")?.unwrap_or_default()) })
    }

    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>> {
        Box::pin(async move { self.with_table(|table| table.get(key, Instant::now())) })
    }

    fn remove<'a>(&'a self, key: &'a str) -> StoreFuture<'a, bool> {
        Box::pin(async move { self.with_table(|table| table.remove(key)) })
    }

    fn compare_and_put<'a>(
        &'a self,
        key: &'a str,
        expect: Expect,
        value: &'a [u8],
        lifetime: Lifetime,
    ) -> StoreFuture<'a, Option<u64>> {
        Box::pin(async move { self.put_guarded(key, Some(expect), value, lifetime, "compare_and_put") })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<Entry>> {
        Box::pin(async move { self.with_table(|table| table.list(prefix, Instant::now())) })
    }

    fn watch<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, mpsc::Receiver<WatchEvent>> {
        Box::pin(async move {
            let (sender, receiver) = mpsc::channel(WATCH_DEPTH);
            let (known, after) =
                self.with_table(|table| (Known::from_listing(&table.list(prefix, Instant::now())), table.revision()))?;
            let watcher =
                Watcher { shared: self.shared.clone(), prefix: prefix.to_owned(), known, after, events: sender };
            tokio::spawn(watcher.run(self.stop.signal()));
            Ok(receiver)
        })
    }

    fn close(&self) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            self.end();
            Ok(())
        })
    }
}

impl MemoryStore {
    fn end(&self) {
        if self.stop.stop() {
            self.shared.table.with(|table| table.close_session(&self.session));
        }
    }
}

impl Drop for MemoryStore {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Follows the table for one receiver.
struct Watcher {
    shared: Arc<Shared>,
    prefix: String,
    known: Known,
    after: u64,
    events: mpsc::Sender<WatchEvent>,
}

impl Watcher {
    async fn run(mut self, mut stop: StopSignal) {
        let mut revision = self.shared.table.subscribe();
        loop {
            let events = self.read();
            if events.is_empty() {
                tokio::select! {
                    () = stop.stopped() => return,
                    () = self.events.closed() => return,
                    changed = revision.changed() => if changed.is_err() { return },
                }
            }
            for event in events {
                tokio::select! {
                    () = stop.stopped() => return,
                    sent = self.events.send(event) => if sent.is_err() { return },
                }
            }
        }
    }

    /// What changed since the last read.
    fn read(&mut self) -> Vec<WatchEvent> {
        let (prefix, known, after) = (&self.prefix, &mut self.known, &mut self.after);
        self.shared.table.with(|table| match table.changes_after(prefix, *after, READ_LIMIT) {
            Ok(changes) => {
                let complete = changes.len() < READ_LIMIT;
                let last = changes.last().map_or(*after, |(revision, _)| *revision);
                *after = if complete { table.revision() } else { last };
                changes.into_iter().map(|(_, event)| event).inspect(|event| known.apply(event)).collect()
            }
            Err(Compacted) => {
                *after = table.revision();
                known.diff(table.list(prefix, Instant::now()))
            }
        })
    }
}
