//! HTTP/1.1 requests to one metadata server over connections that are kept.
//!
//! Invariants:
//! * a request ends within its limit, reading the answer included;
//! * an idle connection is used again only within [`MAX_IDLE`]; one that turns out dead before a byte of the answer came
//!   is replaced once, for requests that may be repeated.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{
    Method, Request, StatusCode,
    body::Bytes,
    client::conn::http1::{self, SendRequest},
    header::{CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue},
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use super::super::{StoreError, uri::HttpUri, wire};
use crate::memory::lock;

/// Longest time a connection is kept without use.
const MAX_IDLE: Duration = Duration::from_secs(15);
/// Most connections kept.
const MAX_KEPT: usize = 4;
/// Longest answer.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// A metadata server and the connections to it.
#[derive(Debug)]
pub(super) struct Connections {
    uri: HttpUri,
    store: String,
    connect_timeout: Duration,
    kept: Mutex<Vec<(Instant, SendRequest<Full<Bytes>>)>>,
}

/// One request, without the path.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) method: Method,
    /// Query string.
    pub(super) query: String,
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    pub(super) body: Bytes,
    /// Whether doing it twice is as good as once.
    pub(super) repeatable: bool,
}

/// Answer of the server.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    headers: HeaderMap,
    pub(super) body: Bytes,
}

/// Why a request got no answer.
enum Failure {
    /// The kept connection was dead.
    Stale(hyper::Error),
    /// Anything else.
    Other(String),
}

impl Call {
    /// A request without headers and body.
    pub(super) fn new(method: Method, query: String) -> Self {
        Call { method, query, headers: Vec::new(), body: Bytes::new(), repeatable: true }
    }

    /// Adds a header. A value that is no header value is left out, and the server refuses the call.
    pub(super) fn header(mut self, name: &'static str, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.push((HeaderName::from_static(name), value));
        }
        self
    }
}

impl Answer {
    /// Whether our server gave it.
    pub(super) fn is_ours(&self) -> bool {
        self.headers.contains_key(wire::SERVER)
    }

    /// A number in a header.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.headers.get(name)?.to_str().ok()?.parse().ok()
    }

    /// Status and the start of the text, for messages.
    pub(super) fn text(&self) -> String {
        let text: String = String::from_utf8_lossy(&self.body).chars().take(200).collect();
        format!("status {}: {text}", self.status.as_u16())
    }
}

impl Connections {
    /// No connection is made yet.
    pub(super) fn new(uri: HttpUri, connect_timeout: Duration) -> Self {
        let store = format!("http {}", uri.authority());
        Connections { uri, store, connect_timeout, kept: Mutex::new(Vec::new()) }
    }

    /// Store and address for messages.
    pub(super) fn describe(&self) -> &str {
        &self.store
    }

    /// Sends a request and reads the answer, within `limit`.
    pub(super) async fn call(&self, call: &Call, limit: Duration) -> Result<Answer, StoreError> {
        match timeout(limit, self.call_unlimited(call)).await {
            Ok(outcome) => outcome.map_err(|reason| self.unreachable(reason)),
            Err(_) => Err(self.unreachable(format!("no answer within {} ms", limit.as_millis()))),
        }
    }

    fn unreachable(&self, reason: String) -> StoreError {
        StoreError::Unreachable { store: self.store.clone(), reason }
    }

    async fn call_unlimited(&self, call: &Call) -> Result<Answer, String> {
        if let Some(mut sender) = self.take_kept() {
            match self.exchange(&mut sender, call).await {
                Ok(answer) => {
                    self.keep(sender);
                    return Ok(answer);
                }
                Err(Failure::Stale(error)) if !call.repeatable && !error.is_canceled() => {
                    return Err(describe_error(&error));
                }
                Err(Failure::Stale(_)) => {}
                Err(Failure::Other(reason)) => return Err(reason),
            }
        }
        let mut sender = self.connect().await?;
        match self.exchange(&mut sender, call).await {
            Ok(answer) => {
                self.keep(sender);
                Ok(answer)
            }
            Err(Failure::Stale(error)) => Err(describe_error(&error)),
            Err(Failure::Other(reason)) => Err(reason),
        }
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, String> {
        let address = (self.uri.host.as_str(), self.uri.port);
        let stream = match timeout(self.connect_timeout, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(format!("connect failed: {error}")),
            Err(_) => return Err(format!("connect took over {} ms", self.connect_timeout.as_millis())),
        };
        // Only latency depends on it.
        let _ = stream.set_nodelay(true);
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| describe_error(&e))?;
        tokio::spawn(async move {
            // Its error reaches the request in flight as well.
            let _ = connection.await;
        });
        Ok(sender)
    }

    async fn exchange(&self, sender: &mut SendRequest<Full<Bytes>>, call: &Call) -> Result<Answer, Failure> {
        let mut request = Request::new(Full::new(call.body.clone()));
        *request.method_mut() = call.method.clone();
        let target = format!("{}?{}", self.uri.path, call.query);
        *request.uri_mut() = target.parse().map_err(|error| Failure::Other(format!("request {target}: {error}")))?;
        let headers = request.headers_mut();
        let host = HeaderValue::from_str(&self.uri.authority());
        headers.insert(HOST, host.map_err(|error| Failure::Other(format!("host: {error}")))?);
        headers.insert(wire::CLIENT, HeaderValue::from_static(wire::VERSION));
        if call.method == Method::PUT {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        for (name, value) in &call.headers {
            headers.insert(name.clone(), value.clone());
        }
        sender.ready().await.map_err(Failure::Stale)?;
        let response = sender.send_request(request).await.map_err(Failure::Stale)?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await.map_err(|error| {
            let too_long = error.is::<LengthLimitError>();
            Failure::Other(if too_long { "the answer is too long".to_owned() } else { error.to_string() })
        })?;
        Ok(Answer { status: parts.status, headers: parts.headers, body: body.to_bytes() })
    }

    fn take_kept(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut kept = lock(&self.kept);
        kept.retain(|(since, sender)| since.elapsed() < MAX_IDLE && !sender.is_closed());
        kept.pop().map(|(_, sender)| sender)
    }

    fn keep(&self, sender: SendRequest<Full<Bytes>>) {
        let mut kept = lock(&self.kept);
        if kept.len() < MAX_KEPT && !sender.is_closed() {
            kept.push((Instant::now(), sender));
        }
    }

    /// Closes the kept connections.
    pub(super) fn close(&self) {
        lock(&self.kept).clear();
    }
}

/// The error with its causes.
fn describe_error(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}
