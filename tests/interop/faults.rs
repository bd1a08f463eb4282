//! An official peer that dies or stops.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tidewire_core::{Opcode, TransferError};
use tidewire_engine::transport::mooncake_tcp::MooncakeTcpOptions;

use crate::{
    node::{Entry, Node, PATIENCE},
    official::Official,
};

const LEN: usize = 64 << 20;

fn blocks(opcode: Opcode, remote: u64) -> Vec<Entry> {
    (0..64).map(|i| (opcode, i << 20, remote + ((i as u64) << 20), 1 << 20)).collect()
}

fn signal(official: &Official, signal: Signal) {
    kill_process(Pid::from_raw(official.pid() as i32).unwrap(), signal).unwrap();
}

#[test]
fn killed_target_fails_the_batch_within_three_seconds() {
    let Some(mut official) = Official::start("P2PHANDSHAKE", &[]) else { return };
    let remote = official.register(LEN);
    let node = Node::new(LEN, MooncakeTcpOptions::default());
    let link = node.open(&official.name);
    // Stopped first, so that the batches are surely open when it dies.
    signal(&official, Signal::STOP);
    let batches = [Opcode::Write, Opcode::Read].map(|opcode| node.submit(&link, &blocks(opcode, remote)));
    official.kill();
    let killed = Instant::now();
    for batch in batches {
        assert!(batch.park(Instant::now() + PATIENCE));
        let error = batch.status().error.unwrap();
        let TransferError::PeerDown { peer, segment, .. } = &error else { panic!("{error:?}") };
        assert_eq!((peer, segment), (&official.name, &official.name));
    }
    assert!(killed.elapsed() < Duration::from_secs(3), "{:?}", killed.elapsed());
}

#[test]
fn stopped_target_is_given_up_and_its_late_bytes_land_nowhere() {
    let Some(mut official) = Official::start("P2PHANDSHAKE", &[]) else { return };
    let remote = official.register(LEN);
    official.load(remote, &vec![7; LEN]);
    let progress_timeout = Duration::from_millis(500);
    let mut node = Node::new(LEN, MooncakeTcpOptions { progress_timeout, ..MooncakeTcpOptions::default() });
    let link = node.open(&official.name);
    signal(&official, Signal::STOP);
    let started = Instant::now();
    let error = node.run(&link, &blocks(Opcode::Read, remote)).error.unwrap();
    assert!(matches!(&error, TransferError::PeerSilent { peer, .. } if *peer == official.name), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    node.memory_mut().fill(1);
    signal(&official, Signal::CONT);
    // Once it answers again, it has also dealt with what was sent to it before.
    assert_eq!(official.call(json!(["notes"])), json!([]));
    let again = node.open(&official.name);
    assert!(node.run(&again, &[(Opcode::Write, 0, remote, 1)]).error.is_none());
    assert!(node.memory().iter().all(|b| *b == 1));
}

#[test]
fn stopped_initiator_holds_no_buffer() {
    let Some(mut official) = Official::start("P2PHANDSHAKE", &[]) else { return };
    let node = Node::new(LEN, MooncakeTcpOptions::default());
    let local = official.register(LEN);
    official.load(local, &vec![7; LEN]);
    official.begin(&json!(["write", node.name, local, node.base, LEN]));
    let deadline = Instant::now() + PATIENCE;
    while node.memory()[0] == 0 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    signal(&official, Signal::STOP);
    let started = Instant::now();
    node.unregister(Duration::from_millis(100));
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    let before = node.memory().to_vec();
    signal(&official, Signal::CONT);
    let answer = official.answer();
    assert!(node.memory() == before, "bytes arrived after unregister");
    // It may have finished just before it was stopped.
    assert_eq!(answer == json!(0), before.iter().all(|b| *b == 7));
}
