//! Rules that need a second process, which is killed or stopped.
//!
//! The child is this test binary again, running only [`child_entry`], with its part in the environment. It talks over its
//! standard input and output, one line per message; it ends when its input does.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tidewire_core::{ErrorClass, TaskState, TransferError, mooncake::descriptor::SegmentDescriptor};
use tidewire_engine::memory::alloc::SharedAllocation;

use super::fixture::{Cma, Fixture, Mooncake, Op, Shm, ShmMixed, Tcp, bytes_of, pattern, patterned, wait_for};

const FIXTURE: &str = "TIDEWIRE_CONFORMANCE_FIXTURE";
const ROLE: &str = "TIDEWIRE_CONFORMANCE_ROLE";
/// Length of the region that children offer and write to.
pub const LEN: usize = 32 << 20;

/// What a child does; not a test of its own.
#[test]
fn child_entry() {
    let (Ok(fixture), Ok(role)) = (std::env::var(FIXTURE), std::env::var(ROLE)) else { return };
    crate::cma::allow();
    match fixture.as_str() {
        Shm::NAME => play::<Shm>(&role),
        ShmMixed::NAME => play::<ShmMixed>(&role),
        Cma::NAME => play::<Cma>(&role),
        Tcp::NAME => play::<Tcp>(&role),
        Mooncake::NAME => play::<Mooncake>(&role),
        other => panic!("no fixture {other}"),
    }
}

fn play<F: Fixture>(role: &str) {
    let mut input = BufReader::new(std::io::stdin()).lines();
    if role == "target" {
        let node = F::node("child");
        let memory = patterned(LEN, 1);
        node.register(&memory, F::is_shared(0));
        say(&serde_json::to_string(&node.descriptor()).unwrap());
        // Later regions come on demand.
        let mut more = Vec::new();
        while let Some(Ok(_)) = input.next() {
            let memory = patterned(LEN, 2);
            node.register(&memory, F::is_shared(0));
            say(&memory.addr().to_string());
            more.push(memory);
        }
        return;
    }
    let node = F::node("child");
    let descriptor: SegmentDescriptor = serde_json::from_str(&input.next().unwrap().unwrap()).unwrap();
    let target = descriptor.buffers[0].addr;
    let local = patterned(LEN, 3);
    node.register(&local, false);
    let link = node.try_connect(descriptor).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, mut batches) = (Arc::clone(&stop), 0u64);
    let reader = std::thread::spawn(move || {
        let _ = input.next();
        stopped.store(true, Ordering::Release);
    });
    let mut last = None;
    while !stop.load(Ordering::Acquire) {
        let (_, status) = node.run(&*link, &[Op::write(local.addr(), target, LEN as u64)]);
        batches += 1;
        if batches == 1 {
            say("ready");
        }
        if status.error.is_some() {
            last = status.error;
            break;
        }
    }
    say(&format!("ended after {batches}: {}", last.map_or_else(|| "no error".to_owned(), |e| format!("{e:?}"))));
    let _ = reader.join();
}

fn say(line: &str) {
    // Past the harness, which captures `println!`.
    let mut out = std::io::stdout().lock();
    writeln!(out, "\nTW {line}").unwrap();
    out.flush().unwrap();
}

/// A child that is killed when the test ends, however it ends.
pub struct Peer {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Peer {
    pub fn start<F: Fixture>(role: &str) -> Peer {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "transport::processes::child_entry", "--nocapture", "--test-threads=1"])
            .env(FIXTURE, F::NAME)
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Peer { child, input, output }
    }

    pub fn tell(&mut self, line: &str) {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
    }

    pub fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "child ended");
            if let Some(said) = line.trim_end().strip_prefix("TW ") {
                return said.to_owned();
            }
        }
    }

    pub fn descriptor(&mut self) -> SegmentDescriptor {
        serde_json::from_str(&self.hear()).unwrap()
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        // Not reaped yet, so the id is the child's own.
        let pid = Pid::from_raw(self.child.id() as i32).unwrap();
        kill_process(pid, signal).unwrap();
    }

    pub fn stop(&self) {
        self.signal(Signal::STOP);
        let stat = format!("/proc/{}/stat", self.child.id());
        wait_for("the child to stop", || {
            std::fs::read_to_string(&stat).is_ok_and(|s| s.rsplit(')').next().is_some_and(|s| s.starts_with(" T")))
        });
        // Every thread, not only the one that the line above is about.
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        for task in tasks.filter_map(Result::ok) {
            wait_for("a thread of the child to stop", || {
                let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.is_empty() || stat.rsplit(')').next().is_some_and(|s| s.starts_with(" T"))
            });
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes arrive in the memory of another process, and come back.
pub fn other_process_is_reached<F: Fixture>() {
    let mut peer = Peer::start::<F>("target");
    let node = F::node("parent");
    let local = patterned(LEN, 7);
    node.register(&local, false);
    let descriptor = peer.descriptor();
    let target = descriptor.buffers[0].addr;
    let link = node.try_connect(descriptor).unwrap();
    let (_, status) = node.run(&*link, &[Op::read(local.addr(), target, LEN as u64)]);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    assert!(bytes_of(&local, 0, LEN) == pattern(LEN, 1));
    local.copy_in(0, &pattern(LEN, 8)).unwrap();
    let (_, status) = node.run(&*link, &[Op::write(local.addr(), target, LEN as u64)]);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    local.fill(0, LEN, 0).unwrap();
    let (_, status) = node.run(&*link, &[Op::read(local.addr(), target, LEN as u64)]);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    assert!(bytes_of(&local, 0, LEN) == pattern(LEN, 8));
    // A region that was registered after the link was made.
    peer.tell("more");
    let later: u64 = peer.hear().parse().unwrap();
    let (_, status) = node.run(&*link, &[Op::read(local.addr(), later, LEN as u64)]);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    assert!(bytes_of(&local, 0, LEN) == pattern(LEN, 2));
}

/// Killing the target ends its slices within 3 s, with an error that names it; the link knows.
pub fn killed_target_fails_slices_soon<F: Fixture>() {
    let mut peer = Peer::start::<F>("target");
    let node = F::node("parent");
    let local = patterned(LEN, 7);
    node.register(&local, false);
    let descriptor = peer.descriptor();
    let target = descriptor.buffers[0].addr;
    let link = node.try_connect(descriptor).unwrap();
    let (_, status) = node.run(&*link, &[Op::write(local.addr(), target, LEN as u64)]);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    peer.signal(Signal::KILL);
    let killed = Instant::now();
    let error = loop {
        let (_, status) = node.run(&*link, &[Op::write(local.addr(), target, LEN as u64)]);
        assert_eq!(status.open_tasks, 0);
        if let Some(error) = status.error {
            break error;
        }
        assert!(killed.elapsed() < Duration::from_secs(3), "writes to a dead process succeed");
    };
    assert!(killed.elapsed() < Duration::from_secs(3), "{error} after {:?}", killed.elapsed());
    assert_eq!(error.class(), ErrorClass::PeerDown, "{error}");
    assert!(error.to_string().contains("child"), "{error}");
    wait_for("the link to know", || link.failure().is_some());
    assert_eq!(link.open_slices(), 0);
}

/// A killed initiator holds nothing back.
pub fn killed_initiator_frees_the_region<F: Fixture>() {
    let (mut peer, node, memory) = written_by_child::<F>();
    assert_eq!(peer.hear(), "ready");
    peer.signal(Signal::KILL);
    let started = Instant::now();
    node.unregister(&memory, Duration::from_secs(20)).unwrap();
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    assert_unchanging(&memory);
}

/// An initiator is stopped in the middle of its writes, its region is unregistered, and it resumes: the memory does not
/// change. A transport that cannot promise that must say who holds the region and keep it.
pub fn stopped_initiator_resumes_without_harm<F: Fixture>() {
    for round in 0..5 {
        let (mut peer, node, memory) = written_by_child::<F>();
        assert_eq!(peer.hear(), "ready");
        let region = node.regions.at(memory.addr()).unwrap();
        // Somewhere in a copy; a different place each round.
        std::thread::sleep(Duration::from_micros(700 * round));
        peer.stop();
        match node.unregister(&memory, Duration::from_millis(200)) {
            Ok(()) => {
                memory.fill(0, LEN, 0xA5).unwrap();
                peer.signal(Signal::CONT);
                let end = peer.hear();
                assert!(
                    end.contains("OutOfBounds") || end.contains("PeerDown") || end.contains("Unreachable"),
                    "{end}"
                );
                assert!(bytes_of(&memory, 0, LEN) == vec![0xA5; LEN], "memory changed after unregister returned");
            }
            Err(TransferError::StillInUse { holder, .. }) => {
                assert_eq!(F::NAME, "cma", "only cma may keep a region: {holder}");
                assert!(holder.contains(&peer.child.id().to_string()), "{holder}");
                assert!(node.regions.find(region.range()).is_some());
                peer.signal(Signal::CONT);
                peer.tell("stop");
                peer.hear();
                node.unregister(&memory, Duration::from_secs(20)).unwrap();
                assert_unchanging(&memory);
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn written_by_child<F: Fixture>() -> (Peer, super::fixture::Node, Arc<SharedAllocation>) {
    let mut peer = Peer::start::<F>("initiator");
    let node = F::node("parent");
    let memory = patterned(LEN, 9);
    node.register(&memory, F::is_shared(0));
    peer.tell(&serde_json::to_string(&node.descriptor()).unwrap());
    (peer, node, memory)
}

fn assert_unchanging(memory: &SharedAllocation) {
    memory.fill(0, LEN, 0xA5).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(bytes_of(memory, 0, LEN) == vec![0xA5; LEN]);
}
