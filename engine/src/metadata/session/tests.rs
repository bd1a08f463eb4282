//! A keeper over a server that is scripted: it loses leases and answers, and lets others take keys.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Mutex as StdMutex;

use super::{super::stop::StopSource, *};
use crate::memory::lock;

#[derive(Debug, Default)]
struct Server {
    state: StdMutex<Keys>,
}

#[derive(Debug, Default)]
struct Keys {
    lease: u64,
    revision: u64,
    /// Value, revision and lease (0: somebody else's).
    keys: BTreeMap<String, (Vec<u8>, u64, u64)>,
    /// Writes that are applied but not answered.
    mute: usize,
    /// Writes that are neither applied nor answered.
    dropped: usize,
    down: bool,
}

impl Server {
    /// The lease runs out with its keys.
    fn lose_lease(&self) {
        let mut state = lock(&self.state);
        let lease = state.lease;
        state.keys.retain(|_, (_, _, of)| *of != lease);
        state.lease += 1;
    }

    fn value(&self, key: &str) -> Option<Vec<u8>> {
        lock(&self.state).keys.get(key).map(|(value, _, _)| value.clone())
    }
}

fn unreachable() -> StoreError {
    StoreError::Unreachable { store: "scripted".to_owned(), reason: "down".to_owned() }
}

impl SessionBackend for Server {
    fn describe(&self) -> String {
        "scripted".to_owned()
    }

    async fn renew(&self, _known: Option<Lease>) -> Result<Lease, StoreError> {
        let state = lock(&self.state);
        if state.down { Err(unreachable()) } else { Ok(Lease(state.lease)) }
    }

    async fn write(&self, lease: Lease, key: &str, value: &[u8], guard: Option<Expect>) -> Result<Written, StoreError> {
        let mut state = lock(&self.state);
        if state.down {
            return Err(unreachable());
        }
        if lease.0 != state.lease {
            return Ok(Written::LeaseLost);
        }
        if state.dropped > 0 {
            state.dropped -= 1;
            return Err(unreachable());
        }
        let at = state.keys.get(key).map(|(_, revision, _)| *revision);
        let held = match guard {
            None => true,
            Some(Expect::Absent) => at.is_none(),
            Some(Expect::Revision(revision)) => at == Some(revision),
        };
        if !held {
            return Ok(Written::Mismatch);
        }
        state.revision += 1;
        let entry = (value.to_vec(), state.revision, lease.0);
        state.keys.insert(key.to_owned(), entry);
        if state.mute > 0 {
            state.mute -= 1;
            return Err(unreachable());
        }
        Ok(Written::At(state.revision))
    }

    async fn reclaim(&self, lease: Lease, key: &str, owned: &Owned, _past: &[Lease]) -> Result<Written, StoreError> {
        let ours =
            lock(&self.state).keys.get(key).filter(|(_, _, of)| *of == lease.0).map(|(_, revision, _)| *revision);
        self.write(lease, key, &owned.value, Some(ours.map_or(Expect::Absent, Expect::Revision))).await
    }
}

fn keeper() -> (Arc<Server>, Arc<Keeper<Server>>, StopSource) {
    let (server, stop) = (Arc::new(Server::default()), StopSource::new());
    let ttl = Duration::from_secs(3_600);
    let keeper = Keeper::new(server.clone(), ttl, stop.signal(), Handle::current());
    (server, keeper, stop)
}

#[tokio::test]
async fn lost_keys_are_put_again_but_not_over_others() {
    let (server, keeper, _stop) = keeper();
    for key in ["a", "b", "c"] {
        keeper.put(key, key.as_bytes(), None).await.unwrap();
    }
    keeper.forget("c").await;
    server.lose_lease();
    lock(&server.state).keys.insert("b".to_owned(), (b"theirs".to_vec(), 99, 0));
    keeper.tend().await.unwrap();
    assert_eq!(server.value("a").unwrap(), b"a");
    assert_eq!(server.value("b").unwrap(), b"theirs");
    assert_eq!(server.value("c"), None, "a forgotten key stays away");
    // It is not ours any more, so the next loss does not bring it back either.
    lock(&server.state).keys.remove("b");
    server.lose_lease();
    keeper.tend().await.unwrap();
    assert_eq!((server.value("a").unwrap(), server.value("b")), (b"a".to_vec(), None));
}

#[tokio::test]
async fn a_put_that_meets_a_lost_lease_opens_another() {
    let (server, keeper, _stop) = keeper();
    keeper.put("a", b"1", None).await.unwrap();
    server.lose_lease();
    assert!(keeper.put("b", b"1", None).await.unwrap().is_some());
    keeper.tend().await.unwrap();
    assert_eq!(server.value("a").unwrap(), b"1");
}

#[tokio::test]
async fn a_put_without_an_answer_counts_as_ours() {
    let (server, keeper, _stop) = keeper();
    keeper.put("a", b"1", None).await.unwrap();
    lock(&server.state).mute = 1;
    assert!(keeper.put("a", b"2", None).await.is_err());
    server.lose_lease();
    keeper.tend().await.unwrap();
    assert_eq!(server.value("a").unwrap(), b"2");
}

#[tokio::test]
async fn what_could_not_be_put_again_is_tried_the_next_time() {
    let (server, keeper, _stop) = keeper();
    keeper.put("a", b"1", None).await.unwrap();
    server.lose_lease();
    lock(&server.state).down = true;
    assert!(keeper.tend().await.is_err());
    lock(&server.state).down = false;
    keeper.tend().await.unwrap();
    assert_eq!(server.value("a").unwrap(), b"1");
}

#[tokio::test]
async fn a_closed_keeper_puts_nothing() {
    let (server, keeper, _stop) = keeper();
    keeper.put("a", b"1", None).await.unwrap();
    assert_eq!(keeper.close().await, Some(Lease(0)));
    server.lose_lease();
    keeper.tend().await.unwrap();
    assert_eq!(server.value("a"), None);
    assert!(matches!(keeper.put("a", b"1", None).await, Err(StoreError::Closed { .. })));
}

/// Somebody else's value.
fn theirs() -> (Vec<u8>, u64, u64) {
    (b"theirs".to_vec(), 99, 1_000)
}

#[tokio::test]
async fn a_key_that_was_taken_is_put_again_only_after_it_was_removed_or_with_a_guard() {
    let (server, keeper, _stop) = keeper();
    for key in ["a", "b"] {
        keeper.put(key, b"1", None).await.unwrap();
    }
    server.lose_lease();
    for key in ["a", "b"] {
        lock(&server.state).keys.insert(key.to_owned(), theirs());
    }
    keeper.tend().await.unwrap();
    for key in ["a", "b"] {
        let refused = keeper.put(key, b"2", None).await;
        assert!(matches!(refused, Err(StoreError::Exists { .. })), "{refused:?}");
        assert_eq!(server.value(key).unwrap(), b"theirs");
    }
    keeper.forget("a").await;
    keeper.put("a", b"3", None).await.unwrap();
    assert!(keeper.put("b", b"3", Some(Expect::Revision(99))).await.unwrap().is_some());
    keeper.put("b", b"4", None).await.unwrap();
    assert_eq!((server.value("a").unwrap(), server.value("b").unwrap()), (b"3".to_vec(), b"4".to_vec()));
}

#[tokio::test]
async fn a_put_that_meets_a_lost_lease_leaves_what_others_took() {
    let (server, keeper, _stop) = keeper();
    for key in ["a", "b"] {
        keeper.put(key, b"1", None).await.unwrap();
    }
    server.lose_lease();
    lock(&server.state).keys.insert("a".to_owned(), theirs());
    let refused = keeper.put("a", b"2", None).await;
    assert!(matches!(refused, Err(StoreError::Exists { .. })), "{refused:?}");
    assert_eq!(server.value("a").unwrap(), b"theirs");
    // A new lease is there by now, but this key was not looked at under it.
    lock(&server.state).keys.insert("b".to_owned(), theirs());
    let refused = keeper.put("b", b"2", None).await;
    assert!(matches!(refused, Err(StoreError::Exists { .. })), "{refused:?}");
    assert_eq!(server.value("b").unwrap(), b"theirs");
}

#[tokio::test]
async fn a_put_that_failed_is_repeated_although_the_lease_lives() {
    let (server, keeper, _stop) = keeper();
    keeper.put("a", b"1", None).await.unwrap();
    lock(&server.state).dropped = 1;
    assert!(keeper.put("a", b"2", None).await.is_err());
    assert_eq!(server.value("a").unwrap(), b"1");
    let repeated = async {
        while server.value("a").unwrap() != b"2" {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(5), repeated).await.unwrap();
}
