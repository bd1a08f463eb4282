//! HTTP metadata server for those without etcd: `tidewire metadata-server`.
//!
//! It answers Mooncake's clients as Mooncake's own server does (`GET`, `PUT` and `DELETE` of `/metadata?key=`), and ours
//! with leases, guarded puts, listings and watches on top (see `wire`). Keys live in memory and are lost when it stops;
//! our clients put theirs again when it is back. `GET /health` tells how many there are.
//!
//! Invariants:
//! * it listens on the address given and no other;
//! * keys, bodies in transit, connections and history are bounded ([`ServerOptions`]);
//! * a connection that sends no complete request head within `header_timeout` is closed, an idle one included.

mod handler;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

pub use super::table::Limits;
use super::{
    shared::SharedTable,
    stop::{StopSignal, StopSource},
};

/// How often the sessions are looked at while there are any.
const EXPIRE_EVERY: Duration = Duration::from_millis(200);
/// Wait after an accept that failed, most likely for want of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// Longest wait for connections at the end.
const STOP_WITHIN: Duration = Duration::from_secs(3);

/// Settings of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerOptions {
    /// Bounds of keys, values, sessions and history.
    pub limits: Limits,
    /// Most connections; further ones wait until one ends.
    pub max_connections: usize,
    /// Longest wait for a request head, so also the longest idle time of a connection.
    pub header_timeout: Duration,
    /// Longest wait for a request body.
    pub body_timeout: Duration,
    /// Most bytes of request bodies being received, the first 16 KiB of each aside.
    pub max_bodies_bytes: usize,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            limits: Limits::default(),
            max_connections: 8_192,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(10),
            max_bodies_bytes: 256 << 20,
        }
    }
}

/// Failure to start the server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error("metadata server cannot listen on {addr}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A running metadata server. Dropping it stops it without waiting.
#[derive(Debug)]
pub struct MetadataServer {
    local_addr: SocketAddr,
    stop: StopSource,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    table: SharedTable,
    options: ServerOptions,
    connections: Arc<Semaphore>,
    /// Bytes of bodies, in KiB.
    bodies: Semaphore,
}

impl MetadataServer {
    /// Listens on `addr` and serves on the current tokio runtime.
    ///
    /// # Errors
    /// [`ServerError::Listen`] if the address is in use or not ours.
    pub async fn start(addr: SocketAddr, options: ServerOptions) -> Result<Self, ServerError> {
        let listen = |source| ServerError::Listen { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(listen)?;
        let local_addr = listener.local_addr().map_err(listen)?;
        // Starting at the time, revisions of a server that was restarted are never taken for those of its earlier life.
        let base = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let state = Arc::new(State {
            table: SharedTable::new(u64::try_from(base).unwrap_or_default(), options.limits),
            connections: Arc::new(Semaphore::new(options.max_connections)),
            bodies: Semaphore::new(options.max_bodies_bytes >> 10),
            options,
        });
        let stop = StopSource::new();
        tokio::spawn(accept(listener, state.clone(), stop.signal()));
        tokio::spawn(expire(state.clone(), stop.signal()));
        Ok(MetadataServer { local_addr, stop, state })
    }

    /// The address it listens on.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// The connection string of this server.
    pub fn uri(&self) -> String {
        format!("http://{}{}", self.local_addr, handler::PATH)
    }

    /// Stops listening, closes every connection and waits for that, at most three seconds.
    pub async fn stop(self) {
        self.stop.stop();
        let all = u32::try_from(self.state.options.max_connections).unwrap_or(u32::MAX);
        if timeout(STOP_WITHIN, self.state.connections.acquire_many(all)).await.is_err() {
            tracing::warn!(addr = %self.local_addr, "connections of the metadata server did not end in time");
        }
    }
}

/// Accepts connections until the stop.
async fn accept(listener: TcpListener, state: Arc<State>, mut stop: StopSignal) {
    loop {
        let next = async {
            let permit = state.connections.clone().acquire_owned().await.ok()?;
            Some((permit, listener.accept().await))
        };
        let accepted = tokio::select! {
            () = stop.stopped() => return,
            accepted = next => accepted,
        };
        match accepted {
            Some((permit, Ok((stream, _)))) => {
                tokio::spawn(serve(stream, permit, state.clone(), stop.clone()));
            }
            Some((_, Err(error))) => {
                tracing::warn!(%error, "metadata server cannot accept a connection");
                if stop.stopped_within(ACCEPT_RETRY).await {
                    return;
                }
            }
            None => return,
        }
    }
}

/// Serves one connection until it ends or the stop.
async fn serve(stream: TcpStream, permit: OwnedSemaphorePermit, state: Arc<State>, mut stop: StopSignal) {
    // Only latency depends on it.
    let _ = stream.set_nodelay(true);
    let header_timeout = state.options.header_timeout;
    let service = service_fn(|request| {
        let state = state.clone();
        async move { Ok::<_, std::convert::Infallible>(handler::answer(&state, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        () = stop.stopped() => {}
        outcome = connection => if let Err(error) = outcome {
            tracing::debug!(%error, "metadata connection ended");
        },
    }
    drop(permit);
}

/// Ends sessions on time, so that watchers hear of it.
async fn expire(state: Arc<State>, mut stop: StopSignal) {
    let mut changed = state.table.subscribe();
    loop {
        let wait = state.table.with(|table| {
            table.expire(Instant::now());
            table.next_deadline().map(|at| at.saturating_duration_since(Instant::now()).min(EXPIRE_EVERY))
        });
        let next = async {
            match wait {
                // A millisecond more, so that the deadline has passed.
                Some(wait) => drop(timeout(wait + Duration::from_millis(1), std::future::pending::<()>()).await),
                None => drop(changed.changed().await),
            }
        };
        tokio::select! {
            () = stop.stopped() => return,
            () = next => {}
        }
    }
}
