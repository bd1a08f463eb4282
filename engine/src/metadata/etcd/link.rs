//! Connection to an etcd cluster: one client, bounded calls, retries of what may be repeated.
//!
//! One endpoint is used as long as it answers; a call that it leaves open goes on to the next one. (Spreading the calls
//! over all endpoints would send a share of them to a member that is frozen.)
//!
//! Invariants:
//! * every call ends within `request_timeout`, its retries included; a frozen server is no exception;
//! * after a call without an answer the client is made anew, so a connection that died unseen is not used for ever;
//! * a call that must not be repeated is sent once, and its error says that it may have been applied.

use std::{
    future::{Future, pending},
    path::Path,
    time::Duration,
};

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout, timeout_at},
};

use super::super::{StoreError, StoreOptions, uri::EtcdUri};

/// HTTP/2 pings while a call or a watch is open; etcd wants at least five seconds between them.
const PING: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(3));
/// TCP keep-alive, for connections without a call.
const TCP_KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Most endpoints that one call tries to reach before its time is over, if they are silent.
const MAX_SILENT: u32 = 3;
/// First wait before a retry; doubled each time.
const RETRY: Duration = Duration::from_millis(50);

/// `google.rpc.Code` numbers (the status codes of gRPC) of answers that repeating does not change.
const DEFINITE: [i32; 9] = [3, 5, 6, 7, 8, 9, 11, 12, 16];
/// `NOT_FOUND`: a put under a lease that etcd does not know.
const NOT_FOUND: i32 = 5;
/// `PERMISSION_DENIED`.
const PERMISSION_DENIED: i32 = 7;

/// Whether a call may be sent again when its answer did not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    /// As often as the time allows.
    Yes,
    /// Never.
    No,
}

/// Failure of a call.
#[derive(Debug)]
pub(super) struct CallError {
    /// Status code, if etcd answered.
    code: Option<i32>,
    /// What the caller of the store gets.
    pub(super) error: StoreError,
}

/// One cluster.
pub(super) struct Link {
    store: String,
    endpoints: Vec<String>,
    options: ConnectOptions,
    connect_timeout: Duration,
    request_timeout: Duration,
    slot: Mutex<Slot>,
}

#[derive(Default)]
struct Slot {
    client: Option<Client>,
    /// Counts the clients made, so that only the one that failed is thrown away.
    made: u64,
    /// Counts the endpoints tried; the rest of the division by their number is the one in use.
    turn: usize,
}

impl CallError {
    /// Whether etcd answered that there is no such lease.
    pub(super) fn is_lease_lost(&self) -> bool {
        self.code == Some(NOT_FOUND)
    }

    /// Whether etcd answered, but the account may not.
    pub(super) fn is_permission(&self) -> bool {
        self.code == Some(PERMISSION_DENIED)
    }

    /// Whether the call may have been applied.
    pub(super) fn is_open(&self) -> bool {
        self.code.is_none()
    }
}

impl From<CallError> for StoreError {
    fn from(error: CallError) -> Self {
        error.error
    }
}

impl Link {
    /// Reads certificates; connects to nothing yet.
    pub(super) fn new(uri: &EtcdUri, options: &StoreOptions) -> Result<Self, StoreError> {
        let connect = ConnectOptions::new()
            .with_connect_timeout(options.connect_timeout)
            .with_timeout(options.request_timeout)
            .with_keep_alive(PING.0, PING.1)
            // etcd ends connections that are pinged without a call; those have TCP keep-alive.
            .with_keep_alive_while_idle(false)
            .with_tcp_keepalive(TCP_KEEP_ALIVE)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        let user = uri.user.as_ref().or(options.etcd_user.as_ref());
        let password = uri.password.as_ref().or(options.etcd_password.as_ref());
        let connect = match (user, password) {
            (Some(user), Some(password)) => connect.with_user(user, password),
            _ => connect,
        };
        let tls = tls_options(uri, options).map_err(|reason| {
            let uri = format!("etcd://{}", uri.endpoints.join(","));
            StoreError::Uri { uri, reason }
        })?;
        Ok(Link {
            store: format!("etcd {}", uri.endpoints.join(",")),
            endpoints: uri.endpoints.clone(),
            options: match tls {
                Some(tls) => connect.with_tls(tls),
                None => connect,
            },
            connect_timeout: options.connect_timeout,
            request_timeout: options.request_timeout,
            slot: Mutex::default(),
        })
    }

    /// Store and endpoints for messages.
    pub(super) fn describe(&self) -> &str {
        &self.store
    }

    /// How long a call may take.
    pub(super) fn request_timeout(&self) -> Duration {
        self.request_timeout
    }

    /// The client, made if there is none. The number tells it from later ones.
    pub(super) async fn client(&self) -> Result<(Client, u64), CallError> {
        let mut slot = self.slot.lock().await;
        if let Some(client) = &slot.client {
            return Ok((client.clone(), slot.made));
        }
        let endpoint = &self.endpoints[slot.turn % self.endpoints.len()];
        let limit = self.connect_timeout.min(self.attempt());
        let failure = match timeout(limit, Client::connect([endpoint], Some(self.options.clone()))).await {
            Ok(Ok(client)) => {
                slot.made += 1;
                slot.client = Some(client.clone());
                return Ok((client, slot.made));
            }
            Ok(Err(error)) => self.failed("connect", "account", &error),
            Err(_) => self.silent(limit),
        };
        slot.turn += 1;
        Err(failure)
    }

    /// Throws a client away, if it is still the current one; the next is of the next endpoint.
    pub(super) async fn suspect(&self, made: u64) {
        let mut slot = self.slot.lock().await;
        if slot.made == made && slot.client.take().is_some() {
            slot.turn += 1;
        }
    }

    /// How long a call that may be repeated waits for one endpoint.
    fn attempt(&self) -> Duration {
        let endpoints = u32::try_from(self.endpoints.len()).unwrap_or(MAX_SILENT);
        self.request_timeout / (endpoints.min(MAX_SILENT) + 1)
    }

    /// Runs one call.
    pub(super) async fn call<T, C, F>(
        &self,
        operation: &'static str,
        key: &str,
        repeat: Repeat,
        call: C,
    ) -> Result<T, CallError>
    where
        C: Fn(Client) -> F,
        F: Future<Output = Result<T, Error>>,
    {
        let deadline = Instant::now() + self.request_timeout;
        let attempt = if repeat == Repeat::Yes { self.attempt() } else { self.request_timeout };
        let mut wait = RETRY;
        loop {
            let outcome = match timeout_at(deadline, self.client()).await {
                Ok(Ok((client, made))) => {
                    let limit = (Instant::now() + attempt).min(deadline);
                    match timeout_at(limit, call(client)).await {
                        Ok(Ok(value)) => return Ok(value),
                        Ok(Err(error)) => {
                            let failure = self.failed(operation, key, &error);
                            if failure.is_open() {
                                self.suspect(made).await;
                            }
                            Err(failure)
                        }
                        Err(_) => {
                            self.suspect(made).await;
                            Err(self.silent(attempt))
                        }
                    }
                }
                Ok(Err(error)) => Err(error),
                Err(_) => Err(self.silent(self.request_timeout)),
            };
            let stop_at = Instant::now() + wait;
            match outcome {
                Err(error) if error.is_open() && repeat == Repeat::Yes && stop_at < deadline => {
                    // Nothing to wait for but the time: etcd tells nobody that it is back.
                    let _ = timeout_at(stop_at, pending::<()>()).await;
                    wait *= 2;
                }
                outcome => return outcome,
            }
        }
    }

    /// The error of a call that etcd or the connection failed.
    pub(super) fn failed(&self, operation: &'static str, key: &str, error: &Error) -> CallError {
        let code = match error {
            Error::GRpcStatus(status) => Some(i32::from(status.code())).filter(|code| DEFINITE.contains(code)),
            _ => None,
        };
        let store = self.store.clone();
        let reason = match error {
            Error::GRpcStatus(status) => status.message().to_owned(),
            other => other.to_string(),
        };
        let error = match code {
            Some(_) => StoreError::Refused { store, operation, key: key.to_owned(), reason },
            None => StoreError::Unreachable { store, reason },
        };
        CallError { code, error }
    }

    fn silent(&self, limit: Duration) -> CallError {
        let reason = format!("no answer within {} ms", limit.as_millis());
        CallError { code: None, error: StoreError::Unreachable { store: self.store.clone(), reason } }
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("store", &self.store).finish_non_exhaustive()
    }
}

/// TLS as the connection string or the settings want it.
fn tls_options(uri: &EtcdUri, options: &StoreOptions) -> Result<Option<TlsOptions>, String> {
    let read = |what: &str, path: &Path| {
        std::fs::read(path).map_err(|error| format!("cannot read the {what} {}: {error}", path.display()))
    };
    let ca = uri.tls_ca.as_ref().or(options.tls_ca.as_ref());
    let cert = uri.tls_cert.as_ref().or(options.tls_cert.as_ref());
    let key = uri.tls_key.as_ref().or(options.tls_key.as_ref());
    let Some(ca) = ca else {
        return match (cert, key) {
            (None, None) => Ok(None),
            _ => Err("a client certificate needs the authority of the server's, ca".to_owned()),
        };
    };
    let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read("ca", ca)?));
    match (cert, key) {
        (None, None) => Ok(Some(tls)),
        (Some(cert), Some(key)) => Ok(Some(tls.identity(Identity::from_pem(read("cert", cert)?, read("key", key)?)))),
        _ => Err("cert and key come together".to_owned()),
    }
}
