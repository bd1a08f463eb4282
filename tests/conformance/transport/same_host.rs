//! What only the same-host transports promise.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use tidewire_core::{ByteRange, ErrorClass, TaskState, TransferError};
use tidewire_engine::transport::{Drive, TransportKind, shm::SameHostOptions};

use super::{
    fixture::{Node, Op, PATIENCE, Shm, bytes_of, pattern, patterned, push, same_host, wait_for},
    processes::{LEN, Peer},
};

fn options() -> SameHostOptions {
    SameHostOptions::default()
}

fn pair(kind: TransportKind, options: &SameHostOptions) -> (Node, Node) {
    (same_host("initiator", kind, options.clone()).0, same_host("target", kind, options.clone()).0)
}

/// A writer stopped inside a copy is cut off by the fence, and its late bytes go nowhere. Repeated until a stop really hit
/// the middle of a copy, which the fence count proves.
#[test]
fn writer_stopped_inside_a_copy_is_cut_off() {
    for round in 0..20 {
        let mut peer = Peer::start::<Shm>("initiator");
        let (node, host) = same_host("parent", TransportKind::Shm, options());
        let memory = patterned(LEN, 9);
        node.register(&memory, true);
        peer.tell(&serde_json::to_string(&node.descriptor()).unwrap());
        assert_eq!(peer.hear(), "ready");
        std::thread::sleep(Duration::from_micros(500 * round));
        peer.stop();
        node.unregister(&memory, Duration::from_millis(50)).unwrap();
        memory.fill(0, LEN, 0xA5).unwrap();
        peer.signal(Signal::CONT);
        let end = peer.hear();
        assert!(bytes_of(&memory, 0, LEN) == vec![0xA5; LEN], "memory changed after unregister returned");
        assert!(end.contains("OutOfBounds"), "the writer thinks that it wrote: {end}");
        // The memory is as good as before, for new peers too.
        node.register(&memory, true);
        let other = same_host("other", TransportKind::Shm, SameHostOptions { allow_cma: false, ..options() }).0;
        let local = patterned(4096, 5);
        other.register(&local, false);
        let (_, status) = other.run(&*other.connect(&node), &[Op::write(local.addr(), memory.addr(), 4096)]);
        assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
        assert!(bytes_of(&memory, 0, 4096) == pattern(4096, 5));
        if host.fences() > 0 {
            return;
        }
    }
    panic!("in 20 rounds no stop hit a copy");
}

/// A region that shares its allocation with another cannot be fenced: unregister says who holds it.
#[test]
fn region_beside_another_of_its_allocation_is_not_fenced() {
    for round in 0..20 {
        let mut peer = Peer::start::<Shm>("initiator");
        let (node, _host) = same_host("parent", TransportKind::Shm, options());
        let memory = patterned(LEN + 4096, 9);
        let region =
            node.regions.register(memory.addr(), LEN as u64, Default::default(), Some(memory.window(0))).unwrap();
        node.regions
            .register(memory.addr() + LEN as u64, 4096, Default::default(), Some(memory.window(LEN as u64)))
            .unwrap();
        peer.tell(&serde_json::to_string(&node.descriptor()).unwrap());
        assert_eq!(peer.hear(), "ready");
        std::thread::sleep(Duration::from_micros(500 * round));
        peer.stop();
        let ended = node.unregister(&memory, Duration::from_millis(50));
        peer.signal(Signal::CONT);
        peer.tell("stop");
        peer.hear();
        match ended {
            Ok(()) => continue,
            Err(TransferError::StillInUse { range, holder, .. }) => {
                assert_eq!(range, region.range());
                assert!(holder.contains(&peer.id().to_string()), "{holder}");
                return node.unregister(&memory, PATIENCE).unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
    panic!("in 20 rounds no stop hit a copy");
}

/// A stopped target does not matter where the region is granted already, and is an error in time where it is not.
#[test]
fn stopped_target_serves_granted_regions_and_fails_the_others_in_time() {
    let mut peer = Peer::start::<Shm>("target");
    let short = SameHostOptions { answer_timeout: Duration::from_millis(300), ..options() };
    let node = same_host("parent", TransportKind::Shm, short).0;
    let local = patterned(LEN, 7);
    node.register(&local, false);
    let descriptor = peer.descriptor();
    let target = descriptor.buffers[0].addr;
    let link = node.try_connect(descriptor).unwrap();
    peer.tell("more");
    let later: u64 = peer.hear().parse().unwrap();
    peer.stop();
    let (_, status) = node.run(&*link, &[Op::write(local.addr(), target, LEN as u64)]);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    let started = Instant::now();
    let (_, status) = node.run(&*link, &[Op::write(local.addr(), later, 4096)]);
    match status.error {
        Some(TransferError::PeerSilent { segment, range, silent_ms, .. }) => {
            assert_eq!((segment.as_str(), range.addr()), ("child", later));
            assert!(silent_ms >= 300 && started.elapsed() < Duration::from_secs(3));
        }
        other => panic!("{other:?}"),
    }
    // A batch that waits for an answer can be cancelled meanwhile.
    let (batch, slices) = node.prepare(&[Op::write(local.addr(), later, 4096)]);
    push(&*link, &batch, slices);
    assert_eq!(link.open_slices(), 1);
    link.cancel(&batch, &|range| TransferError::TimedOut {
        segment: "child".to_owned(),
        peer: String::new(),
        range,
        timeout_ms: 1,
    });
    assert_eq!((batch.status().state, link.open_slices()), (TaskState::TimedOut, 0));
    peer.signal(Signal::CONT);
    let (_, status) = node.run(&*link, &[Op::read(local.addr(), later, LEN as u64)]);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    assert!(bytes_of(&local, 0, LEN) == pattern(LEN, 2));
}

/// Without cma, memory that the peer's engine did not allocate is declined before, and refused typed if sent anyway.
#[test]
fn memory_that_cannot_be_mapped_is_declined() {
    let no_cma = SameHostOptions { allow_cma: false, ..options() };
    let (initiator, target) = pair(TransportKind::Shm, &no_cma);
    let (local, mapped, plain) = (patterned(4096, 1), patterned(4096, 2), patterned(4096, 3));
    initiator.register(&local, false);
    target.register(&mapped, true);
    target.register(&plain, false);
    let link = initiator.connect(&target);
    let range = |addr| ByteRange::new(addr, 4096).unwrap();
    assert!(link.accepts(range(mapped.addr())) && !link.accepts(range(plain.addr())));
    let (_, status) = initiator.run(&*link, &[Op::write(local.addr(), plain.addr(), 4096)]);
    assert_eq!(status.error.map(|e| e.class()), Some(ErrorClass::Unavailable));
    assert!(bytes_of(&plain, 0, 4096) == pattern(4096, 3));
    // Registered later: unknown at first, then known.
    let later = patterned(4096, 4);
    target.register(&later, true);
    wait_for("the link to learn of the region", || link.accepts(range(later.addr())));
    let cma = same_host("cma", TransportKind::Cma, no_cma).0;
    match cma.try_connect(target.descriptor()).map(|_| ()) {
        Err(TransferError::Unavailable { reason, .. }) => assert!(reason.contains("turned off"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

/// Peers on another host, without the transport, or not Tidewire at all are unavailable, with the reason.
#[test]
fn peer_elsewhere_is_unavailable() {
    let (initiator, target) = pair(TransportKind::Shm, &options());
    let mut elsewhere = target.descriptor();
    elsewhere.tidewire.as_mut().unwrap().host_id = "another".to_owned();
    let mut without = target.descriptor();
    without.tidewire.as_mut().unwrap().transports = vec!["tcp".to_owned()];
    let mut plain = target.descriptor();
    plain.tidewire = None;
    for (descriptor, text) in [(elsewhere, "another"), (without, "not offered"), (plain, "not a Tidewire")] {
        match initiator.try_connect(descriptor).map(|_| ()) {
            Err(TransferError::Unavailable { reason, .. }) => assert!(reason.contains(text), "{reason}"),
            other => panic!("{text}: {other:?}"),
        }
    }
    let mut gone = target.descriptor();
    gone.tidewire.as_mut().unwrap().local_socket = "tidewire-no-such-socket".to_owned();
    let mut another = target.descriptor();
    another.tidewire.as_mut().unwrap().pid = 1;
    for descriptor in [gone, another] {
        let error = initiator.try_connect(descriptor).map(|_| ()).unwrap_err();
        assert!(matches!(error, TransferError::Unreachable { .. }), "{error}");
    }
}

/// More regions than a link keeps mapped, and more grants than a control page has slots, over one connection.
#[test]
fn grants_are_given_back_and_slots_used_again() {
    const REGIONS: usize = 24;
    // More grants than the 16,384 slots of a control page.
    const ROUNDS: usize = 800;
    let few = SameHostOptions { max_mappings: 8, max_waiting: 4, ..options() };
    let (initiator, target) = pair(TransportKind::Shm, &few);
    let local = patterned(REGIONS * 64, 1);
    initiator.register(&local, false);
    let remote: Vec<_> = (0..REGIONS).map(|n| patterned(4096, n as u64)).collect();
    remote.iter().for_each(|memory| target.register(memory, true));
    let link = initiator.connect(&target);
    for round in 0..ROUNDS {
        local.copy_in(0, &pattern(REGIONS * 64, round as u64)).unwrap();
        let ops: Vec<_> = remote
            .iter()
            .enumerate()
            .map(|(n, memory)| Op::write(local.addr() + n as u64 * 64, memory.addr() + round as u64, 64))
            .collect();
        let (_, status) = initiator.run(&*link, &ops);
        assert_eq!(status.state, TaskState::Completed, "round {round}: {:?}", status.error);
        let sent = bytes_of(&local, 0, REGIONS * 64);
        for (n, memory) in remote.iter().enumerate() {
            assert!(bytes_of(memory, round, 64) == sent[n * 64..][..64], "round {round} region {n}");
        }
    }
}

/// An engine with an attached peer and no work sleeps.
#[test]
fn idle_costs_nothing() {
    let (initiator, target) = pair(TransportKind::Shm, &options());
    let memory = patterned(4096, 1);
    target.register(&memory, true);
    let _link = initiator.connect(&target);
    let switches = || -> u64 {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
        let ours =
            tasks.filter(|t| std::fs::read_to_string(t.path().join("comm")).is_ok_and(|c| c.starts_with("tw-local")));
        ours.map(|t| std::fs::read_to_string(t.path().join("status")).unwrap_or_default())
            .flat_map(|s| {
                s.lines()
                    .filter_map(|l| l.strip_prefix("voluntary_ctxt_switches:")?.trim().parse().ok())
                    .collect::<Vec<u64>>()
            })
            .sum()
    };
    // Other tests run in this process too, so what counts is that a quiet interval exists.
    wait_for("200 ms without a wake-up", || {
        let before = switches();
        std::thread::sleep(Duration::from_millis(200));
        switches() == before
    });
}

/// Numbers for the log; run by hand with `--ignored --nocapture`, in a release build.
#[test]
#[ignore = "measures"]
fn measure() {
    const REGION: usize = 256 << 20;
    for kind in [TransportKind::Shm, TransportKind::Cma] {
        let (initiator, target) = pair(kind, &options());
        let (local, remote) = (patterned(REGION, 1), patterned(REGION, 2));
        initiator.register(&local, true);
        target.register(&remote, kind == TransportKind::Shm);
        let link = initiator.connect(&target);
        for size in [64u64, 4096, 65_536, 1 << 20, 16 << 20] {
            for make in [Op::write as fn(u64, u64, u64) -> Op, Op::read] {
                let count = (REGION as u64 / size).min(20_000);
                let mut times = Vec::new();
                let all = Instant::now();
                for index in 0..count {
                    let op = make(local.addr() + index * size, remote.addr() + index * size, size);
                    let (batch, mut slices) = initiator.prepare(&[op]);
                    let started = Instant::now();
                    link.submit(&mut slices);
                    link.drive(&batch, Drive { deadline: started + Duration::from_secs(9), spin: Duration::ZERO });
                    times.push(started.elapsed());
                }
                let all = all.elapsed();
                times.sort_unstable();
                println!(
                    "{kind:?} {:?} {size:>9} B: p50 {:?} p99 {:?}, {:.2} GB/s with one at a time",
                    make(0, 0, 1).opcode,
                    times[times.len() / 2],
                    times[times.len() * 99 / 100],
                    (count * size) as f64 / all.as_secs_f64() / 1e9
                );
            }
        }
        for size in [4096u64, 65_536, 1 << 20] {
            let batch = 16;
            let started = Instant::now();
            for first in (0..REGION as u64 / size).step_by(batch) {
                let at = (first..first + batch as u64).map(|i| i * size);
                let ops: Vec<_> = at.map(|at| Op::write(local.addr() + at, remote.addr() + at, size)).collect();
                let (_, status) = initiator.run(&*link, &ops);
                assert_eq!(status.state, TaskState::Completed);
            }
            println!(
                "{kind:?} batches of 16 x {size} B: {:.2} GB/s",
                REGION as f64 / started.elapsed().as_secs_f64() / 1e9
            );
        }
    }
}
