//! Requests of the HTTP store that its background tasks share: reads, sessions, listings, changes.

use std::{
    fmt::Write,
    sync::atomic::{AtomicU8, Ordering},
    time::Duration,
};

use hyper::{Method, StatusCode};
use serde::de::DeserializeOwned;

use super::{
    super::{
        Entry, Expect, StoreError, StoreOptions, WatchEvent, percent,
        session::{Lease, Owned, SessionBackend, Written},
        wire,
    },
    connection::{Answer, Call, Connections},
    guard_call, key_query, put_call,
};

/// No server answered yet.
const UNKNOWN: u8 = 0;
/// Mooncake's server answered.
const PLAIN: u8 = 1;
/// Our server answered.
const OURS: u8 = 2;
/// Tries of a reclaim that is overtaken by our own late puts.
const RECLAIM_TRIES: usize = 3;
/// A key that nobody has: asking for it tells which server answers.
pub(super) const PROBE_KEY: &str = "tidewire/probe";

/// Connections, the session's name and what is known of the server.
#[derive(Debug)]
pub(super) struct HttpBackend {
    connections: Connections,
    session: String,
    ttl: Duration,
    request_timeout: Duration,
    /// Which server answered last: 0 none yet, 1 Mooncake's, 2 ours.
    server: AtomicU8,
}

impl HttpBackend {
    /// A backend with a session name that nobody can guess.
    pub(super) fn new(connections: Connections, options: &StoreOptions) -> Self {
        let mut id = [0_u8; 16];
        if let Err(error) = getrandom::fill(&mut id) {
            // The name only has to be another one than everybody else's.
            tracing::warn!(%error, "no random bytes for a session name, time and process are used");
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            id[..8].copy_from_slice(&u64::try_from(now.as_nanos()).unwrap_or_default().to_le_bytes());
            id[8..12].copy_from_slice(&std::process::id().to_le_bytes());
        }
        let mut session = String::new();
        for byte in id {
            let _ = write!(session, "{byte:02x}");
        }
        let request_timeout = options.request_timeout;
        HttpBackend { connections, session, ttl: options.lease_ttl, request_timeout, server: AtomicU8::new(UNKNOWN) }
    }

    /// The connections to the server.
    pub(super) fn connections(&self) -> &Connections {
        &self.connections
    }

    /// Whether the last answer came from our server.
    pub(super) fn speaks_extension(&self) -> bool {
        self.server.load(Ordering::Relaxed) == OURS
    }

    /// Whether the server is ours; asks it if none has answered yet.
    pub(super) async fn learn_extension(&self) -> Result<bool, StoreError> {
        if self.server.load(Ordering::Relaxed) == UNKNOWN {
            self.probe(self.request_timeout).await?;
        }
        Ok(self.speaks_extension())
    }

    /// Asks which server it is.
    pub(super) async fn probe(&self, limit: Duration) -> Result<(), StoreError> {
        let answer = self.call(&Call::new(Method::GET, key_query(PROBE_KEY)), limit).await?;
        match answer.status {
            StatusCode::OK | StatusCode::NOT_FOUND => Ok(()),
            _ => Err(self.refused("open", PROBE_KEY, &answer)),
        }
    }

    /// Sends a request and notes which server answered.
    pub(super) async fn call(&self, call: &Call, limit: Duration) -> Result<Answer, StoreError> {
        let answer = self.connections.call(call, limit).await?;
        if answer.is_ours() {
            self.server.store(OURS, Ordering::Relaxed);
        } else if matches!(answer.status, StatusCode::OK | StatusCode::NOT_FOUND) {
            // Other answers may be of a proxy between.
            self.server.store(PLAIN, Ordering::Relaxed);
        }
        Ok(answer)
    }

    /// The error for an answer that is no success.
    pub(super) fn refused(&self, operation: &'static str, key: &str, answer: &Answer) -> StoreError {
        let (store, reason) = (self.connections.describe().to_owned(), answer.text());
        if answer.status == StatusCode::SERVICE_UNAVAILABLE {
            // It may take the same request later.
            return StoreError::Unreachable { store, reason };
        }
        StoreError::Refused { store, operation, key: key.to_owned(), reason }
    }

    /// Reads a key.
    pub(super) async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        Ok(self.read(&Call::new(Method::GET, key_query(key)), key).await?.map(|(entry, _)| entry))
    }

    /// Reads a key, and whether it belongs to our session.
    async fn read(&self, call: &Call, key: &str) -> Result<Option<(Entry, bool)>, StoreError> {
        let answer = self.call(call, self.request_timeout).await?;
        match answer.status {
            StatusCode::OK => {
                let ttl = answer.number(wire::TTL_MS);
                let entry = Entry {
                    key: key.to_owned(),
                    value: answer.body.to_vec(),
                    revision: answer.number(wire::REVISION).unwrap_or_default(),
                    leased: ttl.is_some(),
                    ttl: ttl.map(Duration::from_millis),
                };
                Ok(Some((entry, answer.number(wire::OWN).is_some())))
            }
            StatusCode::NOT_FOUND => Ok(None),
            _ => Err(self.refused("get", key, &answer)),
        }
    }

    /// Lists a prefix, with the revision of the listing.
    pub(super) async fn list(&self, prefix: &str) -> Result<(u64, Vec<Entry>), StoreError> {
        let call = Call::new(Method::GET, format!("prefix={}", percent::encode(prefix)));
        let answer = self.call(&call, self.request_timeout).await?;
        if answer.status != StatusCode::OK {
            return Err(self.refused("list", prefix, &answer));
        }
        let listing: wire::Listing = self.decode("list", prefix, &answer)?;
        let entries: Option<Vec<_>> = listing.entries.into_iter().map(wire::WireEntry::into_entry).collect();
        entries.map(|entries| (listing.revision, entries)).ok_or_else(|| self.broken("list", prefix))
    }

    /// Waits for changes after a revision; `None` if the server's history does not reach back to it.
    pub(super) async fn changes(
        &self,
        prefix: &str,
        after: u64,
        wait: Duration,
    ) -> Result<Option<(u64, Vec<WatchEvent>)>, StoreError> {
        let wait_ms = wire::as_millis(wait);
        let query = format!("watch={}&after={after}&wait_ms={wait_ms}", percent::encode(prefix));
        let answer = self.call(&Call::new(Method::GET, query), wait + self.request_timeout).await?;
        match answer.status {
            StatusCode::OK => {
                let changes: wire::Changes = self.decode("watch", prefix, &answer)?;
                let events: Option<Vec<_>> = changes.changes.into_iter().map(wire::WireChange::into_event).collect();
                let events = events.ok_or_else(|| self.broken("watch", prefix))?;
                Ok(Some((changes.revision, events)))
            }
            StatusCode::GONE => Ok(None),
            _ => Err(self.refused("watch", prefix, &answer)),
        }
    }

    /// Ends the session with its keys.
    pub(super) async fn end_session(&self) -> Result<(), StoreError> {
        let call = Call::new(Method::DELETE, format!("session={}", self.session));
        let answer = self.call(&call, self.request_timeout).await?;
        match answer.status {
            StatusCode::OK | StatusCode::NOT_FOUND => Ok(()),
            _ => Err(self.refused("close", "session", &answer)),
        }
    }

    fn decode<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        key: &str,
        answer: &Answer,
    ) -> Result<T, StoreError> {
        serde_json::from_slice(&answer.body).map_err(|error| StoreError::Refused {
            store: self.connections.describe().to_owned(),
            operation,
            key: key.to_owned(),
            reason: format!("unreadable answer: {error}"),
        })
    }

    fn broken(&self, operation: &'static str, key: &str) -> StoreError {
        let reason = "unreadable answer: a value is broken".to_owned();
        StoreError::Refused { store: self.connections.describe().to_owned(), operation, key: key.to_owned(), reason }
    }
}

impl SessionBackend for HttpBackend {
    fn describe(&self) -> String {
        self.connections.describe().to_owned()
    }

    async fn renew(&self, _known: Option<Lease>) -> Result<Lease, StoreError> {
        let ttl_ms = wire::as_millis(self.ttl);
        let call = Call::new(Method::POST, format!("session={}&ttl_ms={ttl_ms}", self.session));
        let answer = self.call(&call, self.request_timeout).await?;
        if answer.status != StatusCode::OK {
            return Err(self.refused("renew", "session", &answer));
        }
        let granted: wire::SessionAnswer = self.decode("renew", "session", &answer)?;
        Ok(Lease(granted.incarnation))
    }

    async fn write(
        &self,
        _lease: Lease,
        key: &str,
        value: &[u8],
        guard: Option<Expect>,
    ) -> Result<Written, StoreError> {
        let mut call = put_call(key, value).header(wire::SESSION, &self.session);
        if let Some(expect) = guard {
            call = guard_call(call, expect);
        }
        let answer = self.call(&call, self.request_timeout).await?;
        match answer.status {
            StatusCode::OK => Ok(Written::At(answer.number(wire::REVISION).unwrap_or_default())),
            StatusCode::PRECONDITION_FAILED => Ok(Written::Mismatch),
            StatusCode::CONFLICT => Ok(Written::LeaseLost),
            _ => Err(self.refused("put", key, &answer)),
        }
    }

    async fn reclaim(&self, lease: Lease, key: &str, owned: &Owned, _past: &[Lease]) -> Result<Written, StoreError> {
        // A new incarnation starts without keys: whoever has the key is somebody else, unless it is in our session.
        let read = Call::new(Method::GET, key_query(key)).header(wire::SESSION, &self.session);
        let mut expect = Expect::Absent;
        for _ in 0..RECLAIM_TRIES {
            match self.write(lease, key, &owned.value, Some(expect)).await? {
                Written::Mismatch => {}
                written => return Ok(written),
            }
            expect = match self.read(&read, key).await? {
                None => Expect::Absent,
                Some((entry, true)) if entry.value == owned.value => return Ok(Written::At(entry.revision)),
                Some((entry, own)) if own || entry.value == owned.value || entry.revision == owned.revision => {
                    Expect::Revision(entry.revision)
                }
                Some(_) => return Ok(Written::Mismatch),
            };
        }
        let reason = format!("{key} changes faster than it can be claimed");
        Err(StoreError::Unreachable { store: self.connections.describe().to_owned(), reason })
    }
}
