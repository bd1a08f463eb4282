//! Metadata servers for one test: the official HTTP server and etcd, on free ports, ended with the test.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A running server.
pub struct Store {
    child: Child,
    folder: Option<PathBuf>,
    /// Connection string.
    pub uri: String,
}

impl Store {
    /// The HTTP server of the official release; `None` if that is not here.
    pub fn official_http() -> Option<Self> {
        let venv = crate::official::venv()?;
        let port = free_port();
        let mut command = Command::new(PathBuf::from(venv).join("bin/mooncake_http_metadata_server"));
        command.args(["--host", "127.0.0.1", "--port", &port.to_string(), "--log-level", "ERROR"]);
        Some(Self::start(command, None, port, "/metadata?key=none", format!("http://127.0.0.1:{port}/metadata")))
    }

    /// etcd; `None`, after saying so, if this host has none.
    #[cfg(feature = "etcd")]
    pub fn etcd() -> Option<Self> {
        if crate::etcd::skip() {
            return None;
        }
        let (port, peer_port) = (free_port(), free_port());
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("interop-etcd-{port}"));
        let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer_port}"));
        let mut command = Command::new("etcd");
        command.args(["--name", "t", "--unsafe-no-fsync", "--initial-cluster", &format!("t={peer}"), "--data-dir"]);
        command.arg(&folder);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        Some(Self::start(command, Some(folder), port, "/health", format!("etcd://127.0.0.1:{port}")))
    }

    fn start(mut command: Command, folder: Option<PathBuf>, port: u16, path: &str, uri: String) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let store = Store { child, folder, uri };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !answers(port, path) {
            assert!(Instant::now() < deadline, "{} does not answer", store.uri);
            std::thread::yield_now();
        }
        store
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(folder) = &self.folder {
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}

/// Whether a request is answered at all; health reports of etcd must be good ones.
fn answers(port: u16, path: &str) -> bool {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return false };
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let mut answer = String::new();
    let done = stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_string(&mut answer));
    done.is_ok() && answer.starts_with("HTTP/1.1 ") && (path != "/health" || answer.contains("true"))
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
