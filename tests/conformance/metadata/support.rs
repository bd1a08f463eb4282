//! What the metadata tests share: deadlines, names, a raw HTTP client, a child process.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use tidewire_engine::metadata::{self, Lifetime, MetadataStore, StoreError, StoreOptions, WatchEvent, uri};
use tokio::sync::mpsc::Receiver;

pub(super) use crate::common::{PATIENCE, http, raw_http, unique, until};

/// Set in the child process of a test.
const CHILD_URI: &str = "TIDEWIRE_CONFORMANCE_CHILD_URI";
const CHILD_TTL_MS: &str = "TIDEWIRE_CONFORMANCE_CHILD_TTL_MS";
/// Key that the child holds.
pub(super) const CHILD_KEY: &str = "mooncake/ram/child";

/// Opens a store by its connection string.
pub(super) async fn open(text: &str, options: &StoreOptions) -> Result<Arc<dyn MetadataStore>, StoreError> {
    metadata::open(&uri::parse(text)?, options).await
}

/// Options with a lease of that many milliseconds.
pub(super) fn lease(ttl_ms: u64) -> StoreOptions {
    let mut options = StoreOptions::default();
    options.lease_ttl = Duration::from_millis(ttl_ms);
    options
}

/// Next event of a watch.
pub(super) async fn next(watch: &mut Receiver<WatchEvent>) -> WatchEvent {
    tokio::time::timeout(PATIENCE, watch.recv()).await.expect("an event in time").expect("the watch goes on")
}

/// Waits until a watch tells a put of `key`.
pub(super) async fn until_put(watch: &mut Receiver<WatchEvent>, key: &str) {
    while !matches!(next(watch).await, WatchEvent::Put(entry) if entry.key == key) {}
}

/// Waits until a key has a value, or is gone for `None`.
pub(super) async fn until_value(store: &Arc<dyn MetadataStore>, key: &str, value: Option<&[u8]>) {
    let what = format!("{key} = {value:?}");
    until(&what, || async {
        let found = store.get(key).await.ok()?;
        (found.as_ref().map(|entry| entry.value.as_slice()) == value).then_some(())
    })
    .await;
}

/// A process that holds [`CHILD_KEY`]; killed at the end.
pub(super) struct KeyHolder(Child);

impl KeyHolder {
    /// Starts it and waits until the key is put.
    pub(super) async fn start(uri: &str, ttl_ms: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "metadata::support::child_holds_a_key", "--nocapture"])
            .env(CHILD_URI, uri)
            .env(CHILD_TTL_MS, ttl_ms.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        // Not on this thread, where the server of the test may run.
        let ready = move || output.lines().map_while(Result::ok).any(|line| line.contains("child is ready"));
        assert!(tokio::task::spawn_blocking(ready).await.unwrap(), "the child put its key");
        KeyHolder(child)
    }

    /// Kills it with SIGKILL.
    pub(super) fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// SIGSTOP or SIGCONT.
    pub(super) fn signal(&self, name: &str) {
        send_signal(self.0.id(), name);
    }
}

impl Drop for KeyHolder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a signal by name.
pub(super) fn send_signal(pid: u32, name: &str) {
    let status = Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status().unwrap();
    assert!(status.success(), "kill -{name} {pid}");
}

#[tokio::test]
#[ignore = "runs as the child process of other tests"]
async fn child_holds_a_key() {
    let Ok(uri) = std::env::var(CHILD_URI) else { return };
    let ttl_ms = std::env::var(CHILD_TTL_MS).unwrap().parse().unwrap();
    let store = open(&uri, &lease(ttl_ms)).await.unwrap();
    store.put(CHILD_KEY, b"child", Lifetime::Session).await.unwrap();
    println!("child is ready");
    // Ends with its parent, whose end closes the pipe.
    let end = tokio::task::spawn_blocking(|| std::io::stdin().lines().for_each(drop));
    end.await.unwrap();
}
