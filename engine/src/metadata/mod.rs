//! Metadata stores: where segments are published and found.
//!
//! One trait, [`MetadataStore`], with the siblings `p2p`, `memory`, `http` and `etcd`. All calls are asynchronous and run
//! on the engine's control runtime (`tw-ctl`); none is on the data path. Every call ends within the store's own timeouts.
//!
//! [`uri::parse`] reads a connection string, [`open`] makes the store of it (but for `p2p`, which needs the engine's
//! control port), and [`server::MetadataServer`] is the other end of `http`.

#[cfg(feature = "etcd")]
pub mod etcd;
pub mod http;
mod known;
pub mod memory;
mod options;
mod percent;
pub mod server;
mod session;
mod shared;
mod stop;
mod table;
pub mod uri;
mod wire;

pub mod p2p;

use std::{fmt::Debug, future::Future, pin::Pin, time::Duration};

pub use options::{StoreOptions, open, take_over};
pub use uri::StoreUri;

/// Events a watch holds for a receiver that does not read; after that the watch waits.
pub(crate) const WATCH_DEPTH: usize = 256;

/// Future of a store call.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// A value and the revisions that guard it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Key, with its prefix.
    pub key: String,
    /// Value as stored (a trailing newline is kept).
    pub value: Vec<u8>,
    /// Revision of the last change; the one to hand to [`MetadataStore::compare_and_put`].
    pub revision: u64,
    /// Whether the key goes away when its owner dies.
    pub leased: bool,
    /// Time to live of that lease, where the store tells.
    pub ttl: Option<Duration>,
}

/// How long a key stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// Until this store instance is closed or its process dies (within its lease), where the store has leases.
    Session,
    /// Until it is removed.
    Permanent,
}

/// Guard of a [`MetadataStore::compare_and_put`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The key must not exist.
    Absent,
    /// The key must be at this revision.
    Revision(u64),
}

/// Change seen by a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// A key was put.
    Put(Entry),
    /// A key was removed or its lease ran out.
    Removed {
        /// The key.
        key: String,
    },
}

/// What a store can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreCapabilities {
    /// [`Lifetime::Session`] keys go away when the process dies.
    pub leases: bool,
    /// [`MetadataStore::watch`] works.
    pub watch: bool,
    /// [`MetadataStore::compare_and_put`] is atomic.
    pub compare_and_put: bool,
    /// [`MetadataStore::list`] works.
    pub list: bool,
}

/// Failure of a store call.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The connection string cannot be used.
    #[error("metadata uri {uri}: {reason}")]
    Uri {
        /// As given.
        uri: String,
        /// Why not.
        reason: String,
    },
    /// The server did not answer in time or refused.
    #[error("{store} is unreachable: {reason}")]
    Unreachable {
        /// Store and address.
        store: String,
        /// Text of the failure.
        reason: String,
    },
    /// The server answered with an error.
    #[error("{store} refused {operation} of {key}: {reason}")]
    Refused {
        /// Store and address.
        store: String,
        /// Which call.
        operation: &'static str,
        /// Key.
        key: String,
        /// Text of the answer.
        reason: String,
    },
    /// The value that is there stays: Mooncake's HTTP server lets nobody replace a `rpc_meta` key, and a session key that
    /// somebody else took after our lease was lost is theirs. See [`take_over`].
    #[error("{store} keeps the existing value of {key}")]
    Exists {
        /// Store and address.
        store: String,
        /// Key.
        key: String,
    },
    /// The store was closed.
    #[error("{store} is closed")]
    Closed {
        /// Store and address.
        store: String,
    },
    /// This store cannot do that.
    #[error("{store} has no {operation}")]
    Unsupported {
        /// Store.
        store: String,
        /// Which call.
        operation: &'static str,
    },
}

/// A place where segments are published and found.
///
/// Rules (the conformance suite checks them over every sibling):
/// * `put` replaces, but for a session key that was lost with its lease and taken by somebody else: that is
///   [`StoreError::Exists`]; a timed-out `put` may still be applied, so values are idempotent;
/// * `get` of a missing key is `Ok(None)`, `remove` of one is `Ok(false)`;
/// * a [`Lifetime::Session`] key disappears within the lease after its process died, and at once on [`close`];
/// * `compare_and_put` of a lost race is `Ok(None)`, never an error;
/// * every call on a closed store is [`StoreError::Closed`], but for `close`, which may be repeated;
/// * a watch delivers every change after `watch` returned, in order, without gaps over reconnects (after a compaction:
///   the difference to a fresh listing).
///
/// [`close`]: MetadataStore::close
pub trait MetadataStore: Send + Sync + Debug {
    /// Name with address for messages: `etcd 127.0.0.1:2379`.
    fn describe(&self) -> String;
    /// What this store can do.
    fn capabilities(&self) -> StoreCapabilities;
    /// Puts a value; the result is its revision (0 where the store has none).
    fn put<'a>(&'a self, key: &'a str, value: &'a [u8], lifetime: Lifetime) -> StoreFuture<'a, u64>;
    /// Reads a value.
    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>>;
    /// Removes a key; whether it was there.
    fn remove<'a>(&'a self, key: &'a str) -> StoreFuture<'a, bool>;
    /// Puts if the guard holds; the new revision, or `None` if it did not.
    fn compare_and_put<'a>(
        &'a self,
        key: &'a str,
        expect: Expect,
        value: &'a [u8],
        lifetime: Lifetime,
    ) -> StoreFuture<'a, Option<u64>>;
    /// All keys under a prefix, in key order.
    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<Entry>>;
    /// Changes under a prefix from now on. The receiver ends when the store is closed.
    fn watch<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, tokio::sync::mpsc::Receiver<WatchEvent>>;
    /// Removes what this instance put with [`Lifetime::Session`] and stops its background tasks.
    fn close(&self) -> StoreFuture<'_, ()>;
}
