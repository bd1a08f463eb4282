//! The HTTP store against Mooncake's own server, and our server with Mooncake's own engine.
//!
//! Both need the environment variable `TIDEWIRE_TEST_MOONCAKE_VENV`: a Python environment with the official release.

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use tidewire_engine::metadata::{
    Expect, Lifetime, StoreError, StoreOptions,
    server::{MetadataServer, ServerOptions},
    take_over,
};

use super::support::{open, until};

/// Ends a process with its test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program of the official release, or the reason to skip.
fn program(name: &str) -> Option<PathBuf> {
    let Some(venv) = std::env::var_os("TIDEWIRE_TEST_MOONCAKE_VENV") else {
        println!("SKIP TIDEWIRE_TEST_MOONCAKE_VENV is not set");
        return None;
    };
    let path = PathBuf::from(venv).join("bin").join(name);
    if path.exists() {
        return Some(path);
    }
    println!("SKIP {} does not exist", path.display());
    None
}

#[tokio::test]
async fn the_store_works_with_the_official_server() {
    let Some(program) = program("mooncake_http_metadata_server") else { return };
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let child = Command::new(program)
        .args(["--host", "127.0.0.1", "--port", &port.to_string()])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _server = Ended(child);
    let uri = format!("http://127.0.0.1:{port}/metadata");
    let connect = || async { open(&uri, &StoreOptions::default()).await.ok() };
    let store = until("the official server starts", connect).await;
    let capabilities = store.capabilities();
    assert!(!capabilities.leases && !capabilities.watch && !capabilities.compare_and_put && !capabilities.list);

    assert_eq!(store.get("mooncake/ram/n").await.unwrap(), None);
    assert!(!store.remove("mooncake/ram/n").await.unwrap());
    for value in [&b"{\"x\":1}\n"[..], b"{\"x\":2}"] {
        store.put("mooncake/ram/n", value, Lifetime::Permanent).await.unwrap();
        assert_eq!(store.get("mooncake/ram/n").await.unwrap().unwrap().value, value);
    }
    let rpc_meta = "mooncake/rpc_meta/[::1]:1";
    store.put(rpc_meta, b"old", Lifetime::Session).await.unwrap();
    let kept = store.put(rpc_meta, b"new", Lifetime::Session).await;
    assert!(matches!(kept, Err(StoreError::Exists { .. })), "{kept:?}");
    take_over(store.as_ref(), rpc_meta, b"new", Lifetime::Session).await.unwrap();
    assert_eq!(store.get(rpc_meta).await.unwrap().unwrap().value, b"new");
    let unsupported = [
        store.list("").await.map(drop),
        store.watch("").await.map(drop),
        store.compare_and_put("k", Expect::Absent, b"", Lifetime::Session).await.map(drop),
    ];
    assert!(unsupported.iter().all(|call| matches!(call, Err(StoreError::Unsupported { .. }))), "{unsupported:?}");

    store.close().await.unwrap();
    let other = connect().await.unwrap();
    assert_eq!(other.get(rpc_meta).await.unwrap(), None, "session keys go on close");
    assert!(other.get("mooncake/ram/n").await.unwrap().is_some());
}

#[tokio::test]
async fn the_official_engine_works_with_our_server() {
    const SCRIPT: &str = "
import os, sys
from mooncake.engine import TransferEngine
engine = TransferEngine()
code = engine.initialize('official:1', sys.argv[1], 'tcp', '')
address = engine.allocate_managed_buffer(4096) if code == 0 else 0
print('official is ready', code, address != 0, flush=True)
sys.stdin.read()
del engine
os._exit(0)
";
    let Some(python) = program("python") else { return };
    let server = MetadataServer::start("127.0.0.1:0".parse().unwrap(), ServerOptions::default()).await.unwrap();
    let mut child = Command::new(python)
        .args(["-c", SCRIPT, &server.uri()])
        .env("MC_FORCE_TCP", "1")
        .env("MC_TCP_BIND_ADDRESS", "127.0.0.1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let mut child = Ended(child);
    let find = move || output.lines().map_while(Result::ok).find(|line| line.contains("official is ready"));
    let ready = tokio::task::spawn_blocking(find).await.unwrap();
    assert_eq!(ready.as_deref(), Some("official is ready 0 True"));
    let store = open(&server.uri(), &StoreOptions::default()).await.unwrap();
    let keys: Vec<_> = store.list("mooncake/").await.unwrap().into_iter().map(|entry| entry.key).collect();
    assert_eq!(keys, ["mooncake/ram/official:1", "mooncake/rpc_meta/official:1"]);
    let segment = store.get("mooncake/ram/official:1").await.unwrap().unwrap();
    let segment: serde_json::Value = serde_json::from_slice(&segment.value).unwrap();
    assert_eq!(segment["buffers"].as_array().map(Vec::len), Some(1), "{segment}");
    drop(child.0.stdin.take());
    until("the official engine takes its keys away", || async {
        store.list("mooncake/").await.unwrap().is_empty().then_some(())
    })
    .await;
    server.stop().await;
}
