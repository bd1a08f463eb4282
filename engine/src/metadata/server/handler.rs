//! Requests of the metadata server and their answers.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Bytes, Incoming},
    header::{ALLOW, CONTENT_TYPE, HeaderMap, HeaderValue, IF_MATCH, IF_NONE_MATCH},
};
use serde::Serialize;
use tokio::{sync::SemaphorePermit, time::timeout};

use super::{
    super::{
        Expect, percent,
        table::{Compacted, PutOutcome},
        wire::{self, Changes, Listing, SessionAnswer},
    },
    State,
};

/// Path of keys and of our extension.
pub(super) const PATH: &str = "/metadata";
const HEALTH: &str = "/health";
/// Most changes in one answer to a watch.
const WATCH_LIMIT: usize = 256;
/// Shortest and longest time to live of a session.
const TTL_MS: (u64, u64) = (100, 24 * 3_600 * 1_000);
/// Start of a body that is not counted against `max_bodies_bytes`: about what a connection reads ahead anyway.
const FREE_BODY_BYTES: usize = 16 << 10;
/// Longest wait for room for more of a body; the other bodies may be waiting for each other.
const ROOM_WAIT: Duration = Duration::from_secs(1);
/// Longest session name.
const MAX_SESSION_BYTES: usize = 128;

type Answer = Response<Full<Bytes>>;

/// Parameters of a request.
#[derive(Debug, Default)]
struct Query {
    key: Option<String>,
    session: Option<String>,
    prefix: Option<String>,
    watch: Option<String>,
    after: Option<u64>,
    ttl_ms: Option<u64>,
    wait_ms: Option<u64>,
}

/// Answers one request.
pub(super) async fn answer(state: &State, request: Request<Incoming>) -> Answer {
    let mut answer = match request.uri().path() {
        PATH => metadata(state, request).await,
        HEALTH => health(state, request.method()),
        _ => text(StatusCode::NOT_FOUND, "no such path"),
    };
    answer.headers_mut().insert(wire::SERVER, HeaderValue::from_static(wire::VERSION));
    answer
}

async fn metadata(state: &State, request: Request<Incoming>) -> Answer {
    let Some(query) = Query::parse(request.uri().query().unwrap_or_default()) else {
        return text(StatusCode::BAD_REQUEST, "unreadable query");
    };
    if let Some(key) = &query.key {
        return match *request.method() {
            Method::GET => read(state, key, request.headers()),
            Method::PUT => put(state, key, request).await,
            Method::DELETE => remove(state, key),
            _ => method_not_allowed("GET, PUT, DELETE"),
        };
    }
    match (request.method(), &query) {
        (&Method::POST, Query { session: Some(id), .. }) => renew(state, id, query.ttl_ms),
        (&Method::DELETE, Query { session: Some(id), .. }) => end(state, id),
        (&Method::GET, Query { prefix: Some(prefix), .. }) => list(state, prefix),
        (&Method::GET, Query { watch: Some(prefix), after: Some(after), .. }) => {
            let wait = query.wait_ms.map_or(wire::MAX_WATCH_WAIT, Duration::from_millis);
            watch(state, prefix, *after, wait.min(wire::MAX_WATCH_WAIT)).await
        }
        _ => text(StatusCode::BAD_REQUEST, "a key is required"),
    }
}

fn health(state: &State, method: &Method) -> Answer {
    #[derive(Serialize)]
    struct Health {
        status: &'static str,
        keys: usize,
        sessions: usize,
        revision: u64,
    }
    if *method != Method::GET {
        return method_not_allowed("GET");
    }
    let ((keys, sessions), revision) = state.table.with(|table| {
        table.expire(Instant::now());
        (table.counts(), table.revision())
    });
    json(&Health { status: "ok", keys, sessions, revision })
}

fn read(state: &State, key: &str, headers: &HeaderMap) -> Answer {
    let now = Instant::now();
    let session = headers.get(wire::SESSION).and_then(|value| value.to_str().ok());
    let found = state.table.with(|table| {
        table.expire(now);
        table.get(key, now).map(|entry| (entry, session.is_some_and(|id| table.belongs(key, id))))
    });
    let Some((entry, own)) = found else { return text(StatusCode::NOT_FOUND, "no such key") };
    let mut answer = body(StatusCode::OK, entry.value.into());
    answer.headers_mut().insert(wire::REVISION, entry.revision.into());
    if own {
        answer.headers_mut().insert(wire::OWN, 1.into());
    }
    if let Some(ttl) = entry.ttl {
        answer.headers_mut().insert(wire::TTL_MS, wire::as_millis(ttl).into());
    }
    answer
}

async fn put(state: &State, key: &str, request: Request<Incoming>) -> Answer {
    let headers = request.headers();
    let ours = headers.contains_key(wire::CLIENT);
    let session = headers.get(wire::SESSION).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let Ok(guard) = guard(headers) else {
        return text(StatusCode::BAD_REQUEST, "unreadable guard");
    };
    let value = match receive(state, request).await {
        Ok(value) => value,
        Err(answer) => return answer,
    };
    let outcome = state.table.with(|table| {
        let now = Instant::now();
        table.expire(now);
        if !ours && key.contains(wire::GUARDED) && table.get(key, now).is_some() {
            return None;
        }
        Some(table.put(key, Arc::from(&value[..]), session.as_deref(), guard))
    });
    match outcome {
        None => text(StatusCode::BAD_REQUEST, "the key exists and is not replaced"),
        Some(PutOutcome::Done(revision)) => {
            let mut answer = text(StatusCode::OK, "stored");
            answer.headers_mut().insert(wire::REVISION, revision.into());
            answer
        }
        Some(PutOutcome::Mismatch) => text(StatusCode::PRECONDITION_FAILED, "the guard does not hold"),
        Some(PutOutcome::UnknownSession) => text(StatusCode::CONFLICT, "the session is not open"),
        Some(PutOutcome::TooLong) => text(StatusCode::PAYLOAD_TOO_LARGE, "key or value is too long"),
        Some(PutOutcome::Full) => text(StatusCode::INSUFFICIENT_STORAGE, "the server is full"),
    }
}

fn remove(state: &State, key: &str) -> Answer {
    let removed = state.table.with(|table| {
        table.expire(Instant::now());
        table.remove(key)
    });
    if removed { text(StatusCode::OK, "removed") } else { text(StatusCode::NOT_FOUND, "no such key") }
}

fn renew(state: &State, id: &str, ttl_ms: Option<u64>) -> Answer {
    let Some(ttl_ms) = ttl_ms else { return text(StatusCode::BAD_REQUEST, "ttl_ms is required") };
    if id.is_empty() || id.len() > MAX_SESSION_BYTES {
        return text(StatusCode::BAD_REQUEST, "a session name has 1 to 128 bytes");
    }
    let ttl_ms = ttl_ms.clamp(TTL_MS.0, TTL_MS.1);
    let opened = state.table.with(|table| {
        let now = Instant::now();
        table.expire(now);
        table.open_session(id, Some(Duration::from_millis(ttl_ms)), now)
    });
    match opened {
        Some(incarnation) => json(&SessionAnswer { incarnation, ttl_ms }),
        None => text(StatusCode::INSUFFICIENT_STORAGE, "the server has its limit of sessions"),
    }
}

fn end(state: &State, id: &str) -> Answer {
    let ended = state.table.with(|table| table.close_session(id));
    if ended { text(StatusCode::OK, "ended") } else { text(StatusCode::NOT_FOUND, "no such session") }
}

fn list(state: &State, prefix: &str) -> Answer {
    let now = Instant::now();
    let (revision, entries) = state.table.with(|table| {
        table.expire(now);
        (table.revision(), table.list(prefix, now))
    });
    json(&Listing { revision, entries: entries.into_iter().map(Into::into).collect() })
}

async fn watch(state: &State, prefix: &str, after: u64, wait: Duration) -> Answer {
    let mut changed = state.table.subscribe();
    let poll = async {
        loop {
            match read_changes(state, prefix, after) {
                Ok(changes) if changes.changes.is_empty() => {}
                outcome => return Some(outcome),
            }
            changed.changed().await.ok()?;
        }
    };
    // After the wait the answer is empty, with the revision to go on from.
    let outcome = timeout(wait, poll).await.ok().flatten().unwrap_or_else(|| read_changes(state, prefix, after));
    match outcome {
        Ok(changes) => json(&changes),
        Err(Compacted) => text(StatusCode::GONE, "the history does not reach back, list again"),
    }
}

fn read_changes(state: &State, prefix: &str, after: u64) -> Result<Changes, Compacted> {
    state.table.with(|table| {
        table.expire(Instant::now());
        let changes = table.changes_after(prefix, after, WATCH_LIMIT)?;
        let cut = changes.len() == WATCH_LIMIT;
        let last = changes.last().map_or(after, |(revision, _)| *revision);
        let revision = if cut { last } else { table.revision() };
        Ok(Changes { revision, changes: changes.into_iter().map(|(_, event)| event.into()).collect() })
    })
}

/// Reads the body within the limits of size, time and memory.
async fn receive(state: &State, request: Request<Incoming>) -> Result<Vec<u8>, Answer> {
    let limit = state.options.limits.max_value_bytes;
    let body = request.into_body();
    if body.size_hint().lower() > limit as u64 {
        return Err(too_long());
    }
    match timeout(state.options.body_timeout, receive_within(state, body, limit)).await {
        Ok(received) => received,
        Err(_) => Err(text(StatusCode::REQUEST_TIMEOUT, "the body took too long")),
    }
}

/// Reads a body. What has arrived is charged, not what was announced, so that only sending takes room from others.
async fn receive_within(state: &State, mut body: Incoming, limit: usize) -> Result<Vec<u8>, Answer> {
    let pool = state.options.max_bodies_bytes >> 10;
    let (mut value, mut charged) = (Vec::new(), 0);
    let mut room: Option<SemaphorePermit<'_>> = None;
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else { return Err(text(StatusCode::BAD_REQUEST, "the body ended early")) };
        let Ok(chunk) = frame.into_data() else { continue };
        let length = value.len() + chunk.len();
        if length > limit {
            return Err(too_long());
        }
        // A body longer than the whole pool may take all of it.
        let due = length.saturating_sub(FREE_BODY_BYTES).div_ceil(1 << 10).min(pool);
        if due > charged {
            let kib = u32::try_from(due - charged).unwrap_or(u32::MAX);
            let Ok(Ok(more)) = timeout(ROOM_WAIT, state.bodies.acquire_many(kib)).await else {
                return Err(text(StatusCode::SERVICE_UNAVAILABLE, "no room for another body"));
            };
            match &mut room {
                Some(room) => room.merge(more),
                None => room = Some(more),
            }
            charged = due;
        }
        value.extend_from_slice(&chunk);
    }
    Ok(value)
}

fn too_long() -> Answer {
    text(StatusCode::PAYLOAD_TOO_LARGE, "the value is too long")
}

/// The guard of a put; an error if its header cannot be read.
fn guard(headers: &HeaderMap) -> Result<Option<Expect>, ()> {
    if let Some(value) = headers.get(IF_NONE_MATCH) {
        return if value == "*" { Ok(Some(Expect::Absent)) } else { Err(()) };
    }
    let Some(value) = headers.get(IF_MATCH) else { return Ok(None) };
    let revision = value.to_str().ok().and_then(|text| text.strip_prefix('"')?.strip_suffix('"')?.parse().ok());
    revision.map(|revision| Some(Expect::Revision(revision))).ok_or(())
}

impl Query {
    /// Reads a query string; `None` if an escape or a number is broken. Unknown parameters are ignored.
    fn parse(text: &str) -> Option<Self> {
        let mut query = Query::default();
        for pair in text.split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = percent::decode(&value.replace('+', " "))?;
            match name {
                // Mooncake's server takes the first key, without the blanks around it.
                "key" if query.key.is_none() => query.key = Some(value.trim().to_owned()).filter(|key| !key.is_empty()),
                "session" => query.session = Some(value),
                "prefix" => query.prefix = Some(value),
                "watch" => query.watch = Some(value),
                "after" => query.after = Some(value.parse().ok()?),
                "ttl_ms" => query.ttl_ms = Some(value.parse().ok()?),
                "wait_ms" => query.wait_ms = Some(value.parse().ok()?),
                _ => {}
            }
        }
        Some(query)
    }
}

fn method_not_allowed(allowed: &'static str) -> Answer {
    let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed");
    answer.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    answer
}

fn text(status: StatusCode, message: &'static str) -> Answer {
    body(status, Bytes::from_static(message.as_bytes()))
}

fn json(value: &impl Serialize) -> Answer {
    match serde_json::to_vec(value) {
        Ok(bytes) => body(StatusCode::OK, bytes.into()),
        Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "the answer cannot be written"),
    }
}

fn body(status: StatusCode, bytes: Bytes) -> Answer {
    let mut answer = Response::new(Full::new(bytes));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_query_panics(text: String) {
            let _ = Query::parse(&text);
        }
    }

    #[test]
    fn the_first_key_counts_and_blanks_do_not() {
        let query = Query::parse("key=%20a%2Fb%20&key=c&x=1").unwrap_or_default();
        assert_eq!(query.key.as_deref(), Some("a/b"));
        assert!(Query::parse("key=+").unwrap_or_default().key.is_none());
        assert!(Query::parse("after=x").is_none());
    }
}
