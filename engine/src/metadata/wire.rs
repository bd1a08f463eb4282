//! What the HTTP store and our metadata server say to each other beyond Mooncake's GET, PUT and DELETE of one key.
//!
//! Mooncake's server ignores the request headers and answers 400 to a request without `key`, so a client learns from
//! the answer's [`SERVER`] header whom it talks to. On the same path:
//!
//! | request | meaning | answer |
//! | --- | --- | --- |
//! | `GET ?key=` | read | 200 with [`REVISION`] and, for a leased key, [`TTL_MS`]; 404 |
//! | `GET ?key=` with [`SESSION`] | read, and learn whether the key is that session's | as above, with [`OWN`] if it is |
//! | `PUT ?key=` with [`SESSION`] | put under a session | 200 with [`REVISION`]; 409 unknown session |
//! | `PUT ?key=` with `If-None-Match: *` or `If-Match: "<revision>"` | guarded put | 200; 412 guard does not hold |
//! | `POST ?session=&ttl_ms=` | open or renew a session | 200 [`SessionAnswer`] |
//! | `DELETE ?session=` | end a session with its keys | 200; 404 |
//! | `GET ?prefix=` | list | 200 [`Listing`] |
//! | `GET ?watch=&after=&wait_ms=` | wait for changes | 200 [`Changes`], empty after `wait_ms`; 410 list again |
//!
//! A key or value over the limit is 413, a full server 507, one without room for another body 503.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Entry, WatchEvent};

/// Answer header of our server; its value is the version of this extension.
pub(crate) const SERVER: &str = "tidewire-metadata";
/// Request header of our client, which may replace any key.
pub(crate) const CLIENT: &str = "tidewire-client";
/// Session a put belongs to.
pub(crate) const SESSION: &str = "tidewire-session";
/// Revision of the key in the answer.
pub(crate) const REVISION: &str = "tidewire-revision";
/// Time to live of a leased key.
pub(crate) const TTL_MS: &str = "tidewire-ttl-ms";
/// Answer header of a key that belongs to the session of the request.
pub(crate) const OWN: &str = "tidewire-own";
/// Version of this extension.
pub(crate) const VERSION: &str = "1";
/// Longest wait of one watch request.
pub(crate) const MAX_WATCH_WAIT: Duration = Duration::from_secs(30);
/// Part of the keys that Mooncake's server lets nobody replace.
pub(crate) const GUARDED: &str = "rpc_meta";

/// Answer to opening or renewing a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SessionAnswer {
    /// Changes exactly when the session was opened anew.
    pub(crate) incarnation: u64,
    /// Time to live that the server granted.
    pub(crate) ttl_ms: u64,
}

/// Answer to a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listing {
    /// Revision of the listing, to watch from.
    pub(crate) revision: u64,
    /// Keys in order.
    pub(crate) entries: Vec<WireEntry>,
}

/// Answer to a watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Changes {
    /// Revision to watch from next.
    pub(crate) revision: u64,
    /// Changes, oldest first.
    pub(crate) changes: Vec<WireChange>,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WireChange {
    /// A key was put.
    Put(WireEntry),
    /// A key is gone.
    Removed(String),
}

/// A key and its value. The value is text where it is UTF-8, hexadecimal otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WireEntry {
    key: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value_hex: Option<String>,
    revision: u64,
    leased: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ttl_ms: Option<u64>,
}

impl From<Entry> for WireEntry {
    fn from(entry: Entry) -> Self {
        let (value, value_hex) = match String::from_utf8(entry.value) {
            Ok(text) => (Some(text), None),
            Err(error) => (None, Some(to_hex(error.as_bytes()))),
        };
        WireEntry {
            key: entry.key,
            value,
            value_hex,
            revision: entry.revision,
            leased: entry.leased,
            ttl_ms: entry.ttl.map(as_millis),
        }
    }
}

impl WireEntry {
    /// The entry, or `None` if its hexadecimal is broken.
    pub(crate) fn into_entry(self) -> Option<Entry> {
        let value = match (self.value, self.value_hex) {
            (Some(text), _) => text.into_bytes(),
            (None, Some(hex)) => from_hex(&hex)?,
            (None, None) => return None,
        };
        let ttl = self.ttl_ms.map(Duration::from_millis);
        Some(Entry { key: self.key, value, revision: self.revision, leased: self.leased, ttl })
    }
}

impl From<WatchEvent> for WireChange {
    fn from(event: WatchEvent) -> Self {
        match event {
            WatchEvent::Put(entry) => WireChange::Put(entry.into()),
            WatchEvent::Removed { key } => WireChange::Removed(key),
        }
    }
}

impl WireChange {
    /// The event, or `None` if its value is broken.
    pub(crate) fn into_event(self) -> Option<WatchEvent> {
        match self {
            WireChange::Put(entry) => entry.into_entry().map(WatchEvent::Put),
            WireChange::Removed(key) => Some(WatchEvent::Removed { key }),
        }
    }
}

/// Milliseconds of a duration, as much as fits.
pub(crate) fn as_millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(hex: &str) -> Option<Vec<u8>> {
    if !hex.is_ascii() || !hex.len().is_multiple_of(2) {
        return None;
    }
    (0..hex.len()).step_by(2).map(|at| hex.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_value_survives(value: Vec<u8>, key: String, revision: u64, leased: bool) {
            let entry = Entry { key, value, revision, leased, ttl: leased.then_some(Duration::from_millis(7)) };
            let text = serde_json::to_string(&WireEntry::from(entry.clone())).unwrap_or_default();
            let back = serde_json::from_str::<WireEntry>(&text).ok().and_then(WireEntry::into_entry);
            prop_assert_eq!(back, Some(entry));
        }

        #[test]
        fn no_hexadecimal_panics(text: String) {
            let _ = from_hex(&text);
        }
    }
}
