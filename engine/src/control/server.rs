//! Control server: accepts connections, answers one request on each, and lets no peer delay another.
//!
//! Runs as tasks of the runtime it is started on. A connection has `request_timeout` to send its request and
//! `linger_timeout` to close after the reply. Beyond `max_connections` the one that has waited longest is dropped.
//!
//! Invariants:
//! * memory of a connection grows with the bytes received; what arrives beyond 64 KiB shares `max_buffered_bytes`;
//! * after [`ControlServer::stop`] returned, the port is closed and no task is left.

use std::{collections::BTreeMap, io, net::SocketAddr, sync::Arc, time::Duration};

use tidewire_core::mooncake::control::{
    ControlFrame, ControlKind, DEFAULT_MAX_FRAME_BYTES, FrameError, Handshake, NotifyBody, ProbeBody, encode_frame,
    encode_old_frame,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::{Semaphore, SemaphorePermit, watch},
    task::{AbortHandle, Id, JoinHandle, JoinSet},
    time::timeout,
};

use super::{
    ControlError, ControlHandler,
    frame_io::{ReadError, read_body, read_length, read_more},
    listen::{PortChoice, listen},
};

/// The start of a request that is not counted against `max_buffered_bytes`, and the step in which the rest is.
const STEP_BYTES: u64 = 64 << 10;
/// What a peer may send after its request before the connection is cut.
const MAX_TRAILING_BYTES: u64 = 64 << 10;
/// How long accepting pauses when the process has no descriptor left and no connection to drop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Limits of a [`ControlServer`].
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Address to listen on; nothing else is listened on.
    pub host: String,
    /// Port to listen on.
    pub port: PortChoice,
    /// Longest request, as the length field says.
    pub max_request_bytes: u64,
    /// Sum of what has arrived of requests beyond their first 64 KiB, each counted up to 64 KiB ahead.
    pub max_buffered_bytes: u32,
    /// Connections at a time.
    pub max_connections: usize,
    /// From accept to the last byte of the request.
    pub request_timeout: Duration,
    /// From the reply to the peer's close.
    pub linger_timeout: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            host: "127.0.0.1".to_owned(),
            port: PortChoice::default(),
            max_request_bytes: DEFAULT_MAX_FRAME_BYTES,
            max_buffered_bytes: 256 << 20,
            max_connections: 4096,
            request_timeout: Duration::from_secs(5),
            linger_timeout: Duration::from_secs(5),
        }
    }
}

/// A running control server. Dropping it stops accepting; [`ControlServer::stop`] also waits.
#[derive(Debug)]
pub struct ControlServer {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    task: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Listens and starts serving on `runtime`. May block to resolve the host.
    ///
    /// # Errors
    /// [`ControlError::Resolve`], [`ControlError::Listen`].
    pub fn start(
        config: ServerConfig,
        handler: Arc<dyn ControlHandler>,
        runtime: &Handle,
    ) -> Result<Self, ControlError> {
        let listener = listen(&config.host, &config.port)?;
        let failed = |source| ControlError::Listen { address: config.host.clone(), source };
        let address = listener.local_addr().map_err(failed)?;
        let listener = {
            let _guard = runtime.enter();
            TcpListener::from_std(listener).map_err(failed)?
        };
        let (stop, stopped) = watch::channel(false);
        let shared = Arc::new(Shared {
            buffered: Semaphore::new(config.max_buffered_bytes as usize),
            handler,
            stopped: stopped.clone(),
            config,
        });
        let task = runtime.spawn(accept_loop(listener, shared, stopped));
        Ok(ControlServer { address, stop, task: Some(task) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes the port, lets connections that are being answered finish within `drain`, then drops the rest.
    pub async fn stop(mut self, drain: Duration) {
        let _ = self.stop.send(true);
        if let Some(mut task) = self.task.take()
            && timeout(drain, &mut task).await.is_err()
        {
            task.abort();
            let _ = task.await;
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
    }
}

#[derive(Debug)]
struct Shared {
    config: ServerConfig,
    handler: Arc<dyn ControlHandler>,
    buffered: Semaphore,
    stopped: watch::Receiver<bool>,
}

async fn accept_loop(listener: TcpListener, shared: Arc<Shared>, mut stopped: watch::Receiver<bool>) {
    let mut connections = Connections::default();
    loop {
        tokio::select! {
            _ = stopped.changed() => break,
            Some(ended) = connections.tasks.join_next_with_id(), if !connections.tasks.is_empty() => {
                connections.forget(match &ended { Ok((id, ())) => *id, Err(error) => error.id() });
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    if connections.tasks.len() >= shared.config.max_connections {
                        connections.drop_oldest();
                    }
                    connections.add(serve(stream, Arc::clone(&shared)));
                }
                Err(error) => {
                    tracing::warn!(%error, open = connections.tasks.len(), "control connection was not accepted");
                    // Usually no descriptor is left. Dropping who has waited longest makes room.
                    if !connections.drop_oldest() {
                        let _ = timeout(ACCEPT_PAUSE, stopped.changed()).await;
                    }
                }
            },
        }
    }
    drop(listener);
    while connections.tasks.join_next().await.is_some() {}
}

/// Open connections, oldest first.
#[derive(Default)]
struct Connections {
    tasks: JoinSet<()>,
    next: u64,
    by_age: BTreeMap<u64, AbortHandle>,
    ages: std::collections::HashMap<Id, u64>,
}

impl Connections {
    fn add(&mut self, connection: impl Future<Output = ()> + Send + 'static) {
        let handle = self.tasks.spawn(connection);
        self.ages.insert(handle.id(), self.next);
        self.by_age.insert(self.next, handle);
        self.next += 1;
    }

    fn forget(&mut self, id: Id) {
        if let Some(age) = self.ages.remove(&id) {
            self.by_age.remove(&age);
        }
    }

    fn drop_oldest(&mut self) -> bool {
        let oldest = self.by_age.pop_first();
        if let Some((_, handle)) = &oldest {
            handle.abort();
        }
        oldest.is_some()
    }
}

async fn serve(mut stream: TcpStream, shared: Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    let mut stopped = shared.stopped.clone();
    let request = tokio::select! {
        request = timeout(shared.config.request_timeout, receive(&mut stream, &shared)) => request,
        _ = stopped.wait_for(|stopped| *stopped) => return,
    };
    let body = match request {
        Ok(Ok(body)) => body,
        Ok(Err(ReadError::Frame(error))) => return tracing::debug!(%error, "control request refused"),
        Ok(Err(ReadError::Io(error))) => return tracing::debug!(%error, "control request broken off"),
        Err(_) => return tracing::debug!("control request did not arrive in time"),
    };
    let reply = match ControlFrame::decode(&body).and_then(|frame| answer(frame, &*shared.handler)) {
        Ok(reply) => reply,
        Err(error) => return tracing::debug!(%error, "control request refused"),
    };
    drop(body);
    // An answered request gets its reply even while the server stops; the stop has its own deadline.
    let sent = timeout(shared.config.linger_timeout, send(&mut stream, &reply)).await;
    if matches!(sent, Ok(Ok(()))) {
        tokio::select! {
            _ = timeout(shared.config.linger_timeout, wait_for_close(&mut stream)) => {}
            _ = stopped.wait_for(|stopped| *stopped) => {}
        }
    }
}

async fn receive(stream: &mut TcpStream, shared: &Shared) -> Result<Vec<u8>, ReadError> {
    let length = read_length(stream, shared.config.max_request_bytes).await?;
    let limit = u64::from(shared.config.max_buffered_bytes);
    let mut body = read_body(stream, length.min(STEP_BYTES)).await?;
    let mut permits: Option<SemaphorePermit<'_>> = None;
    while let left @ 1.. = length - body.len() as u64 {
        let step = left.min(STEP_BYTES);
        let permit = shared.buffered.try_acquire_many(u32::try_from(step).unwrap_or(u32::MAX));
        let permit = permit.map_err(|_| ReadError::Frame(FrameError::Length { length, limit }))?;
        match &mut permits {
            Some(permits) => permits.merge(permit),
            None => permits = Some(permit),
        }
        read_more(stream, &mut body, step).await?;
    }
    Ok(body)
}

async fn send(stream: &mut TcpStream, reply: &[u8]) -> io::Result<()> {
    stream.write_all(reply).await?;
    stream.shutdown().await
}

/// Waits for the peer to close first, so that no reply is lost to a reset.
async fn wait_for_close(stream: &mut TcpStream) -> io::Result<()> {
    let mut left = MAX_TRAILING_BYTES;
    let mut scrap = [0; 1024];
    while left > 0 {
        match stream.read(&mut scrap).await? {
            0 => break,
            read => left = left.saturating_sub(read as u64),
        }
    }
    Ok(())
}

fn answer(frame: ControlFrame<'_>, handler: &dyn ControlHandler) -> Result<Vec<u8>, FrameError> {
    let mut json = match frame.kind {
        ControlKind::Connection => handler.handshake(parse::<Handshake>(frame.json)?).encode(),
        ControlKind::Metadata => handler.metadata(frame.json),
        ControlKind::Notify => {
            let NotifyBody { name, notify_msg } = parse(frame.json)?;
            let taken = handler.notify(name, notify_msg);
            if let Err(error) = &taken {
                tracing::debug!(%error, "notification refused");
            }
            NotifyBody::answer(taken.is_ok()).encode()
        }
        ControlKind::Probe => ProbeBody::answer(handler.probe()).encode(),
    };
    json.push(b'\n');
    Ok(if frame.old { encode_old_frame(&json) } else { encode_frame(frame.kind, &json) })
}

fn parse<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, FrameError> {
    serde_json::from_slice(json).map_err(|_| FrameError::NotJson)
}
