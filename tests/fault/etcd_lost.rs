//! An etcd that freezes, and one that is killed: transfers go on over the same link, and what waited is published after.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::process::Signal;
use tidewire_engine::{
    Config, TransferEngine,
    core::{Location, Opcode, SegmentId, TransferError, TransportKind},
};

use super::target::request;

#[path = "../support/etcd_server.rs"]
mod etcd_server;

use etcd_server::EtcdServer;

const LEN: usize = 1 << 16;
const FREEZE: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(30);

fn start(name: &str, uri: &str) -> TransferEngine {
    let builder = TransferEngine::builder(name).config(Config::default()).metadata(uri);
    builder.transports(&[TransportKind::Tcp]).build().unwrap()
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn sees(near: &TransferEngine, far: &TransferEngine, addr: u64) -> bool {
    let Ok(segment) = near.open_segment_no_cache(far.segment_name()) else { return false };
    near.segment_info(segment).is_ok_and(|info| info.buffers.iter().any(|buffer| buffer.addr == addr))
}

/// The loop that transfers all the time, and what it has seen.
#[derive(Default)]
struct Load {
    stop: AtomicBool,
    batches: AtomicU64,
    failed: Mutex<Option<String>>,
}

impl Load {
    fn run(&self, near: &TransferEngine, segment: SegmentId, here: u64, there: u64) {
        while !self.stop.load(Ordering::Relaxed) {
            for opcode in [Opcode::Write, Opcode::Read] {
                let request = request(opcode, here, segment, there, LEN as u64);
                if let Err(error) = near.transfer_sync(&[request], Duration::from_secs(5)) {
                    *self.failed.lock().unwrap() = Some(error.to_string());
                    return;
                }
            }
            self.batches.fetch_add(2, Ordering::Relaxed);
        }
    }

    /// Transfers went on since `before`, and none failed.
    fn goes_on(&self, during: &str, before: u64) {
        assert_eq!(*self.failed.lock().unwrap(), None, "{during}");
        until(during, || self.batches.load(Ordering::Relaxed) > before + 10);
    }

    fn count(&self) -> u64 {
        self.batches.load(Ordering::Relaxed)
    }
}

/// Ends the load also when an assertion fails.
struct StopAtEnd<'a>(&'a Load);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

#[test]
fn an_etcd_that_freezes_or_dies_costs_no_transfer() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let Some(mut etcd) = runtime.block_on(EtcdServer::start(&[])) else { return };
    let uri = etcd.uri();
    let (near, far) = (start("127.0.0.1:near", &uri), start("127.0.0.1:far", &uri));
    let (here, there) = (near.allocate(LEN, Location::Any).unwrap(), far.allocate(LEN, Location::Any).unwrap());
    until("the buffer is published", || sees(&near, &far, there.addr()));
    let segment = near.open_segment(far.segment_name()).unwrap();
    let load = Load::default();
    std::thread::scope(|scope| {
        scope.spawn(|| load.run(&near, segment, here.addr(), there.addr()));
        let _stop = StopAtEnd(&load);
        load.goes_on("before any fault", 0);

        let before = load.count();
        etcd.signal(Signal::STOP);
        std::thread::sleep(FREEZE);
        load.goes_on("while etcd is frozen", before);
        let at_the_end = load.count();
        load.goes_on("at the end of the freeze", at_the_end);
        etcd.signal(Signal::CONT);
        let second = far.allocate(LEN, Location::Any).unwrap();
        until("a buffer is published after the freeze", || sees(&near, &far, second.addr()));
        let third = start("127.0.0.1:third", &uri);
        until("a new engine is found", || near.open_segment_no_cache(third.segment_name()).is_ok());

        let before = load.count();
        etcd.kill();
        load.goes_on("while etcd is down", before);
        let refused = far.allocate(LEN, Location::Any).unwrap_err();
        assert!(matches!(refused, TransferError::Metadata { .. }), "{refused:?}");
        runtime.block_on(etcd.start_again(true));
        let late = Mutex::new(None);
        until("a buffer can be registered again", || {
            *late.lock().unwrap() = far.allocate(LEN, Location::Any).ok();
            late.lock().unwrap().is_some()
        });
        let late = late.into_inner().unwrap().unwrap();
        until("a buffer is published after the restart", || sees(&near, &far, late.addr()));
        load.goes_on("after etcd came back", load.count());
    });
    assert_eq!(*load.failed.lock().unwrap(), None);
    let status = near.status();
    let peer = status.peers.iter().find(|peer| peer.segment == far.segment_name()).unwrap();
    assert!(peer.link.ends_with("0 redials"), "{}", peer.link);
    assert_eq!((peer.errors, status.counters.links, status.counters.link_errors), (0, 1, 0), "{peer:?}");
    println!("{} batches; link: {}", load.count(), peer.link);
}
