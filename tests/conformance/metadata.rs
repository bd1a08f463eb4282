//! The rules of [`MetadataStore`], run over `memory`, `http` with our own server, and `etcd`; over `p2p`, those
//! that its capabilities allow.

mod bodies;
#[cfg(feature = "etcd")]
mod etcd;
#[cfg(feature = "etcd")]
#[path = "../support/etcd_server.rs"]
mod etcd_server;
mod http;
mod mooncake;
mod p2p;
mod plain;
mod rules;
mod support;

use std::sync::Arc;

use tidewire_engine::metadata::{
    MetadataStore, StoreOptions,
    p2p::P2pStore,
    server::{MetadataServer, ServerOptions},
};

use self::support::{open, unique};

/// A store to test, with the server behind it.
trait Sibling {
    /// Another instance on the same data.
    async fn open(&self) -> Arc<dyn MetadataStore>;
}

struct Memory(String);

impl Memory {
    async fn start() -> Option<Self> {
        Some(Memory(format!("memory://{}", unique())))
    }
}

impl Sibling for Memory {
    async fn open(&self) -> Arc<dyn MetadataStore> {
        open(&self.0, &StoreOptions::default()).await.unwrap()
    }
}

struct P2p;

impl P2p {
    async fn start() -> Option<Self> {
        Some(P2p)
    }
}

impl Sibling for P2p {
    async fn open(&self) -> Arc<dyn MetadataStore> {
        Arc::new(P2pStore::default())
    }
}

struct Http(MetadataServer);

impl Http {
    async fn start() -> Option<Self> {
        let address = "127.0.0.1:0".parse().unwrap();
        Some(Http(MetadataServer::start(address, ServerOptions::default()).await.unwrap()))
    }
}

impl Sibling for Http {
    async fn open(&self) -> Arc<dyn MetadataStore> {
        open(&self.0.uri(), &StoreOptions::default()).await.unwrap()
    }
}

#[cfg(feature = "etcd")]
struct Etcd(etcd_server::EtcdServer);

#[cfg(feature = "etcd")]
impl Etcd {
    async fn start() -> Option<Self> {
        etcd_server::EtcdServer::start(&[]).await.map(Etcd)
    }
}

#[cfg(feature = "etcd")]
impl Sibling for Etcd {
    async fn open(&self) -> Arc<dyn MetadataStore> {
        open(&self.0.uri(), &StoreOptions::default()).await.unwrap()
    }
}

macro_rules! conformance {
    ($module:ident, $sibling:ident, [$($rule:ident),* $(,)?]) => {
        mod $module {
            $(
                #[tokio::test]
                async fn $rule() {
                    if let Some(sibling) = super::$sibling::start().await {
                        super::rules::$rule(&sibling).await;
                    }
                }
            )*
        }
    };
}

macro_rules! all_rules {
    ($module:ident, $sibling:ident) => {
        conformance!(
            $module,
            $sibling,
            [
                put_replaces,
                missing_keys_are_no_errors,
                values_and_keys_survive_as_they_are,
                a_mebibyte_survives,
                session_keys_go_on_close_and_others_stay,
                a_key_taken_by_another_stays_when_its_first_owner_closes,
                a_permanent_put_makes_a_session_key_permanent,
                a_removed_session_key_stays_removed,
                compare_and_put_holds_its_guard,
                of_many_who_compare_and_put_one_wins,
                list_is_the_prefix_in_order,
                watch_tells_every_change_in_order,
                watch_tells_its_prefix_from_now_on,
                watch_sees_session_keys_go,
                watch_ends_with_the_store,
                a_closed_store_says_so,
            ]
        );
    };
}

conformance!(
    over_p2p,
    P2p,
    [a_missing_key_is_no_error, compare_and_put_holds_its_guard, a_closed_store_says_so, values_are_kept_as_they_are]
);
all_rules!(over_memory, Memory);
all_rules!(over_http, Http);
#[cfg(feature = "etcd")]
all_rules!(over_etcd, Etcd);
