//! Discovery that is not there.

use std::time::{Duration, Instant};

use tidewire_engine::{
    TransferEngine,
    core::{ErrorClass, TransferError},
};

#[test]
fn a_store_that_is_down_at_start_is_named_in_time() {
    let mut uris = vec!["http://127.0.0.1:1/metadata"];
    if cfg!(feature = "etcd") {
        uris.push("etcd://127.0.0.1:1");
    }
    for uri in uris {
        let started = Instant::now();
        let error = TransferEngine::builder("some-name").metadata(uri).build().unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(10), "{uri}: {:?}", started.elapsed());
        assert_eq!(error.class(), ErrorClass::Metadata, "{error}");
        assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    }
}

#[test]
fn an_unknown_scheme_is_refused_by_name() {
    for uri in ["redis://127.0.0.1:6379", "carrier-pigeon://x"] {
        let error = TransferEngine::builder("some-name").metadata(uri).build().unwrap_err();
        let scheme = uri.split(':').next().unwrap();
        assert!(error.to_string().contains(scheme), "{error}");
        assert!(matches!(error, TransferError::Metadata { .. } | TransferError::Setting { .. }), "{error:?}");
    }
}
