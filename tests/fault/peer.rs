//! Peers that die, freeze, come back late.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use tidewire_engine::{
    Buffer, TransferEngine,
    core::{ErrorClass, Location, Opcode, SegmentId, TaskState, TransferError},
};

use super::target::{Target, engine, request};

const LEN: u64 = 64 << 20;

fn near(transports: &str, target: &Target) -> (TransferEngine, Buffer, SegmentId) {
    let engine = engine(transports);
    let buffer = engine.allocate(LEN as usize, Location::Any).unwrap();
    buffer.fill(0x22).unwrap();
    let segment = engine.open_segment(&target.name).unwrap();
    engine.connect(segment).unwrap();
    (engine, buffer, segment)
}

fn names(error: &TransferError, target: &Target) {
    let text = error.to_string();
    assert!(text.contains(&target.name), "the error names the peer: {text}");
}

#[test]
fn a_peer_killed_mid_batch_fails_within_three_seconds() {
    for (transports, opcode) in
        [("tcp", Opcode::Write), ("tcp", Opcode::Read), ("mooncake-tcp", Opcode::Write), ("mooncake-tcp", Opcode::Read)]
    {
        let mut target = Target::start(LEN, transports);
        let (engine, buffer, segment) = near(transports, &target);
        // A stopped process keeps the batch open until it is killed.
        target.freeze();
        let batch = engine.allocate_batch(64).unwrap();
        let requests: Vec<_> = (0..64)
            .map(|i| request(opcode, buffer.addr() + (i << 20), segment, target.addr + (i << 20), 1 << 20))
            .collect();
        batch.submit(&requests).unwrap();
        assert!(!batch.status().state.is_terminal());
        let killed = Instant::now();
        target.kill();
        let status = batch.wait(Duration::from_secs(20)).unwrap();
        assert!(killed.elapsed() < Duration::from_secs(3), "{transports} {opcode:?}: {:?}", killed.elapsed());
        assert_eq!(status.state, TaskState::Failed);
        let error = status.error.unwrap();
        assert_eq!(error.class(), ErrorClass::PeerDown, "{error}");
        names(&error, &target);
        // The next call fails within one round trip, by name.
        let again = Instant::now();
        let batch = engine.allocate_batch(1).unwrap();
        let outcome = batch.submit(&requests[..1]).and_then(|()| batch.wait(Duration::from_secs(20))?.into_result());
        names(&outcome.unwrap_err(), &target);
        assert!(again.elapsed() < Duration::from_secs(3));
    }
}

#[test]
fn a_peer_killed_while_memory_is_shared_is_noticed() {
    for transports in ["shm", "cma"] {
        if transports == "cma" && crate::cma::skip("a killed peer") {
            continue;
        }
        let mut target = Target::start(LEN, transports);
        let (engine, buffer, segment) = near(transports, &target);
        let write = request(Opcode::Write, buffer.addr(), segment, target.addr, 4096);
        engine.transfer_sync(&[write], Duration::from_secs(5)).unwrap();
        target.kill();
        let started = Instant::now();
        loop {
            match engine.transfer_sync(&[write], Duration::from_secs(5)) {
                Ok(_) => assert!(started.elapsed() < Duration::from_secs(3), "{transports}: death was not noticed"),
                Err(error) => break names(&error, &target),
            }
        }
    }
}

#[test]
fn a_stopped_peer_fails_within_the_heartbeat_and_touches_nothing_when_it_resumes() {
    for opcode in [Opcode::Write, Opcode::Read] {
        let mut target = Target::start(LEN, "tcp");
        let (engine, buffer, segment) = near("tcp", &target);
        target.freeze();
        let batch = engine.allocate_batch(64).unwrap();
        let requests: Vec<_> = (0..64)
            .map(|i| request(opcode, buffer.addr() + (i << 20), segment, target.addr + (i << 20), 1 << 20))
            .collect();
        let started = Instant::now();
        batch.submit(&requests).unwrap();
        let status = batch.wait(Duration::from_secs(20)).unwrap();
        let elapsed = started.elapsed();
        // The heartbeat timeout is one second.
        assert!(elapsed > Duration::from_millis(900) && elapsed < Duration::from_millis(2500), "{elapsed:?}");
        let error = status.error.unwrap();
        assert!(matches!(error, TransferError::PeerSilent { silent_ms: 1000.., .. }), "{error}");
        names(&error, &target);
        resumes_harmlessly(&engine, buffer, &mut target);
    }
}

#[test]
fn a_batch_that_timed_out_leaves_memory_alone_when_its_peer_resumes() {
    for transports in ["tcp", "mooncake-tcp"] {
        for opcode in [Opcode::Write, Opcode::Read] {
            let mut target = Target::start(LEN, transports);
            let (engine, buffer, segment) = near(transports, &target);
            target.freeze();
            let batch = engine.allocate_batch(1).unwrap();
            batch.submit(&[request(opcode, buffer.addr(), segment, target.addr, LEN)]).unwrap();
            let error = batch.wait(Duration::from_millis(300)).unwrap_err();
            assert!(matches!(error, TransferError::TimedOut { timeout_ms: 300, .. }), "{error}");
            resumes_harmlessly(&engine, buffer, &mut target);
        }
    }
}

#[test]
fn a_cancelled_batch_leaves_memory_alone_when_its_peer_resumes() {
    let mut target = Target::start(LEN, "tcp");
    let (engine, buffer, segment) = near("tcp", &target);
    target.freeze();
    let batch = engine.allocate_batch(1).unwrap();
    batch.submit(&[request(Opcode::Read, buffer.addr(), segment, target.addr, LEN)]).unwrap();
    batch.cancel();
    assert_eq!(batch.status().state, TaskState::Cancelled);
    resumes_harmlessly(&engine, buffer, &mut target);
}

/// After the operation ended: its memory is reused on this side, the peer resumes, and for a while neither side's memory
/// changes. The target's is untouched by the write that was given up, the source's by the read.
fn resumes_harmlessly(engine: &TransferEngine, buffer: Buffer, target: &mut Target) {
    buffer.fill(0x33).unwrap();
    target.signal(Signal::CONT);
    // A probe goes over another connection, so its answer says that the peer runs again; the second count, after a
    // whole transfer on a fresh link, comes after everything that was waiting in its sockets.
    engine.probe(&target.name).unwrap();
    let touched = target.count_other(0x11);
    let other = engine.allocate(4096, Location::Any).unwrap();
    let segment = engine.open_segment(&target.name).unwrap();
    let read = request(Opcode::Read, other.addr(), segment, target.addr, 4096);
    engine.transfer_sync(&[read], Duration::from_secs(10)).unwrap();
    assert_eq!((touched, target.count_other(0x11)), (0, 0), "the resumed peer placed bytes of an ended write");
    let mut bytes = vec![0; buffer.len()];
    buffer.read_at(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|b| *b == 0x33), "bytes of an ended read arrived late");
    // And it can be given back: nobody holds it.
    let started = Instant::now();
    engine.unregister_memory(buffer.addr()).unwrap();
    assert!(started.elapsed() < Duration::from_secs(2));
}

#[test]
fn unregister_ends_what_a_frozen_peer_holds_open() {
    let mut target = Target::start(LEN, "tcp");
    let (engine, buffer, segment) = near("tcp", &target);
    target.freeze();
    let batch = engine.allocate_batch(1).unwrap();
    batch.submit(&[request(Opcode::Read, buffer.addr(), segment, target.addr, LEN)]).unwrap();
    engine.unregister_memory(buffer.addr()).unwrap();
    assert!(batch.status().state.is_terminal(), "{:?}", batch.status());
    buffer.fill(0x33).unwrap();
    target.signal(Signal::CONT);
    engine.probe(&target.name).unwrap();
    assert_eq!(target.count_other(0x11), 0);
    let mut bytes = vec![0; buffer.len()];
    buffer.read_at(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|b| *b == 0x33));
}

#[test]
fn a_restarted_peer_is_reached_again_and_never_by_its_old_addresses() {
    let mut first = Target::start(1 << 20, "tcp");
    let (engine, buffer, segment) = near("tcp", &first);
    let (name, port) = (first.name.clone(), first.name.rsplit_once(':').unwrap().1.to_owned());
    let stale = request(Opcode::Write, buffer.addr(), segment, first.addr, 4096);
    engine.transfer_sync(&[stale], Duration::from_secs(5)).unwrap();
    first.kill();
    // The same control port, another life, another buffer size so that the old address need not be valid.
    let environment = [("TIDEWIRE_CONTROL_PORT", port.as_str())];
    let mut second = Target::start_in(None, 2 << 20, "tcp", "127.0.0.1", &environment);
    assert_eq!(second.name, name);
    let deadline = Instant::now() + Duration::from_secs(10);
    let segment = loop {
        let segment = engine.open_segment(&name).unwrap();
        let fresh = request(Opcode::Write, buffer.addr(), segment, second.addr, 2 << 20);
        match engine.transfer_sync(&[fresh], Duration::from_secs(5)) {
            Ok(_) => break segment,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    };
    assert_eq!(second.count_other(0x22), 0);
    let info = engine.segment_info(segment).unwrap();
    assert_eq!(info.buffers.len(), 1, "only buffers of the present life are listed");
    assert_eq!(info.buffers[0].addr, second.addr);
}
