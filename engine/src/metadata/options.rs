//! Settings of the stores, and the way from a connection string to a store.

use std::{path::PathBuf, sync::Arc, time::Duration};

use super::{Lifetime, MetadataStore, StoreError, StoreUri, http::HttpStore, memory::MemoryStore};

/// Settings of the stores. What the connection string says goes before.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreOptions {
    /// Time to live of the session lease: a killed process disappears within it.
    pub lease_ttl: Duration,
    /// How long opening a store may take; one connection of the HTTP store takes at most 1.5 s of it.
    pub connect_timeout: Duration,
    /// How long one call may take, its retries included.
    pub request_timeout: Duration,
    /// Whether opening succeeds while the server is down; its calls then fail until the server is up.
    pub open_without_server: bool,
    /// etcd account.
    pub etcd_user: Option<String>,
    /// Its password.
    pub etcd_password: Option<String>,
    /// PEM file of the authority of etcd's certificate; turns TLS on.
    pub tls_ca: Option<PathBuf>,
    /// PEM file of our certificate.
    pub tls_cert: Option<PathBuf>,
    /// PEM file of its key.
    pub tls_key: Option<PathBuf>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions {
            lease_ttl: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(3),
            request_timeout: Duration::from_secs(3),
            open_without_server: false,
            etcd_user: None,
            etcd_password: None,
            tls_ca: None,
            tls_cert: None,
            tls_key: None,
        }
    }
}

impl std::fmt::Debug for StoreOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreOptions")
            .field("lease_ttl", &self.lease_ttl)
            .field("connect_timeout", &self.connect_timeout)
            .field("request_timeout", &self.request_timeout)
            .field("open_without_server", &self.open_without_server)
            .field("etcd_user", &self.etcd_user)
            .field("etcd_password", &self.etcd_password.as_ref().map(|_| "***"))
            .field("tls_ca", &self.tls_ca)
            .field("tls_cert", &self.tls_cert)
            .field("tls_key", &self.tls_key)
            .finish()
    }
}

/// Opens a store. Its background tasks run on the current tokio runtime.
///
/// # Errors
/// [`StoreError::Unreachable`] within `connect_timeout` if the server does not answer and `open_without_server` is off;
/// [`StoreError::Refused`] if it refuses the account; [`StoreError::Uri`] for `p2p`, which the engine makes itself, and
/// for etcd in a build without the cargo feature `etcd`.
pub async fn open(uri: &StoreUri, options: &StoreOptions) -> Result<Arc<dyn MetadataStore>, StoreError> {
    match uri {
        StoreUri::P2p => {
            let reason = "p2p has no store of its own; the engine answers for its segment itself".to_owned();
            Err(StoreError::Uri { uri: uri.to_string(), reason })
        }
        StoreUri::Memory { name } => Ok(Arc::new(MemoryStore::open(name))),
        StoreUri::Http(http) => Ok(Arc::new(HttpStore::open(http, options).await?)),
        #[cfg(feature = "etcd")]
        StoreUri::Etcd(etcd) => Ok(Arc::new(super::etcd::EtcdStore::open(etcd, options).await?)),
        #[cfg(not(feature = "etcd"))]
        StoreUri::Etcd(_) => {
            let reason = "this build has no etcd; build with the cargo feature etcd".to_owned();
            Err(StoreError::Uri { uri: uri.to_string(), reason })
        }
    }
}

/// Puts a value even where the server keeps an existing one: then the key is removed first.
///
/// For a `rpc_meta` key on Mooncake's HTTP server, whose last owner left it behind, and for a session key that was lost
/// with its lease. The caller has made sure that the
/// recorded address does not answer.
///
/// # Errors
/// As [`MetadataStore::put`] and [`MetadataStore::remove`].
pub async fn take_over(
    store: &dyn MetadataStore,
    key: &str,
    value: &[u8],
    lifetime: Lifetime,
) -> Result<u64, StoreError> {
    match store.put(key, value, lifetime).await {
        Err(StoreError::Exists { .. }) => {
            store.remove(key).await?;
            store.put(key, value, lifetime).await
        }
        outcome => outcome,
    }
}
