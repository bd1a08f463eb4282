//! `p2p` beyond the rules: keys of peers, and what the store says it cannot do.

use std::time::{Duration, Instant};

use tidewire_engine::{
    Config, TransferEngine,
    control::{ClientTimeouts, ControlClient},
    core::{TransportKind, mooncake::descriptor::SegmentDescriptor, mooncake::keys::KeySpace},
    metadata::{Expect, Lifetime, MetadataStore, StoreError, p2p::P2pStore},
};

fn peer() -> TransferEngine {
    let builder = TransferEngine::builder("127.0.0.1").config(Config::default());
    builder.transports(&[TransportKind::Tcp]).build().unwrap()
}

fn store() -> P2pStore {
    let timeouts = ClientTimeouts { connect: Duration::from_secs(2), reply: Duration::from_secs(2) };
    P2pStore::new(ControlClient { timeouts, ..ControlClient::default() }, KeySpace::default())
}

#[tokio::test]
async fn a_peers_key_is_asked_of_the_peer() {
    let (store, peer) = (store(), tokio::task::spawn_blocking(peer).await.unwrap());
    let key = KeySpace::default().ram(peer.segment_name());
    let entry = store.get(&key).await.unwrap().unwrap();
    assert_eq!((entry.key.as_str(), entry.leased), (key.as_str(), false));
    let descriptor = SegmentDescriptor::decode(&entry.value).unwrap();
    assert_eq!(descriptor.tidewire.unwrap().generation, peer.generation().to_string());
    // What is the peer's cannot be removed, nor is it in the way of an own value of that name.
    assert!(!store.remove(&key).await.unwrap());
    let own = store.compare_and_put(&key, Expect::Absent, b"own", Lifetime::Session).await.unwrap();
    assert!(own.is_some());
    assert_eq!(store.get(&key).await.unwrap().unwrap().value, b"own");
    assert!(store.remove(&key).await.unwrap());
    assert_eq!(store.get(&key).await.unwrap().unwrap().value, entry.value);
    tokio::task::spawn_blocking(move || drop(peer)).await.unwrap();
    assert!(matches!(store.get(&key).await, Err(StoreError::Unreachable { .. })));
}

#[tokio::test]
async fn a_missing_peer_is_named_soon() {
    let store = store();
    let started = Instant::now();
    let error = store.get("mooncake/ram/127.0.0.1:1").await.unwrap_err();
    assert!(matches!(&error, StoreError::Unreachable { store, .. } if store.contains("127.0.0.1:1")), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(4));
}

#[tokio::test]
async fn a_peer_that_says_nothing_is_named_in_time() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let started = Instant::now();
    let error = store().get(&format!("mooncake/ram/{address}")).await.unwrap_err();
    assert!(matches!(&error, StoreError::Unreachable { store, .. } if store.contains(&address)), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(8));
}

#[tokio::test]
async fn what_it_cannot_do_is_said_and_matches_its_capabilities() {
    let store = store();
    let can = store.capabilities();
    assert!(!can.list && !can.watch && can.compare_and_put);
    let says = |error: StoreError, what| {
        assert!(matches!(&error, StoreError::Unsupported { operation, .. } if *operation == what), "{error:?}");
    };
    says(store.list("mooncake/").await.unwrap_err(), "list");
    says(store.watch("mooncake/").await.unwrap_err(), "watch");
}

#[tokio::test]
async fn values_of_one_process_are_not_those_of_another() {
    let (one, other) = (store(), store());
    one.put("key", b"1", Lifetime::Session).await.unwrap();
    assert_eq!(other.get("key").await.unwrap(), None);
    one.close().await.unwrap();
    assert_eq!(one.own_value("key"), None);
}
