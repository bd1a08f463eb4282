//! The rules, one function each.

use std::{collections::BTreeMap, sync::Arc};

use tidewire_engine::metadata::{Entry, Expect, Lifetime, MetadataStore, StoreError, WatchEvent};

use super::{
    Sibling,
    support::{PATIENCE, next},
};

const PERMANENT: Lifetime = Lifetime::Permanent;
const SESSION: Lifetime = Lifetime::Session;

pub(super) async fn put_replaces(sibling: &impl Sibling) {
    let (store, other) = (sibling.open().await, sibling.open().await);
    let first = store.put("mooncake/rpc_meta/n", b"1", PERMANENT).await.unwrap();
    let second = store.put("mooncake/rpc_meta/n", b"2", SESSION).await.unwrap();
    let third = other.put("mooncake/rpc_meta/n", b"3", SESSION).await.unwrap();
    assert!(first < second && second < third, "revisions grow: {first} {second} {third}");
    let entry = store.get("mooncake/rpc_meta/n").await.unwrap().unwrap();
    assert_eq!((entry.value.as_slice(), entry.revision), (&b"3"[..], third));
}

pub(super) async fn missing_keys_are_no_errors(sibling: &impl Sibling) {
    a_missing_key_is_no_error(sibling).await;
    assert!(sibling.open().await.list("nothing").await.unwrap().is_empty());
}

/// Without a list, for stores that have none.
pub(super) async fn a_missing_key_is_no_error(sibling: &impl Sibling) {
    let store = sibling.open().await;
    assert_eq!(store.get("nothing").await.unwrap(), None);
    assert!(!store.remove("nothing").await.unwrap());
    store.put("something", b"", PERMANENT).await.unwrap();
    assert_eq!(store.get("something").await.unwrap().unwrap().value, b"");
    assert!(store.remove("something").await.unwrap());
    assert!(!store.remove("something").await.unwrap());
    assert_eq!(store.get("something").await.unwrap(), None);
}

const KEYS: [&str; 4] = ["mooncake/ram/[::1]:15001", "nvmeof/s0", "a key%2F+with&odd=signs?#", "schlüssel"];

pub(super) async fn values_and_keys_survive_as_they_are(sibling: &impl Sibling) {
    let store = sibling.open().await;
    put_values_of_all_kinds(&store).await;
    for key in KEYS {
        let listed = store.list(key).await.unwrap();
        assert_eq!(listed.len(), 1, "{key}");
        assert_eq!((listed[0].key.as_str(), &listed[0].value), (key, &(0..=255).collect()));
    }
}

/// Without a list, for stores that have none.
pub(super) async fn values_are_kept_as_they_are(sibling: &impl Sibling) {
    put_values_of_all_kinds(&sibling.open().await).await;
}

async fn put_values_of_all_kinds(store: &Arc<dyn MetadataStore>) {
    let every_byte: Vec<u8> = (0..=255).collect();
    for key in KEYS {
        for value in [&b"{\"a\":1}\n"[..], b"{\"a\":1}", b"\0", &every_byte] {
            store.put(key, value, PERMANENT).await.unwrap();
            assert_eq!(store.get(key).await.unwrap().unwrap().value, value, "{key}");
        }
    }
}

pub(super) async fn a_mebibyte_survives(sibling: &impl Sibling) {
    let store = sibling.open().await;
    let value: Vec<u8> = (0..1_u32 << 20).map(|index| b'a' + (index % 23) as u8).collect();
    let mut watch = store.watch("big").await.unwrap();
    store.put("big", &value, PERMANENT).await.unwrap();
    assert!(store.get("big").await.unwrap().unwrap().value == value);
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(entry) if entry.value == value));
}

pub(super) async fn session_keys_go_on_close_and_others_stay(sibling: &impl Sibling) {
    let (store, other) = (sibling.open().await, sibling.open().await);
    store.put("mine", b"1", SESSION).await.unwrap();
    store.put("mine too", b"1", SESSION).await.unwrap();
    store.put("everybody's", b"1", PERMANENT).await.unwrap();
    other.put("yours", b"1", SESSION).await.unwrap();
    let mine = other.get("mine").await.unwrap().unwrap();
    assert!(mine.leased, "{mine:?}");
    assert!(!other.get("everybody's").await.unwrap().unwrap().leased);
    store.close().await.unwrap();
    assert_eq!(other.get("mine").await.unwrap(), None);
    assert_eq!(other.get("mine too").await.unwrap(), None);
    assert!(other.get("everybody's").await.unwrap().is_some());
    assert!(other.get("yours").await.unwrap().is_some());
}

pub(super) async fn a_key_taken_by_another_stays_when_its_first_owner_closes(sibling: &impl Sibling) {
    let (first, second) = (sibling.open().await, sibling.open().await);
    first.put("key", b"first", SESSION).await.unwrap();
    second.put("key", b"second", SESSION).await.unwrap();
    first.close().await.unwrap();
    assert_eq!(second.get("key").await.unwrap().unwrap().value, b"second");
    second.close().await.unwrap();
    assert_eq!(sibling.open().await.get("key").await.unwrap(), None);
}

pub(super) async fn a_permanent_put_makes_a_session_key_permanent(sibling: &impl Sibling) {
    let (store, other) = (sibling.open().await, sibling.open().await);
    store.put("put", b"1", SESSION).await.unwrap();
    store.put("put", b"2", PERMANENT).await.unwrap();
    let revision = store.put("compared", b"1", SESSION).await.unwrap();
    let compared = store.compare_and_put("compared", Expect::Revision(revision), b"2", PERMANENT).await.unwrap();
    assert!(compared.is_some());
    store.close().await.unwrap();
    assert_eq!(other.get("put").await.unwrap().unwrap().value, b"2");
    assert_eq!(other.get("compared").await.unwrap().unwrap().value, b"2");
}

pub(super) async fn a_removed_session_key_stays_removed(sibling: &impl Sibling) {
    let (store, other) = (sibling.open().await, sibling.open().await);
    store.put("gone", b"1", SESSION).await.unwrap();
    assert!(store.remove("gone").await.unwrap());
    store.put("other", b"1", SESSION).await.unwrap();
    assert_eq!(other.get("gone").await.unwrap(), None);
    other.put("gone", b"2", PERMANENT).await.unwrap();
    store.close().await.unwrap();
    assert_eq!(other.get("gone").await.unwrap().unwrap().value, b"2");
}

pub(super) async fn compare_and_put_holds_its_guard(sibling: &impl Sibling) {
    let store = sibling.open().await;
    let put =
        async |expect, value: &[u8], lifetime| store.compare_and_put("key", expect, value, lifetime).await.unwrap();
    assert_eq!(put(Expect::Revision(1), b"0", PERMANENT).await, None, "no key, no revision");
    let first = put(Expect::Absent, b"1", PERMANENT).await.expect("the key was absent");
    assert_eq!(put(Expect::Absent, b"2", SESSION).await, None);
    assert_eq!(store.get("key").await.unwrap().unwrap().revision, first);
    let second = put(Expect::Revision(first), b"2", SESSION).await.expect("the revision was right");
    assert!(second > first);
    assert_eq!(put(Expect::Revision(first), b"3", PERMANENT).await, None);
    let entry = store.get("key").await.unwrap().unwrap();
    assert_eq!((entry.value.as_slice(), entry.revision, entry.leased), (&b"2"[..], second, true));
    store.remove("key").await.unwrap();
    assert_eq!(put(Expect::Revision(second), b"3", PERMANENT).await, None);
    assert!(put(Expect::Absent, b"3", PERMANENT).await.is_some());
}

pub(super) async fn of_many_who_compare_and_put_one_wins(sibling: &impl Sibling) {
    let mut revision = Expect::Absent;
    for _ in 0..3 {
        let mut racers = Vec::new();
        for racer in 0..8_u8 {
            let store = sibling.open().await;
            racers.push(tokio::spawn(async move {
                store.compare_and_put("prize", revision, &[racer], PERMANENT).await.unwrap()
            }));
        }
        let mut won = Vec::new();
        for racer in racers {
            won.extend(racer.await.unwrap());
        }
        assert_eq!(won.len(), 1, "{won:?}");
        revision = Expect::Revision(won[0]);
    }
}

pub(super) async fn list_is_the_prefix_in_order(sibling: &impl Sibling) {
    let store = sibling.open().await;
    let mut keys: Vec<_> = (0..300).map(|index| format!("mooncake/ram/{index}")).collect();
    for (index, key) in keys.iter().enumerate() {
        let lifetime = if index % 2 == 0 { SESSION } else { PERMANENT };
        store.put(key, key.as_bytes(), lifetime).await.unwrap();
    }
    store.put("mooncake/ran", b"", PERMANENT).await.unwrap();
    store.put("mooncake/r", b"", PERMANENT).await.unwrap();
    keys.sort();
    let listed = store.list("mooncake/ram/").await.unwrap();
    assert_eq!(listed.iter().map(|entry| entry.key.clone()).collect::<Vec<_>>(), keys);
    for Entry { key, value, revision, leased, ttl } in listed {
        assert_eq!(value, key.as_bytes());
        assert!(revision > 0);
        let even = key.rsplit('/').next().unwrap().parse::<u32>().unwrap() % 2 == 0;
        assert_eq!(leased, even, "{key}");
        assert!(ttl.is_none_or(|ttl| leased && ttl <= PATIENCE), "{key}: {ttl:?}");
    }
    assert_eq!(store.list("").await.unwrap().len(), 302);
}

pub(super) async fn watch_tells_every_change_in_order(sibling: &impl Sibling) {
    const ROUNDS: u32 = 200;
    let (store, writer) = (sibling.open().await, sibling.open().await);
    let mut watch = store.watch("w/").await.unwrap();
    // More changes than a watch holds, before the first is read.
    for round in 0..ROUNDS {
        let value = round.to_string();
        writer.put("w/a", value.as_bytes(), PERMANENT).await.unwrap();
        writer.put("w/b", value.as_bytes(), SESSION).await.unwrap();
        assert!(writer.remove("w/a").await.unwrap());
    }
    let mut last = 0;
    for round in 0..ROUNDS {
        for key in ["w/a", "w/b"] {
            let WatchEvent::Put(entry) = next(&mut watch).await else { panic!("round {round}: {key} was put") };
            assert_eq!((entry.key.as_str(), entry.value), (key, round.to_string().into_bytes()));
            assert_eq!(entry.leased, key == "w/b");
            assert!(entry.revision > last, "revisions grow");
            last = entry.revision;
        }
        assert_eq!(next(&mut watch).await, WatchEvent::Removed { key: "w/a".to_owned() }, "round {round}");
    }
}

pub(super) async fn watch_tells_its_prefix_from_now_on(sibling: &impl Sibling) {
    let store = sibling.open().await;
    store.put("w/before", b"1", PERMANENT).await.unwrap();
    let mut watch = store.watch("w/").await.unwrap();
    let mut all = store.watch("").await.unwrap();
    store.put("v/other", b"1", PERMANENT).await.unwrap();
    store.put("w/after", b"1", PERMANENT).await.unwrap();
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(entry) if entry.key == "w/after"));
    assert!(matches!(next(&mut all).await, WatchEvent::Put(entry) if entry.key == "v/other"));
    assert!(matches!(next(&mut all).await, WatchEvent::Put(entry) if entry.key == "w/after"));
    drop(watch);
    store.put("w/later", b"1", PERMANENT).await.unwrap();
    assert!(matches!(next(&mut all).await, WatchEvent::Put(entry) if entry.key == "w/later"));
}

pub(super) async fn watch_sees_session_keys_go(sibling: &impl Sibling) {
    let (watcher, owner) = (sibling.open().await, sibling.open().await);
    let mut watch = watcher.watch("s/").await.unwrap();
    owner.put("s/1", b"", SESSION).await.unwrap();
    owner.put("s/2", b"", SESSION).await.unwrap();
    owner.close().await.unwrap();
    let mut present = BTreeMap::new();
    for _ in 0..4 {
        match next(&mut watch).await {
            WatchEvent::Put(entry) => assert!(present.insert(entry.key, ()).is_none()),
            WatchEvent::Removed { key } => assert!(present.remove(&key).is_some()),
        }
    }
    assert!(present.is_empty(), "{present:?}");
}

pub(super) async fn watch_ends_with_the_store(sibling: &impl Sibling) {
    let (closed, dropped) = (sibling.open().await, sibling.open().await);
    let mut of_closed = closed.watch("").await.unwrap();
    let mut of_dropped = dropped.watch("").await.unwrap();
    closed.close().await.unwrap();
    drop(dropped);
    assert_eq!(tokio::time::timeout(PATIENCE, of_closed.recv()).await.expect("an end in time"), None);
    assert_eq!(tokio::time::timeout(PATIENCE, of_dropped.recv()).await.expect("an end in time"), None);
}

pub(super) async fn a_closed_store_says_so(sibling: &impl Sibling) {
    let store = sibling.open().await;
    store.put("key", b"", SESSION).await.unwrap();
    store.close().await.unwrap();
    store.close().await.unwrap();
    let guarded = store.compare_and_put("key", Expect::Absent, b"", SESSION).await.map(drop);
    let outcomes = [
        store.put("key", b"", SESSION).await.map(drop),
        store.put("key", b"", PERMANENT).await.map(drop),
        store.get("key").await.map(drop),
        store.remove("key").await.map(drop),
        guarded,
        store.list("").await.map(drop),
        store.watch("").await.map(drop),
    ];
    for (index, outcome) in outcomes.into_iter().enumerate() {
        assert!(matches!(outcome, Err(StoreError::Closed { .. })), "call {index}: {outcome:?}");
    }
}
