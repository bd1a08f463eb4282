//! A real etcd for one test: free ports, a temporary directory, ended with the test.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::common::{http, unique, until};

/// A running etcd.
pub struct EtcdServer {
    child: Child,
    port: u16,
    peer_port: u16,
    dir: PathBuf,
    arguments: Vec<String>,
    tls: bool,
}

impl EtcdServer {
    /// Starts it; `None` (and says so) if this host has no etcd. With certificates among the arguments it speaks TLS.
    pub async fn start(arguments: &[&str]) -> Option<Self> {
        if crate::etcd::skip() {
            return None;
        }
        let dir = std::env::temp_dir().join(format!("tidewire-etcd-{}", unique()));
        let arguments: Vec<_> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let tls = arguments.iter().any(|argument| argument.starts_with("--cert-file"));
        let (port, peer_port) = (free_port(), free_port());
        let child = spawn(&dir, port, peer_port, &arguments, tls);
        let server = EtcdServer { child, port, peer_port, dir, arguments, tls };
        server.ready().await;
        Some(server)
    }

    /// `host:port`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Connection string.
    pub fn uri(&self) -> String {
        format!("etcd://{}", self.address())
    }

    /// SIGSTOP or SIGCONT.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        if signal == Signal::STOP {
            crate::stopped::wait_stopped(self.child.id());
        }
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again on the same port, after [`kill`](Self::kill); with or without its data.
    pub async fn start_again(&mut self, keep_data: bool) {
        if !keep_data {
            std::fs::remove_dir_all(&self.dir).unwrap();
        }
        self.child = spawn(&self.dir, self.port, self.peer_port, &self.arguments, self.tls);
        self.ready().await;
    }

    async fn ready(&self) {
        if self.tls {
            // The store's own connect is the proof.
            return;
        }
        until("etcd is ready", || async {
            tokio::net::TcpStream::connect(self.address()).await.ok()?;
            let (status, answer) = http(&self.address(), "GET", "/health", "").await;
            (status == 200 && answer.contains("true")).then_some(())
        })
        .await;
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn spawn(dir: &Path, port: u16, peer_port: u16, arguments: &[String], tls: bool) -> Child {
    let scheme = if tls { "https" } else { "http" };
    let client = format!("{scheme}://127.0.0.1:{port}");
    let peer = format!("http://127.0.0.1:{peer_port}");
    Command::new("etcd")
        .args(["--name", "t", "--data-dir"])
        .arg(dir)
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("t={peer}"), "--unsafe-no-fsync"])
        .args(arguments)
        .env_remove("ETCD_UNSUPPORTED_ARCH")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
