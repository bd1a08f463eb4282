//! Peers in other processes that are killed, stopped, and resume late.
//!
//! The child is this test binary again, running only [`child`], with its part in the environment. It ends when its standard
//! input does, so none is left behind.

use std::{
    io::{BufRead, BufReader, Read, Write},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tidewire_engine::{Buffer, Config, SegmentId, TransferEngine, TransferError, TransportKind};

use crate::support::{LIMIT, buffer, read, wait_until, write};

const ROLE: &str = "TIDEWIRE_TEST_ROLE";
const LEN: usize = 64 << 20;
const HEARTBEAT_TIMEOUT: Duration = Duration::from_millis(700);

fn quick(kind: TransportKind) -> TransferEngine {
    let mut config = Config::default();
    config.transports = vec![kind];
    config.tcp_heartbeat_interval = Duration::from_millis(100);
    config.tcp_heartbeat_timeout = HEARTBEAT_TIMEOUT;
    config.tcp_connect_timeout = Duration::from_millis(800);
    config.unregister_drain = Duration::from_millis(200);
    TransferEngine::builder("127.0.0.1").config(config).build().unwrap()
}

/// What a child does; not a test of its own.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    crate::cma::allow();
    let mut part = role.split(' ');
    let (what, kind) = (part.next().unwrap(), TransportKind::from_name(part.next().unwrap()).unwrap());
    let engine = quick(kind);
    let memory = buffer(&engine, LEN);
    memory.fill(b'c').unwrap();
    if what == "serve" {
        say(&format!("{} {}", engine.segment_name(), memory.addr()));
    } else {
        let segment = engine.open_segment(part.next().unwrap()).unwrap();
        let target = part.next().unwrap().parse().unwrap();
        engine.connect(segment).unwrap();
        say("writing");
        // Until the target says no.
        let mut written = Ok(());
        while written.is_ok() {
            written = engine.transfer_sync(&[write(memory.addr(), segment, target, LEN as u64)], LIMIT).map(drop);
        }
        say(&format!("{}", written.unwrap_err()));
    }
    let _ = std::io::stdin().read(&mut [0]);
}

fn say(line: &str) {
    // Past the harness, which captures `println!`.
    let mut out = std::io::stdout().lock();
    writeln!(out, "\nTW {line}").unwrap();
    out.flush().unwrap();
}

/// A child that is killed when the test ends, however it ends.
struct Peer {
    process: Child,
    output: BufReader<ChildStdout>,
}

impl Peer {
    fn start(role: &str) -> Peer {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "processes::child", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        Peer { process, output }
    }

    fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the child ended");
            if let Some(said) = line.trim_end().strip_prefix("TW ") {
                return said.to_owned();
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    fn stop(&self) {
        self.signal(Signal::STOP);
        let stat = format!("/proc/{}/stat", self.process.id());
        let stopped = || std::fs::read_to_string(&stat).unwrap().rsplit(')').next().unwrap().starts_with(" T");
        wait_until("the child stops", stopped);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An initiator connected to a child that serves memory.
struct Pair {
    engine: TransferEngine,
    here: Buffer,
    peer: Peer,
    name: String,
    segment: SegmentId,
    there: u64,
}

fn serving(kind: TransportKind) -> Option<Pair> {
    if kind == TransportKind::Cma && crate::cma::skip("processes") {
        return None;
    }
    let mut peer = Peer::start(&format!("serve {kind}"));
    let said = peer.hear();
    let (name, there) = said.split_once(' ').unwrap();
    let (name, there) = (name.to_owned(), there.parse().unwrap());
    let engine = quick(kind);
    let here = buffer(&engine, LEN);
    let segment = engine.open_segment(&name).unwrap();
    assert_eq!(engine.connect(segment), Ok(kind));
    Some(Pair { engine, here, peer, name, segment, there })
}

impl Pair {
    /// Reads in a loop until that fails; the error.
    fn read_until_error(&self) -> TransferError {
        let deadline = Instant::now() + LIMIT;
        loop {
            let batch = [read(self.here.addr(), self.segment, self.there, LEN as u64)];
            match self.engine.transfer_sync(&batch, LIMIT) {
                Ok(_) => assert!(Instant::now() < deadline, "the peer is still there"),
                Err(error) => return error,
            }
        }
    }

    /// Fills the local memory, lets the peer resume, and checks that not a byte changes.
    fn assert_untouched_by_a_late_peer(&self) {
        self.here.fill(b'm').unwrap();
        self.peer.signal(Signal::CONT);
        wait_until("the peer resumes", || self.engine.probe(&self.name).is_ok());
        let mut seen = vec![0; LEN];
        self.here.read_at(0, &mut seen).unwrap();
        assert_eq!(seen.iter().position(|byte| *byte != b'm'), None);
    }
}

#[test]
fn a_killed_peer_fails_the_batch_soon_and_by_name() {
    for kind in [TransportKind::Tcp, TransportKind::Shm, TransportKind::Cma] {
        let Some(pair) = serving(kind) else { continue };
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| sender.send((pair.read_until_error(), Instant::now())).unwrap());
            wait_until("reads are on their way", || pair.engine.status().counters.requests > 1);
            let killed = Instant::now();
            pair.peer.signal(Signal::KILL);
            let (error, ended) = receiver.recv().unwrap();
            assert!(ended - killed < Duration::from_secs(3), "{kind}: {:?}", ended - killed);
            assert!(error.to_string().contains(&pair.name), "{kind}: {error}");
            let class = error.class();
            assert_eq!(class, tidewire_engine::ErrorClass::PeerDown, "{kind}: {error}");
        });
        // And the next one says so as well, without a hang.
        let again = pair.engine.transfer_sync(&[read(pair.here.addr(), pair.segment, pair.there, 64)], LIMIT);
        assert!(again.is_err(), "{kind}");
    }
}

#[test]
fn a_stopped_peer_fails_the_batch_within_the_heartbeat_and_touches_nothing_later() {
    let pair = serving(TransportKind::Tcp).unwrap();
    let batch = pair.engine.allocate_batch(1).unwrap();
    batch.submit(&[read(pair.here.addr(), pair.segment, pair.there, LEN as u64)]).unwrap();
    pair.peer.stop();
    let stopped = Instant::now();
    let error = match batch.wait(LIMIT).unwrap().into_result() {
        // The whole batch was faster than the signal; the next one cannot be.
        Ok(_) => pair.read_until_error(),
        Err(error) => error,
    };
    assert!(stopped.elapsed() < HEARTBEAT_TIMEOUT + Duration::from_secs(2), "{:?}", stopped.elapsed());
    assert!(matches!(error, TransferError::PeerSilent { .. }), "{error}");
    assert!(error.to_string().contains(&pair.name), "{error}");
    pair.assert_untouched_by_a_late_peer();
}

#[test]
fn a_timed_out_batch_of_a_stopped_peer_touches_nothing_later() {
    let pair = serving(TransportKind::Tcp).unwrap();
    pair.peer.stop();
    let batch = pair.engine.allocate_batch(4).unwrap();
    let part = LEN as u64 / 4;
    let requests: Vec<_> =
        (0..4).map(|i| read(pair.here.addr() + i * part, pair.segment, pair.there + i * part, part)).collect();
    batch.submit(&requests).unwrap();
    let started = Instant::now();
    let error = batch.wait(Duration::from_millis(150)).unwrap_err();
    assert!(matches!(error, TransferError::TimedOut { timeout_ms: 150, .. }), "{error}");
    assert!(started.elapsed() < Duration::from_millis(650), "{:?}", started.elapsed());
    pair.assert_untouched_by_a_late_peer();
    // The link is good for the next batch.
    pair.engine.transfer_sync(&requests, LIMIT).unwrap();
    let mut seen = vec![0; LEN];
    pair.here.read_at(0, &mut seen).unwrap();
    assert!(seen.iter().all(|byte| *byte == b'c'));
}

#[test]
fn a_stopped_initiator_writes_nothing_after_unregister() {
    for kind in [TransportKind::Tcp, TransportKind::Shm] {
        let engine = quick(kind);
        let memory = buffer(&engine, LEN);
        let mut peer = Peer::start(&format!("write {kind} {} {}", engine.segment_name(), memory.addr()));
        assert_eq!(peer.hear(), "writing");
        wait_until("bytes arrive", || {
            let mut last = [0];
            memory.read_at(LEN - 1, &mut last).unwrap();
            last[0] == b'c'
        });
        peer.stop();
        engine.unregister_memory(memory.addr()).unwrap();
        memory.fill(b'm').unwrap();
        peer.signal(Signal::CONT);
        let refused = peer.hear();
        assert!(refused.contains(engine.segment_name()), "{kind}: {refused}");
        let mut seen = vec![0; LEN];
        memory.read_at(0, &mut seen).unwrap();
        assert_eq!(seen.iter().position(|byte| *byte != b'm'), None, "{kind}");
    }
}

#[test]
fn a_running_initiator_writes_nothing_after_shutdown() {
    for kind in [TransportKind::Tcp, TransportKind::Shm, TransportKind::Cma] {
        if kind == TransportKind::Cma && crate::cma::skip("processes") {
            continue;
        }
        let engine = quick(kind);
        let memory = buffer(&engine, LEN);
        let mut peer = Peer::start(&format!("write {kind} {} {}", engine.segment_name(), memory.addr()));
        assert_eq!(peer.hear(), "writing");
        engine.shutdown(Duration::from_millis(300));
        memory.fill(b'm').unwrap();
        let refused = peer.hear();
        assert!(refused.contains(engine.segment_name()), "{kind}: {refused}");
        let mut seen = vec![0; LEN];
        memory.read_at(0, &mut seen).unwrap();
        assert_eq!(seen.iter().position(|byte| *byte != b'm'), None, "{kind}");
    }
}
