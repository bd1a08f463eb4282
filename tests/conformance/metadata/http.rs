//! What only the HTTP store and our metadata server do: Mooncake's answers, limits, leases, restarts, idle connections.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use tidewire_engine::metadata::{
    Lifetime, StoreError, WatchEvent,
    server::{MetadataServer, ServerOptions},
    take_over,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::support::{
    CHILD_KEY, KeyHolder, PATIENCE, http, lease, next, open, raw_http, until, until_put, until_value,
};

async fn start(address: &str, options: ServerOptions) -> MetadataServer {
    let address: SocketAddr = address.parse().unwrap();
    // A port that was just given up may be taken for a moment.
    until("a server starts", || async { MetadataServer::start(address, options.clone()).await.ok() }).await
}

async fn server() -> MetadataServer {
    start("127.0.0.1:0", ServerOptions::default()).await
}

#[tokio::test]
async fn it_answers_as_mooncakes_server_does() {
    let server = server().await;
    let address = server.local_addr().to_string();
    let ask = async |method: &str, target: &str, body: &str| http(&address, method, target, body).await;
    assert_eq!(ask("GET", "/metadata", "").await.0, 400, "no key");
    assert_eq!(ask("PUT", "/metadata?key=", "x").await.0, 400, "an empty key");
    assert_eq!(ask("POST", "/metadata?key=a", "x").await.0, 405);
    assert_eq!(ask("GET", "/other?key=a", "").await.0, 404);
    assert_eq!(ask("GET", "/metadata?key=a%2Fb", "").await.0, 404);
    assert_eq!(ask("PUT", "/metadata?key=a%2Fb", "{\"x\":1}").await.0, 200);
    assert_eq!(ask("PUT", "/metadata?key=a%2Fb", "{\"x\":2}").await.0, 200, "a put replaces");
    assert_eq!(ask("GET", "/metadata?key=a%2Fb", "").await, (200, "{\"x\":2}".to_owned()));
    assert_eq!(ask("DELETE", "/metadata?key=a%2Fb", "").await.0, 200);
    assert_eq!(ask("DELETE", "/metadata?key=a%2Fb", "").await.0, 404);
    let rpc_meta = "/metadata?key=mooncake%2Frpc_meta%2Fn";
    assert_eq!(ask("PUT", rpc_meta, "1").await.0, 200);
    assert_eq!(ask("PUT", rpc_meta, "2").await.0, 400, "an existing rpc_meta is kept");
    assert_eq!(ask("GET", rpc_meta, "").await.1, "1");
    assert_eq!(ask("DELETE", rpc_meta, "").await.0, 200);
    assert_eq!(ask("PUT", rpc_meta, "2").await.0, 200);
    let (status, health) = ask("GET", "/health", "").await;
    assert_eq!(status, 200);
    let health: serde_json::Value = serde_json::from_str(&health).unwrap();
    assert_eq!(health["keys"], 1);
    server.stop().await;
}

#[tokio::test]
async fn an_rpc_meta_whose_lease_ran_out_is_free_again() {
    let server = server().await;
    let address = server.local_addr().to_string();
    let store = open(&server.uri(), &lease(400)).await.unwrap();
    store.put("mooncake/rpc_meta/n", b"1", Lifetime::Session).await.unwrap();
    let put = || async { http(&address, "PUT", "/metadata?key=mooncake%2Frpc_meta%2Fn", "2").await.0 };
    assert_eq!(put().await, 400);
    drop(store);
    until("the lease runs out", || async { (put().await == 200).then_some(()) }).await;
    server.stop().await;
}

#[tokio::test]
async fn what_is_too_much_is_refused() {
    let mut options = ServerOptions::default();
    options.limits.max_keys = 2;
    options.limits.max_value_bytes = 100;
    let server = start("127.0.0.1:0", options).await;
    let address = server.local_addr().to_string();
    let store = open(&server.uri(), &lease(10_000)).await.unwrap();
    let refused = |outcome: Result<u64, StoreError>, status: &str| match outcome {
        Err(StoreError::Refused { reason, .. }) => assert!(reason.contains(status), "{reason}"),
        other => panic!("{other:?}"),
    };
    refused(store.put("a", &[b'x'; 101], Lifetime::Permanent).await, "413");
    refused(store.put(&"k".repeat(5_000), b"", Lifetime::Permanent).await, "413");
    store.put("a", &[b'x'; 100], Lifetime::Permanent).await.unwrap();
    store.put("b", b"", Lifetime::Session).await.unwrap();
    refused(store.put("c", b"", Lifetime::Session).await, "507");
    // A body that is announced as longer, or longer than it was announced, is not read.
    let chunked =
        "PUT /metadata?key=a HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n80\r\n";
    let answer = raw_http(&address, &format!("{chunked}{}\r\n0\r\n\r\n", "x".repeat(128))).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    let announced =
        "PUT /metadata?key=a HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 999999999999\r\n\r\n";
    let answer = raw_http(&address, announced).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert_eq!(store.get("a").await.unwrap().unwrap().value.len(), 100);
    server.stop().await;
}

#[tokio::test]
async fn garbage_and_broken_requests_harm_nobody() {
    let server = server().await;
    let address = server.local_addr().to_string();
    let store = open(&server.uri(), &lease(10_000)).await.unwrap();
    for garbage in ["\0\0\0\0\r\n\r\n", "GET\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &"x".repeat(1 << 20)] {
        let answer = raw_http(&address, garbage).await;
        assert!(!answer.contains("200 OK"), "{answer}");
    }
    for target in ["/metadata?key=%zz", "/metadata?session=s", "/metadata?watch=a", "/metadata?watch=a&after=x"] {
        assert_eq!(http(&address, "GET", target, "").await.0, 400, "{target}");
    }
    assert_eq!(http(&address, "POST", "/metadata?session=&ttl_ms=1", "").await.0, 400);
    assert_eq!(http(&address, "GET", "/metadata?watch=a&after=1", "").await.0, 410, "a revision of another life");
    store.put("key", b"1", Lifetime::Session).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn a_thousand_idle_connections_delay_nobody_and_are_closed() {
    // Both ends of each connection are in this process.
    if tidewire_engine::runtime::descriptors::raise_limit().is_some_and(|limit| limit < 3_000) {
        println!("SKIP a thousand connections: the hard limit on open descriptors is below 3000");
        return;
    }
    let mut options = ServerOptions::default();
    options.header_timeout = Duration::from_secs(2);
    options.body_timeout = Duration::from_secs(2);
    let server = start("127.0.0.1:0", options).await;
    let mut idle = Vec::new();
    for index in 0..1_000 {
        let mut stream = TcpStream::connect(server.local_addr()).await.unwrap();
        let half: &[u8] = match index % 3 {
            0 => b"",
            1 => b"GET /metadata?key=a HT",
            _ => b"PUT /metadata?key=a HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nhalf",
        };
        stream.write_all(half).await.unwrap();
        idle.push(stream);
    }
    let store = open(&server.uri(), &lease(10_000)).await.unwrap();
    let start = Instant::now();
    for index in 0..100 {
        store.put("key", format!("{index}").as_bytes(), Lifetime::Session).await.unwrap();
    }
    let elapsed = start.elapsed();
    assert!(elapsed < Duration::from_secs(2), "100 puts beside 1000 idle connections took {elapsed:?}");
    let mut buffer = [0; 1_024];
    for (index, mut stream) in idle.into_iter().enumerate() {
        let end = async { while !matches!(stream.read(&mut buffer).await, Ok(0) | Err(_)) {} };
        tokio::time::timeout(PATIENCE, end).await.unwrap_or_else(|_| panic!("connection {index} stays open"));
    }
    server.stop().await;
}

#[tokio::test]
async fn the_keys_of_a_killed_process_go_within_its_lease() {
    const TTL: Duration = Duration::from_millis(1_000);
    let server = server().await;
    let store = open(&server.uri(), &lease(10_000)).await.unwrap();
    let mut watch = store.watch(CHILD_KEY).await.unwrap();
    let mut child = KeyHolder::start(&server.uri(), 1_000).await;
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(entry) if entry.value == b"child"));
    // It renews its lease.
    assert!(tokio::time::timeout(2 * TTL, watch.recv()).await.is_err(), "the key of a living process stays");
    let entry = store.get(CHILD_KEY).await.unwrap().unwrap();
    assert!(entry.ttl.is_some_and(|ttl| ttl <= TTL), "{entry:?}");
    child.kill();
    let killed = Instant::now();
    assert_eq!(next(&mut watch).await, WatchEvent::Removed { key: CHILD_KEY.to_owned() });
    let elapsed = killed.elapsed();
    assert!(elapsed < TTL + Duration::from_millis(800), "it took {elapsed:?}");
    server.stop().await;
}

#[tokio::test]
async fn a_process_that_slept_through_its_lease_puts_its_key_again_unless_it_is_taken() {
    let server = server().await;
    let store = open(&server.uri(), &lease(10_000)).await.unwrap();
    let child = KeyHolder::start(&server.uri(), 600).await;
    child.signal("STOP");
    until_value(&store, CHILD_KEY, None).await;
    child.signal("CONT");
    until_value(&store, CHILD_KEY, Some(b"child")).await;
    child.signal("STOP");
    until_value(&store, CHILD_KEY, None).await;
    store.put(CHILD_KEY, b"taken", Lifetime::Permanent).await.unwrap();
    child.signal("CONT");
    let mut watch = store.watch(CHILD_KEY).await.unwrap();
    let told = tokio::time::timeout(Duration::from_secs(2), watch.recv()).await;
    assert!(told.is_err(), "the key is left alone: {told:?}");
    server.stop().await;
}

#[tokio::test]
async fn a_restarted_server_gets_session_keys_back_and_watches_go_on() {
    let first = server().await;
    let (address, uri) = (first.local_addr().to_string(), first.uri());
    let owner = open(&uri, &lease(900)).await.unwrap();
    let watcher = open(&uri, &lease(900)).await.unwrap();
    owner.put("w/session", b"1", Lifetime::Session).await.unwrap();
    owner.put("w/permanent", b"1", Lifetime::Permanent).await.unwrap();
    let mut watch = watcher.watch("w/").await.unwrap();
    first.stop().await;
    let down = owner.get("w/session").await;
    assert!(matches!(down, Err(StoreError::Unreachable { .. })), "{down:?}");
    let second = start(&address, ServerOptions::default()).await;
    until_value(&watcher, "w/session", Some(b"1")).await;
    assert_eq!(watcher.get("w/permanent").await.unwrap(), None, "this server keeps its keys in memory");
    let mut told = Vec::new();
    while !told.iter().any(|event| matches!(event, WatchEvent::Put(_))) || told.len() < 2 {
        told.push(next(&mut watch).await);
    }
    assert!(told.contains(&WatchEvent::Removed { key: "w/permanent".to_owned() }), "{told:?}");
    watcher.put("w/new", b"1", Lifetime::Session).await.unwrap();
    until_put(&mut watch, "w/new").await;
    second.stop().await;
}

#[tokio::test]
async fn a_watch_that_fell_behind_the_history_is_told_the_difference() {
    let mut options = ServerOptions::default();
    options.limits.max_history = 10;
    let server = start("127.0.0.1:0", options).await;
    let (store, writer) = (open(&server.uri(), &lease(9_000)).await.unwrap(), server.local_addr().to_string());
    store.put("w/gone", b"1", Lifetime::Permanent).await.unwrap();
    let mut watch = store.watch("w/").await.unwrap();
    // On this single-threaded runtime nobody polls the watch while raw requests of one batch are sent.
    let mut batch = String::new();
    for index in 0..100 {
        batch += &format!("PUT /metadata?key=w%2F{} HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\n1", index % 20);
    }
    batch += "DELETE /metadata?key=w%2Fgone HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
    raw_http(&writer, &batch).await;
    let mut present = std::collections::BTreeMap::from([("w/gone".to_owned(), 0)]);
    while present.len() != 20 || present.contains_key("w/gone") {
        match next(&mut watch).await {
            WatchEvent::Put(entry) => drop(present.insert(entry.key, entry.revision)),
            WatchEvent::Removed { key } => drop(present.remove(&key)),
        }
    }
    let listed = store.list("w/").await.unwrap();
    assert_eq!(listed.len(), 20);
    while listed.iter().any(|entry| present.get(&entry.key) != Some(&entry.revision)) {
        if let WatchEvent::Put(entry) = next(&mut watch).await {
            present.insert(entry.key, entry.revision);
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn a_server_that_is_down_is_named_in_time() {
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = unused.local_addr().unwrap();
    let uri = format!("http://{address}/metadata");
    // It accepts and says nothing.
    let start_time = Instant::now();
    let error = open(&uri, &lease(1_000)).await.unwrap_err();
    assert!(matches!(&error, StoreError::Unreachable { store, .. } if store.contains(&address.to_string())), "{error}");
    assert!(start_time.elapsed() < Duration::from_secs(5), "{:?}", start_time.elapsed());
    drop(unused);
    let error = open(&uri, &lease(1_000)).await.unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
    let mut later = lease(1_000);
    later.open_without_server = true;
    let store = open(&uri, &later).await.unwrap();
    assert!(matches!(store.get("key").await, Err(StoreError::Unreachable { .. })));
    let server = start(&address.to_string(), ServerOptions::default()).await;
    take_over(store.as_ref(), "key", b"1", Lifetime::Session).await.unwrap();
    assert!(store.get("key").await.unwrap().unwrap().leased);
    server.stop().await;
}

#[tokio::test]
async fn something_that_is_no_metadata_server_is_refused() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("http://{}/metadata", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 1_024];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 3\r\n\r\nbad").await;
        }
    });
    let error = open(&uri, &lease(1_000)).await.unwrap_err();
    assert!(matches!(&error, StoreError::Refused { reason, .. } if reason.contains("502")), "{error}");
}
