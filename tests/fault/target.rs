//! A second process with an engine and one buffer: this test binary, started again.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tidewire_engine::{
    Config, TransferEngine,
    core::{Location, Opcode, SegmentId, TransferRequest, TransportKind},
};

use super::stopped::wait_stopped;

const ROLE: &str = "TIDEWIRE_FAULT_TARGET";

/// A target process. Dropping it kills it.
pub struct Target {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    pub name: String,
    pub addr: u64,
}

impl Target {
    /// Starts a process whose engine has one registered buffer of `len` bytes, all `0x11`.
    pub fn start(len: u64, transports: &str) -> Self {
        Self::start_in(None, len, transports, "127.0.0.1", &[])
    }

    /// The same, wrapped by `prefix` (a namespace) and named `host`.
    pub fn start_in(prefix: Option<&[&str]>, len: u64, transports: &str, host: &str, env: &[(&str, &str)]) -> Self {
        let own = std::env::current_exe().unwrap();
        let mut command = match prefix {
            Some([first, rest @ ..]) => {
                let mut command = Command::new(first);
                command.args(rest).arg(own);
                command
            }
            _ => Command::new(own),
        };
        command
            .args(["--exact", "target::act_as_target", "--nocapture"])
            .env(ROLE, format!("{len} {transports} {host}"))
            .envs(env.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut target = Target { child, stdin, stdout, name: String::new(), addr: 0 };
        let line = target.read("ready");
        let mut words = line.split_whitespace();
        target.name = words.next().unwrap().to_owned();
        target.addr = words.next().unwrap().parse().unwrap();
        target
    }

    fn read(&mut self, tag: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.stdout.read_line(&mut line).unwrap() > 0, "the target process ended");
            // libtest prints on the same stream, in front of the first line too.
            if let Some((_, rest)) = line.split_once(&format!("@{tag} ")) {
                return rest.trim().to_owned();
            }
        }
    }

    /// How many bytes of the buffer are not `byte`.
    pub fn count_other(&mut self, byte: u8) -> u64 {
        writeln!(self.stdin, "count {byte}").unwrap();
        self.read("count").parse().unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Stops the process and returns once it is stopped.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
        wait_stopped(self.pid());
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Settings of an engine in these tests: short heartbeats, one kind of transport.
pub fn config(transports: &str) -> Config {
    let mut config = Config::from_env();
    config.transports = transports.split(',').map(kind).collect();
    config.tcp_heartbeat_interval = Duration::from_millis(200);
    config.tcp_heartbeat_timeout = Duration::from_millis(1000);
    config.tcp_connect_timeout = Duration::from_secs(3);
    config.mooncake_port = transports.contains("mooncake");
    config
}

fn kind(name: &str) -> TransportKind {
    use TransportKind as K;
    let kinds = [K::Local, K::Shm, K::Cma, K::Tcp, K::MooncakeTcp];
    kinds.into_iter().find(|kind| kind.name() == name).unwrap()
}

pub fn engine(transports: &str) -> TransferEngine {
    TransferEngine::builder("127.0.0.1").config(config(transports)).build().unwrap()
}

pub fn request(opcode: Opcode, source: u64, target: SegmentId, target_offset: u64, length: u64) -> TransferRequest {
    TransferRequest { opcode, source, target, target_offset, length }
}

/// Not a test of its own: what the target process runs.
#[test]
fn act_as_target() {
    let Ok(role) = std::env::var(ROLE) else { return };
    crate::cma::allow();
    let mut words = role.split_whitespace();
    let len: usize = words.next().unwrap().parse().unwrap();
    let transports = words.next().unwrap();
    let host = words.next().unwrap();
    let engine = TransferEngine::builder(host).config(config(transports)).build().unwrap();
    let buffer = engine.allocate(len, Location::Any).unwrap();
    buffer.fill(0x11).unwrap();
    println!("\n@ready {} {}", engine.segment_name(), buffer.addr());
    let mut bytes = vec![0; len];
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("count"), Some(byte)) => {
                let byte: u8 = byte.parse().unwrap();
                buffer.read_at(0, &mut bytes).unwrap();
                println!("\n@count {}", bytes.iter().filter(|b| **b != byte).count());
            }
            other => panic!("{other:?}"),
        }
    }
    engine.shutdown(Duration::from_secs(1));
    std::process::exit(0);
}
