//! What only the etcd store has to stand: leases, frozen and restarted servers, compaction, accounts, TLS.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::Signal;
use tidewire_engine::metadata::{Lifetime, StoreError, StoreOptions, WatchEvent};
use tokio::{io::copy_bidirectional, net::TcpListener, net::TcpStream, sync::watch};

use super::{
    etcd_server::EtcdServer,
    support::{CHILD_KEY, KeyHolder, http, lease, next, open, unique, until, until_put, until_value},
};

#[tokio::test]
async fn the_keys_of_a_killed_process_go_within_its_lease() {
    const TTL: Duration = Duration::from_secs(2);
    let Some(server) = EtcdServer::start(&[]).await else { return };
    let store = open(&server.uri(), &lease(10_000)).await.unwrap();
    let mut watch = store.watch(CHILD_KEY).await.unwrap();
    let mut child = KeyHolder::start(&server.uri(), 2_000).await;
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(entry) if entry.value == b"child" && entry.leased));
    assert!(tokio::time::timeout(2 * TTL, watch.recv()).await.is_err(), "the key of a living process stays");
    let listed = store.list(CHILD_KEY).await.unwrap();
    assert!(listed[0].ttl.is_some_and(|ttl| ttl <= TTL), "{listed:?}");
    child.kill();
    let killed = Instant::now();
    assert_eq!(next(&mut watch).await, WatchEvent::Removed { key: CHILD_KEY.to_owned() });
    let elapsed = killed.elapsed();
    // etcd looks for expired leases twice a second.
    assert!(elapsed < TTL + Duration::from_millis(1_500), "it took {elapsed:?}");
}

#[tokio::test]
async fn a_frozen_server_fails_calls_in_time_and_costs_nothing_once_it_runs() {
    let Some(server) = EtcdServer::start(&[]).await else { return };
    let mut options = lease(3_000);
    options.request_timeout = Duration::from_secs(1);
    let (owner, watcher) = (open(&server.uri(), &options).await.unwrap(), open(&server.uri(), &options).await.unwrap());
    owner.put("w/session", b"1", Lifetime::Session).await.unwrap();
    let mut watch = watcher.watch("w/").await.unwrap();
    server.signal(Signal::STOP);
    let frozen = Instant::now();
    // Longer than the lease and than the pings of the connection.
    while frozen.elapsed() < Duration::from_secs(10) {
        let start = Instant::now();
        let outcome = owner.get("w/session").await;
        assert!(matches!(outcome, Err(StoreError::Unreachable { .. })), "{outcome:?}");
        assert!(start.elapsed() < Duration::from_millis(1_500), "{:?}", start.elapsed());
    }
    server.signal(Signal::CONT);
    until("calls work again", || async { owner.put("w/after", b"1", Lifetime::Session).await.ok() }).await;
    until_value(&watcher, "w/session", Some(b"1")).await;
    loop {
        // The session key may have gone and come back meanwhile, which is told as well.
        match next(&mut watch).await {
            WatchEvent::Put(entry) if entry.key == "w/after" => break,
            WatchEvent::Put(entry) => assert_eq!(entry.key, "w/session"),
            WatchEvent::Removed { key } => assert_eq!(key, "w/session"),
        }
    }
    // The lease is kept from here on.
    tokio::time::timeout(Duration::from_secs(5), std::future::pending::<()>()).await.unwrap_err();
    assert!(watcher.get("w/session").await.unwrap().unwrap().leased);
    assert!(watcher.get("w/after").await.unwrap().unwrap().leased);
}

#[tokio::test]
async fn a_process_that_slept_through_its_lease_puts_its_key_again_unless_it_is_taken() {
    let Some(server) = EtcdServer::start(&[]).await else { return };
    let store = open(&server.uri(), &lease(10_000)).await.unwrap();
    let child = KeyHolder::start(&server.uri(), 2_000).await;
    child.signal("STOP");
    until_value(&store, CHILD_KEY, None).await;
    child.signal("CONT");
    until_value(&store, CHILD_KEY, Some(b"child")).await;
    child.signal("STOP");
    until_value(&store, CHILD_KEY, None).await;
    store.put(CHILD_KEY, b"taken", Lifetime::Permanent).await.unwrap();
    let mut watch = store.watch(CHILD_KEY).await.unwrap();
    child.signal("CONT");
    let told = tokio::time::timeout(Duration::from_secs(3), watch.recv()).await;
    assert!(told.is_err(), "the key is left alone: {told:?}");
}

#[tokio::test]
async fn a_lease_that_is_revoked_is_replaced_by_the_next_put() {
    let Some(server) = EtcdServer::start(&[]).await else { return };
    let store = open(&server.uri(), &lease(60_000)).await.unwrap();
    store.put("a", b"1", Lifetime::Session).await.unwrap();
    let leases = gateway(&server, "/v3/lease/leases", "{}").await;
    let id = leases["leases"][0]["ID"].as_str().unwrap().to_owned();
    gateway(&server, "/v3/kv/lease/revoke", &format!("{{\"ID\":\"{id}\"}}")).await;
    assert_eq!(store.get("a").await.unwrap(), None);
    store.put("b", b"1", Lifetime::Session).await.unwrap();
    assert!(store.get("b").await.unwrap().unwrap().leased);
    until_value(&store, "a", Some(b"1")).await;
    store.close().await.unwrap();
    let other = open(&server.uri(), &lease(60_000)).await.unwrap();
    assert!(other.list("").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_restarted_server_goes_on_where_it_was() {
    let Some(mut server) = EtcdServer::start(&[]).await else { return };
    let (owner, watcher) =
        (open(&server.uri(), &lease(3_000)).await.unwrap(), open(&server.uri(), &lease(3_000)).await.unwrap());
    owner.put("w/session", b"1", Lifetime::Session).await.unwrap();
    owner.put("w/permanent", b"1", Lifetime::Permanent).await.unwrap();
    let mut watch = watcher.watch("w/").await.unwrap();
    server.kill();
    let down = owner.get("w/session").await;
    assert!(matches!(down, Err(StoreError::Unreachable { .. })), "{down:?}");
    server.start_again(true).await;
    until("calls work again", || async { owner.put("w/permanent", b"2", Lifetime::Permanent).await.ok() }).await;
    loop {
        match next(&mut watch).await {
            WatchEvent::Put(entry) if entry.key == "w/permanent" => break assert_eq!(entry.value, b"2"),
            WatchEvent::Put(entry) => assert_eq!(entry.key, "w/session"),
            WatchEvent::Removed { key } => assert_eq!(key, "w/session"),
        }
    }
    until_value(&watcher, "w/session", Some(b"1")).await;
}

#[tokio::test]
async fn a_server_that_lost_its_data_gets_session_keys_back_and_watches_go_on() {
    let Some(mut server) = EtcdServer::start(&[]).await else { return };
    let (owner, watcher) =
        (open(&server.uri(), &lease(3_000)).await.unwrap(), open(&server.uri(), &lease(3_000)).await.unwrap());
    for round in 0..20_u8 {
        owner.put("w/session", &[round], Lifetime::Session).await.unwrap();
    }
    owner.put("w/permanent", b"1", Lifetime::Permanent).await.unwrap();
    let mut watch = watcher.watch("w/").await.unwrap();
    server.kill();
    server.start_again(false).await;
    until_value(&watcher, "w/session", Some(&[19])).await;
    let mut told = vec![next(&mut watch).await];
    while !told.contains(&WatchEvent::Removed { key: "w/permanent".to_owned() }) {
        told.push(next(&mut watch).await);
    }
    watcher.put("w/new", b"1", Lifetime::Permanent).await.unwrap();
    until_put(&mut watch, "w/new").await;
}

/// Forwards to etcd; can be cut and joined.
struct Proxy {
    address: String,
    open: watch::Sender<bool>,
}

impl Proxy {
    async fn start(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let open = watch::Sender::new(true);
        let state = open.subscribe();
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let (target, mut state) = (target.clone(), state.clone());
                tokio::spawn(async move {
                    if *state.borrow() {
                        let mut far = TcpStream::connect(target).await.unwrap();
                        tokio::select! {
                            _ = copy_bidirectional(&mut near, &mut far) => {}
                            _ = state.wait_for(|open| !open) => {}
                        }
                    }
                });
            }
        });
        Proxy { address, open }
    }
}

#[tokio::test]
async fn a_watch_that_is_cut_misses_nothing() {
    let Some(server) = EtcdServer::start(&[]).await else { return };
    let proxy = Proxy::start(server.address()).await;
    let store = open(&format!("etcd://{}", proxy.address), &lease(10_000)).await.unwrap();
    let writer = open(&server.uri(), &lease(10_000)).await.unwrap();
    let mut watch = store.watch("w/").await.unwrap();
    let (mut written, mut told) = (0_u32, 0_u32);
    for _ in 0..3 {
        for open in [true, false] {
            proxy.open.send_replace(open);
            for _ in 0..10 {
                writer.put("w/key", written.to_string().as_bytes(), Lifetime::Permanent).await.unwrap();
                written += 1;
            }
            while open && told < written {
                let WatchEvent::Put(entry) = next(&mut watch).await else { panic!("change {told} is a put") };
                assert_eq!(entry.value, told.to_string().into_bytes());
                told += 1;
            }
        }
    }
    proxy.open.send_replace(true);
    for index in told..written {
        let WatchEvent::Put(entry) = next(&mut watch).await else { panic!("change {index} is a put") };
        assert_eq!(entry.value, index.to_string().into_bytes());
    }
}

#[tokio::test]
async fn a_watch_that_was_compacted_away_is_told_the_difference() {
    let Some(server) = EtcdServer::start(&[]).await else { return };
    let proxy = Proxy::start(server.address()).await;
    let store = open(&format!("etcd://{}", proxy.address), &lease(10_000)).await.unwrap();
    let writer = open(&server.uri(), &lease(10_000)).await.unwrap();
    for key in ["w/stays", "w/goes", "w/changes"] {
        writer.put(key, b"1", Lifetime::Permanent).await.unwrap();
    }
    let mut watch = store.watch("w/").await.unwrap();
    proxy.open.send_replace(false);
    writer.remove("w/goes").await.unwrap();
    for round in 0..10_u8 {
        writer.put("w/changes", &[round], Lifetime::Permanent).await.unwrap();
    }
    let last = writer.put("w/comes", b"1", Lifetime::Permanent).await.unwrap();
    gateway(&server, "/v3/kv/compaction", &format!("{{\"revision\":\"{last}\",\"physical\":true}}")).await;
    proxy.open.send_replace(true);
    assert_eq!(next(&mut watch).await, WatchEvent::Removed { key: "w/goes".to_owned() });
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(entry) if entry.key == "w/changes" && entry.value == [9]));
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(entry) if entry.key == "w/comes"));
    writer.put("w/later", b"1", Lifetime::Permanent).await.unwrap();
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(entry) if entry.key == "w/later"));
}

#[tokio::test]
async fn a_dead_endpoint_is_passed_over() {
    let Some(server) = EtcdServer::start(&[]).await else { return };
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("etcd://{dead},{};{}", silent.local_addr().unwrap(), server.address());
    let store = open(&uri, &lease(10_000)).await.unwrap();
    for index in 0..10_u8 {
        store.put("key", &[index], Lifetime::Session).await.unwrap();
        assert_eq!(store.get("key").await.unwrap().unwrap().value, [index]);
    }
}

#[tokio::test]
async fn an_account_is_used_and_a_wrong_one_refused() {
    let Some(server) = EtcdServer::start(&[]).await else { return };
    gateway(&server, "/v3/auth/user/add", r#"{"name":"root","password":"p@ss"}"#).await;
    gateway(&server, "/v3/auth/role/add", r#"{"name":"root"}"#).await;
    gateway(&server, "/v3/auth/user/grant", r#"{"user":"root","role":"root"}"#).await;
    gateway(&server, "/v3/auth/enable", "{}").await;
    let store = open(&format!("etcd://root:p%40ss@{}", server.address()), &lease(2_000)).await.unwrap();
    let mut watch = store.watch("key").await.unwrap();
    store.put("key", b"1", Lifetime::Session).await.unwrap();
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(entry) if entry.value == b"1"));
    let quiet = tokio::time::timeout(Duration::from_secs(5), watch.recv()).await;
    assert!(quiet.is_err(), "the lease is kept: {quiet:?}");
    let mut settings = StoreOptions::default();
    settings.etcd_user = Some("root".to_owned());
    settings.etcd_password = Some("p@ss".to_owned());
    assert!(open(&server.uri(), &settings).await.unwrap().get("key").await.unwrap().is_some());
    settings.etcd_password = Some("wrong".to_owned());
    for (uri, options) in [(server.uri(), settings), (server.uri(), StoreOptions::default())] {
        let error = match open(&uri, &options).await {
            Ok(store) => store.get("key").await.unwrap_err(),
            Err(error) => error,
        };
        assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
        assert!(!error.to_string().contains("p@ss"), "{error}");
    }
}

#[tokio::test]
async fn tls_with_client_certificates_works_and_is_demanded() {
    let Some(certificates) = Certificates::make() else { return };
    let [ca, cert, key] = ["ca.pem", "leaf.pem", "leaf.key"].map(|name| certificates.path(name));
    let arguments = [
        format!("--cert-file={cert}"),
        format!("--key-file={key}"),
        format!("--trusted-ca-file={ca}"),
        "--client-cert-auth".to_owned(),
    ];
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let Some(server) = EtcdServer::start(&arguments).await else { return };
    let full = format!("{}?ca={ca}&cert={cert}&key={key}&ttl=2", server.uri());
    let store = until("etcd with TLS is ready", || async { open(&full, &StoreOptions::default()).await.ok() }).await;
    let mut watch = store.watch("key").await.unwrap();
    store.put("key", b"1", Lifetime::Session).await.unwrap();
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(entry) if entry.value == b"1"));
    let mut settings = StoreOptions::default();
    settings.connect_timeout = Duration::from_secs(1);
    settings.tls_ca = Some(ca.clone().into());
    for uri in [server.uri(), format!("{}?ca={ca}", server.uri())] {
        let error = open(&uri, &settings).await.unwrap_err();
        assert!(matches!(error, StoreError::Unreachable { .. }), "without a client certificate: {error:?}");
    }
    settings.tls_cert = Some(cert.into());
    settings.tls_key = Some(key.into());
    assert!(open(&server.uri(), &settings).await.unwrap().get("key").await.unwrap().is_some());
    let missing = open(&format!("{}?ca=/nonexistent.pem", server.uri()), &StoreOptions::default()).await.unwrap_err();
    assert!(matches!(&missing, StoreError::Uri { reason, .. } if reason.contains("/nonexistent.pem")), "{missing}");
}

#[tokio::test]
async fn a_cluster_that_is_down_is_named_in_time_or_waited_for() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let start = Instant::now();
    let error = open(&format!("etcd://{address}"), &StoreOptions::default()).await.unwrap_err();
    assert!(matches!(&error, StoreError::Unreachable { store, .. } if store.contains(&address.to_string())), "{error}");
    assert!(start.elapsed() < Duration::from_millis(3_500), "{:?}", start.elapsed());
    drop(silent);
    let error = open(&address.to_string(), &StoreOptions::default()).await.unwrap_err();
    assert!(matches!(&error, StoreError::Unreachable { store, .. } if store.contains(&address.to_string())), "{error}");

    let Some(mut server) = EtcdServer::start(&[]).await else { return };
    server.kill();
    let mut options = lease(2_000);
    options.open_without_server = true;
    let store = open(&server.uri(), &options).await.unwrap();
    let down = store.put("key", b"1", Lifetime::Session).await;
    assert!(matches!(down, Err(StoreError::Unreachable { .. })), "{down:?}");
    server.start_again(true).await;
    until("the store comes up", || async { store.put("key", b"1", Lifetime::Session).await.ok() }).await;
}

/// An authority and a certificate for 127.0.0.1 for both sides.
struct Certificates(PathBuf);

impl Certificates {
    fn make() -> Option<Self> {
        let dir = std::env::temp_dir().join(format!("tidewire-tls-{}", unique()));
        std::fs::create_dir_all(&dir).unwrap();
        let certificates = Certificates(dir);
        let extensions = "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n";
        std::fs::write(certificates.0.join("leaf.ext"), extensions).unwrap();
        let commands = [
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=ca \
             -keyout ca.key -out ca.pem",
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=leaf -keyout leaf.key -out leaf.csr",
            "x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile leaf.ext -out leaf.pem",
        ];
        for command in commands {
            if let Err(reason) = openssl(&certificates.0, command) {
                println!("SKIP openssl: {reason}");
                return None;
            }
        }
        Some(certificates)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn openssl(dir: &Path, arguments: &str) -> Result<(), String> {
    let output = Command::new("openssl")
        .args(arguments.split_whitespace())
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(text) }
}

/// Calls etcd's JSON gateway.
async fn gateway(server: &EtcdServer, path: &str, body: &str) -> serde_json::Value {
    let (status, answer) = http(&server.address(), "POST", path, body).await;
    assert_eq!(status, 200, "{path}: {answer}");
    serde_json::from_str(&answer).unwrap()
}
