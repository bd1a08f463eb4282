//! The key table behind the `memory` store and the HTTP metadata server.
//!
//! A sorted map with revisions, sessions that expire, and a bounded history from which watchers catch up. It decides and
//! never waits: time comes in as an argument, and the owner wakes its watchers when [`Table::revision`] moved.
//!
//! Invariants:
//! * every change takes the next revision and enters the history once;
//! * a key belongs to at most one session, the one of its last put;
//! * keys, sessions, bytes and history stay within [`Limits`].

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Bound,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Entry, Expect, WatchEvent};

/// Bounds of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest key in bytes.
    pub max_key_bytes: usize,
    /// Longest value in bytes.
    pub max_value_bytes: usize,
    /// Most keys.
    pub max_keys: usize,
    /// Most sessions.
    pub max_sessions: usize,
    /// Most bytes of keys and values together.
    pub max_total_bytes: usize,
    /// Most changes kept for watchers.
    pub max_history: usize,
    /// Most bytes of values kept for watchers.
    pub max_history_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            max_key_bytes: 4 << 10,
            max_value_bytes: 16 << 20,
            max_keys: 100_000,
            max_sessions: 65_536,
            max_total_bytes: 1 << 30,
            max_history: 4_096,
            max_history_bytes: 64 << 20,
        }
    }
}

/// What a put came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PutOutcome {
    /// Applied, at this revision.
    Done(u64),
    /// The guard did not hold.
    Mismatch,
    /// The session is not open (never was, was closed, or ran out).
    UnknownSession,
    /// Key or value is longer than the limit.
    TooLong,
    /// The table is full.
    Full,
}

/// The history does not reach back to the revision asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Compacted;

/// Sorted keys with revisions, sessions and history.
#[derive(Debug)]
pub(crate) struct Table {
    limits: Limits,
    keys: BTreeMap<String, Slot>,
    sessions: BTreeMap<String, Session>,
    deadlines: BTreeSet<(Instant, String)>,
    revision: u64,
    total_bytes: usize,
    history: VecDeque<Change>,
    history_bytes: usize,
    /// Changes up to this revision are forgotten.
    floor: u64,
}

#[derive(Debug)]
struct Slot {
    value: Arc<[u8]>,
    revision: u64,
    session: Option<String>,
}

#[derive(Debug)]
struct Session {
    incarnation: u64,
    deadline: Option<Instant>,
    keys: BTreeSet<String>,
}

#[derive(Debug)]
struct Change {
    revision: u64,
    key: String,
    /// `None`: removed. Else the value and whether it was leased.
    put: Option<(Arc<[u8]>, bool)>,
}

impl Table {
    /// An empty table whose first change gets the revision after `base`.
    pub(crate) fn new(base: u64, limits: Limits) -> Self {
        Table {
            limits,
            keys: BTreeMap::new(),
            sessions: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            revision: base,
            total_bytes: 0,
            history: VecDeque::new(),
            history_bytes: 0,
            floor: base,
        }
    }

    /// Revision of the last change.
    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    /// Keys and open sessions.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.keys.len(), self.sessions.len())
    }

    /// When the next session runs out.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Ends the sessions that ran out by `now`, with their keys.
    pub(crate) fn expire(&mut self, now: Instant) {
        while let Some((at, id)) = self.deadlines.first().cloned() {
            if at > now {
                break;
            }
            self.close_session(&id);
        }
    }

    /// Opens or renews a session; the result tells its incarnation, or `None` if there is no room for it.
    ///
    /// The incarnation changes exactly when the session was opened anew, so its owner learns that its keys are gone.
    pub(crate) fn open_session(&mut self, id: &str, ttl: Option<Duration>, now: Instant) -> Option<u64> {
        let deadline = ttl.map(|ttl| now + ttl);
        if let Some(session) = self.sessions.get_mut(id) {
            if let Some(old) = session.deadline {
                self.deadlines.remove(&(old, id.to_owned()));
            }
            session.deadline = deadline;
        } else {
            if self.sessions.len() >= self.limits.max_sessions {
                return None;
            }
            self.revision += 1;
            let session = Session { incarnation: self.revision, deadline, keys: BTreeSet::new() };
            self.sessions.insert(id.to_owned(), session);
        }
        if let Some(at) = deadline {
            self.deadlines.insert((at, id.to_owned()));
        }
        self.sessions.get(id).map(|session| session.incarnation)
    }

    /// Ends a session and removes its keys; whether it was open.
    pub(crate) fn close_session(&mut self, id: &str) -> bool {
        let Some(session) = self.sessions.remove(id) else { return false };
        if let Some(at) = session.deadline {
            self.deadlines.remove(&(at, id.to_owned()));
        }
        for key in session.keys {
            self.remove(&key);
        }
        true
    }

    /// Puts a value, for a session or for good.
    pub(crate) fn put(
        &mut self,
        key: &str,
        value: Arc<[u8]>,
        session: Option<&str>,
        guard: Option<Expect>,
    ) -> PutOutcome {
        if key.len() > self.limits.max_key_bytes || value.len() > self.limits.max_value_bytes {
            return PutOutcome::TooLong;
        }
        if session.is_some_and(|id| !self.sessions.contains_key(id)) {
            return PutOutcome::UnknownSession;
        }
        let old = self.keys.get(key);
        let held = match guard {
            None => true,
            Some(Expect::Absent) => old.is_none(),
            Some(Expect::Revision(revision)) => old.is_some_and(|slot| slot.revision == revision),
        };
        if !held {
            return PutOutcome::Mismatch;
        }
        let old_bytes = old.map_or(0, |slot| key.len() + slot.value.len());
        let total_bytes = self.total_bytes - old_bytes + key.len() + value.len();
        let full_of_keys = old.is_none() && self.keys.len() >= self.limits.max_keys;
        if full_of_keys || total_bytes > self.limits.max_total_bytes {
            return PutOutcome::Full;
        }
        self.disown(key);
        if let Some(open) = session.and_then(|id| self.sessions.get_mut(id)) {
            open.keys.insert(key.to_owned());
        }
        self.total_bytes = total_bytes;
        self.revision += 1;
        let slot = Slot { value: value.clone(), revision: self.revision, session: session.map(str::to_owned) };
        self.keys.insert(key.to_owned(), slot);
        self.remember(key, Some((value, session.is_some())));
        PutOutcome::Done(self.revision)
    }

    /// Removes a key; whether it was there.
    pub(crate) fn remove(&mut self, key: &str) -> bool {
        self.disown(key);
        let Some(slot) = self.keys.remove(key) else { return false };
        self.total_bytes -= key.len() + slot.value.len();
        self.revision += 1;
        self.remember(key, None);
        true
    }

    /// Reads a key.
    pub(crate) fn get(&self, key: &str, now: Instant) -> Option<Entry> {
        self.keys.get(key).map(|slot| self.entry(key, slot, now))
    }

    /// Whether a key belongs to that session.
    pub(crate) fn belongs(&self, key: &str, session: &str) -> bool {
        self.keys.get(key).is_some_and(|slot| slot.session.as_deref() == Some(session))
    }

    /// All keys under a prefix, in order.
    pub(crate) fn list(&self, prefix: &str, now: Instant) -> Vec<Entry> {
        self.keys
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, slot)| self.entry(key, slot, now))
            .collect()
    }

    /// Changes under a prefix after a revision, each with its own, oldest first; at most `limit` of them.
    pub(crate) fn changes_after(
        &self,
        prefix: &str,
        after: u64,
        limit: usize,
    ) -> Result<Vec<(u64, WatchEvent)>, Compacted> {
        if after < self.floor || after > self.revision {
            return Err(Compacted);
        }
        let start = self.history.partition_point(|change| change.revision <= after);
        let changes = self.history.range(start..).filter(|change| change.key.starts_with(prefix));
        Ok(changes.take(limit).map(|change| (change.revision, change.event())).collect())
    }

    fn entry(&self, key: &str, slot: &Slot, now: Instant) -> Entry {
        let session = slot.session.as_ref().and_then(|id| self.sessions.get(id));
        let deadline = session.and_then(|session| session.deadline);
        Entry {
            key: key.to_owned(),
            value: slot.value.to_vec(),
            revision: slot.revision,
            leased: slot.session.is_some(),
            ttl: deadline.map(|at| at.saturating_duration_since(now)),
        }
    }

    fn disown(&mut self, key: &str) {
        let owner = self.keys.get(key).and_then(|slot| slot.session.as_ref());
        if let Some(session) = owner.and_then(|id| self.sessions.get_mut(id)) {
            session.keys.remove(key);
        }
    }

    fn remember(&mut self, key: &str, put: Option<(Arc<[u8]>, bool)>) {
        let change = Change { revision: self.revision, key: key.to_owned(), put };
        self.history_bytes += change.bytes();
        self.history.push_back(change);
        while self.history.len() > self.limits.max_history || self.history_bytes > self.limits.max_history_bytes {
            let Some(oldest) = self.history.pop_front() else { break };
            self.history_bytes -= oldest.bytes();
            self.floor = oldest.revision;
        }
    }
}

impl Change {
    fn bytes(&self) -> usize {
        self.key.len() + self.put.as_ref().map_or(0, |(value, _)| value.len())
    }

    fn event(&self) -> WatchEvent {
        match &self.put {
            None => WatchEvent::Removed { key: self.key.clone() },
            Some((value, leased)) => WatchEvent::Put(Entry {
                key: self.key.clone(),
                value: value.to_vec(),
                revision: self.revision,
                leased: *leased,
                ttl: None,
            }),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn value(text: &str) -> Arc<[u8]> {
        Arc::from(text.as_bytes())
    }

    #[test]
    fn a_session_that_runs_out_takes_only_its_own_keys() {
        let start = Instant::now();
        let mut table = Table::new(0, Limits::default());
        let first = table.open_session("s", Some(Duration::from_secs(2)), start).unwrap();
        table.put("mine", value("1"), Some("s"), None);
        table.put("taken", value("1"), Some("s"), None);
        table.put("taken", value("2"), None, None);
        table.expire(start + Duration::from_millis(1_999));
        assert_eq!(table.counts(), (2, 1));
        assert_eq!(table.open_session("s", Some(Duration::from_secs(2)), start + Duration::from_secs(1)), Some(first));
        table.expire(start + Duration::from_millis(2_500));
        assert_eq!(table.counts(), (2, 1), "the renewal moved the deadline");
        table.expire(start + Duration::from_secs(3));
        assert!(table.get("mine", start).is_none());
        assert_eq!(table.get("taken", start).unwrap().value, b"2");
        assert_eq!(table.put("mine", value("1"), Some("s"), None), PutOutcome::UnknownSession);
        assert_ne!(table.open_session("s", None, start), Some(first), "a new incarnation");
    }

    #[test]
    fn limits_hold_and_give_their_room_back() {
        let limits =
            Limits { max_keys: 2, max_total_bytes: 20, max_key_bytes: 4, max_value_bytes: 10, ..Limits::default() };
        let mut table = Table::new(0, limits);
        assert_eq!(table.put("12345", value(""), None, None), PutOutcome::TooLong);
        assert_eq!(table.put("a", value("12345678901"), None, None), PutOutcome::TooLong);
        assert_eq!(table.put("a", value("1234567890"), None, None), PutOutcome::Done(1));
        assert_eq!(table.put("b", value("1234567890"), None, None), PutOutcome::Full, "bytes");
        assert_eq!(table.put("b", value("1"), None, None), PutOutcome::Done(2));
        assert_eq!(table.put("c", value("1"), None, None), PutOutcome::Full, "keys");
        assert_eq!(table.put("a", value("1"), None, None), PutOutcome::Done(3), "a replacement needs no room");
        assert!(table.remove("a"));
        assert_eq!(table.put("c", value("1234567890"), None, None), PutOutcome::Done(5));
    }

    #[test]
    fn history_is_bounded_and_says_so() {
        let mut table = Table::new(100, Limits { max_history: 3, ..Limits::default() });
        for index in 0..5 {
            table.put("k", value(&index.to_string()), None, None);
        }
        assert_eq!(table.changes_after("", 101, 10), Err(Compacted));
        assert_eq!(table.changes_after("", 99, 10), Err(Compacted), "revision of an earlier life");
        assert_eq!(table.changes_after("", 106, 10), Err(Compacted), "revision of a later life");
        let seen = table.changes_after("", 102, 10).unwrap();
        assert_eq!(seen.iter().map(|(revision, _)| *revision).collect::<Vec<_>>(), [103, 104, 105]);
        assert_eq!(table.changes_after("", 102, 1).unwrap().len(), 1);
        assert!(table.changes_after("other", 102, 10).unwrap().is_empty());
    }
}
