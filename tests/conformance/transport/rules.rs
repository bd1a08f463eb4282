//! Rules that two nodes in one process can show.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tidewire_core::{ErrorClass, TaskState, TransferError, error::RefuseReason};
use tidewire_engine::{
    memory::alloc::SharedAllocation,
    transport::{Drive, fake::FakeTransport},
};

use super::fixture::{Fixture, Node, Op, PATIENCE, bytes_of, pattern, patterned, push, wait_for};

fn target_memory<F: Fixture>(node: &Node, number: usize, len: usize, seed: u64) -> Arc<SharedAllocation> {
    let memory = patterned(len, seed);
    node.register(&memory, F::is_shared(number));
    memory
}

fn local_memory(node: &Node, len: usize, seed: u64) -> Arc<SharedAllocation> {
    let memory = patterned(len, seed);
    node.register(&memory, false);
    memory
}

/// Every size and offset arrives whole in both directions, and nothing beside it changes.
pub fn every_byte_arrives_and_no_other_changes<F: Fixture>() {
    let (initiator, target) = F::pair();
    let len = (64 << 20) + 8192;
    let local = local_memory(&initiator, len, 1);
    let remote = [target_memory::<F>(&target, 0, len, 2), target_memory::<F>(&target, 1, len, 3)];
    let link = initiator.connect(&target);
    assert_eq!(link.kind(), F::KIND);
    let sizes = [1, 2, 7, 64, 4095, 4097, 65_536, 65_537, (1 << 20) + 3, (16 << 20) + 1, 64 << 20];
    for (size, (from, to)) in sizes.into_iter().flat_map(|s| [(s, (1, 4093)), (s, (513, 64))]) {
        for remote in &remote {
            let name = format!("{size} bytes from {from} to {to}");
            let around = |offset: usize| (offset - 1, size + 2);
            local.copy_in(from, &pattern(size, size as u64 + from as u64)).unwrap();
            let before = bytes_of(remote, around(to).0, around(to).1);
            let op = Op::write(local.addr() + from as u64, remote.addr() + to as u64, size as u64);
            let (batch, status) = initiator.run(&*link, &[op]);
            assert_eq!((status.state, status.transferred_bytes), (TaskState::Completed, size as u64), "write {name}");
            assert!(batch.is_settled() && link.open_slices() == 0);
            let after = bytes_of(remote, around(to).0, around(to).1);
            assert!(after[1..=size] == bytes_of(&local, from, size), "write of {name} differs");
            assert_eq!((after[0], after[size + 1]), (before[0], before[size + 1]), "write of {name} spilled");
            remote.copy_in(to, &pattern(size, size as u64 + 77)).unwrap();
            let before = bytes_of(&local, around(from).0, around(from).1);
            let op = Op::read(local.addr() + from as u64, remote.addr() + to as u64, size as u64);
            let (_, status) = initiator.run(&*link, &[op]);
            assert_eq!((status.state, status.transferred_bytes), (TaskState::Completed, size as u64), "read {name}");
            let after = bytes_of(&local, around(from).0, around(from).1);
            assert!(after[1..=size] == bytes_of(remote, to, size), "read of {name} differs");
            assert_eq!((after[0], after[size + 1]), (before[0], before[size + 1]), "read of {name} spilled");
        }
    }
}

/// Thousands of slices of one batch, over several regions, settle once each and all arrive.
pub fn many_slices_over_many_regions_all_arrive<F: Fixture>() {
    const REGIONS: usize = 37;
    const PER_REGION: usize = 97;
    const LEN: usize = 1031;
    let (initiator, target) = F::pair();
    let local = local_memory(&initiator, REGIONS * PER_REGION * LEN, 5);
    let remote: Vec<_> =
        (0..REGIONS).map(|n| target_memory::<F>(&target, n, PER_REGION * LEN, 100 + n as u64)).collect();
    let link = initiator.connect(&target);
    let op = |make: fn(u64, u64, u64) -> Op, index: usize| {
        // Neighbouring requests go to different regions.
        let (region, row) = (index % REGIONS, index / REGIONS);
        make(local.addr() + (index * LEN) as u64, remote[region].addr() + (row * LEN) as u64, LEN as u64)
    };
    let all = REGIONS * PER_REGION;
    let writes: Vec<_> = (0..all).map(|i| op(Op::write, i)).collect();
    let (batch, status) = initiator.run(&*link, &writes);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    assert_eq!((status.tasks, status.open_tasks, status.transferred_bytes), (all, 0, (all * LEN) as u64));
    assert!((0..all).all(|i| batch.task_status(i).unwrap().state == TaskState::Completed));
    let sent = bytes_of(&local, 0, all * LEN);
    for (region, memory) in remote.iter().enumerate() {
        for row in 0..PER_REGION {
            let index = row * REGIONS + region;
            assert!(bytes_of(memory, row * LEN, LEN) == sent[index * LEN..][..LEN], "request {index}");
        }
    }
    local.fill(0, all * LEN, 0).unwrap();
    let reads: Vec<_> = (0..all).map(|i| op(Op::read, i)).collect();
    let (_, status) = initiator.run(&*link, &reads);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    assert!(bytes_of(&local, 0, all * LEN) == sent);
}

/// A range outside one region fails alone, typed, and nothing of it is written.
pub fn out_of_bounds_fails_its_slice_and_harms_no_other<F: Fixture>() {
    let (initiator, target) = F::pair();
    let local = local_memory(&initiator, 64 << 10, 9);
    const MARGIN: usize = 100;
    let remote = patterned((32 << 10) + 2 * MARGIN, 10);
    target.register_inner(&remote, MARGIN as u64, F::is_shared(0));
    let unregistered = patterned(4096, 11);
    let link = initiator.connect(&target);
    let (from, to) = (local.addr(), remote.addr() + MARGIN as u64);
    let end = to + (32 << 10);
    let ops = [
        Op::write(from, to, 1000),
        Op::write(from, end - 10, 20),
        Op::write(from, end, 16),
        Op::write(from, to - 8, 16),
        Op::read(from + 8192, unregistered.addr(), 4096),
        Op::write(from, unregistered.addr(), 4096),
        Op::write(from, 16, 16),
        Op::write(from, u64::MAX - 32, 16),
        Op::write(from, to + 4096, 1000),
    ];
    let before = bytes_of(&remote, 0, remote.len());
    let (batch, status) = initiator.run(&*link, &ops);
    assert_eq!(status.open_tasks, 0);
    let states: BTreeMap<usize, _> = (0..ops.len()).map(|i| (i, batch.task_status(i).unwrap())).collect();
    for (index, task) in states {
        if index == 0 || index == ops.len() - 1 {
            assert_eq!(task.state, TaskState::Completed, "request {index}: {:?}", task.error);
        } else {
            let range = match task.error {
                Some(TransferError::OutOfBounds { segment, range, .. })
                    if F::NAME == "fake" || segment == target.identity.segment =>
                {
                    range
                }
                other => panic!("request {index}: {other:?}"),
            };
            assert_eq!((range.addr(), range.len()), (ops[index].target, ops[index].len));
        }
    }
    let mut expected = before;
    let sent = bytes_of(&local, 0, 1000);
    expected[MARGIN..MARGIN + 1000].copy_from_slice(&sent);
    expected[MARGIN + 4096..MARGIN + 5096].copy_from_slice(&sent);
    assert!(bytes_of(&remote, 0, remote.len()) == expected);
    assert!(bytes_of(&unregistered, 0, 4096) == pattern(4096, 11));
    // The link goes on.
    let (_, status) = initiator.run(&*link, &[Op::write(from, to, 100)]);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
}

/// Several threads share one link.
pub fn threads_may_share_a_link<F: Fixture>() {
    const THREADS: usize = 4;
    const PART: usize = 256 << 10;
    const PIECE: usize = PART / 64;
    let (initiator, target) = F::pair();
    let local = local_memory(&initiator, THREADS * PART, 20);
    let remote = target_memory::<F>(&target, 0, THREADS * PART, 21);
    let link = initiator.connect(&target);
    let (initiator, local, remote, link) = (&initiator, &local, &remote, &*link);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                for round in 0..20 {
                    local.copy_in(thread * PART, &pattern(PART, (round * THREADS + thread) as u64)).unwrap();
                    let at = (0..64).map(|i| (thread * PART + i * PIECE) as u64);
                    let ops: Vec<_> =
                        at.map(|at| Op::write(local.addr() + at, remote.addr() + at, PIECE as u64)).collect();
                    let (_, status) = initiator.run(link, &ops);
                    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
                    assert!(bytes_of(remote, thread * PART, PART) == bytes_of(local, thread * PART, PART));
                }
            });
        }
    });
    assert_eq!(link.open_slices(), 0);
}

/// After `cancel` returned, nothing of the batch is open on the link; other batches and later ones go on.
pub fn cancel_leaves_nothing_open<F: Fixture>() {
    const LEN: usize = 8 << 20;
    let (initiator, target) = F::pair();
    let local = local_memory(&initiator, LEN, 30);
    let remote = target_memory::<F>(&target, 0, LEN, 31);
    let link = initiator.connect(&target);
    for _ in 0..20 {
        let ops: Vec<_> = (0..64)
            .map(|i| i * (LEN as u64 / 64))
            .map(|at| Op::write(local.addr() + at, remote.addr() + at, LEN as u64 / 64))
            .collect();
        let (doomed, slices) = initiator.prepare(&ops);
        let (other, others) = initiator.prepare(&ops[..8]);
        push(&*link, &doomed, slices);
        push(&*link, &other, others);
        link.cancel(&doomed, &|_| TransferError::Cancelled);
        assert!(doomed.is_settled(), "cancel returned with slices open");
        let status = doomed.status();
        assert!(matches!(status.state, TaskState::Cancelled | TaskState::Completed), "{:?}", status.error);
        let how = Drive { deadline: Instant::now() + PATIENCE, spin: Duration::ZERO };
        assert!(link.drive(&other, how));
        assert_eq!(other.status().state, TaskState::Completed, "{:?}", other.status().error);
    }
    assert_eq!(link.open_slices(), 0);
    let (_, status) = initiator.run(&*link, &[Op::write(local.addr(), remote.addr(), LEN as u64)]);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    assert!(bytes_of(&remote, 0, LEN) == bytes_of(&local, 0, LEN));
}

/// `close` settles what is open; later slices fail at once, and the link says why.
pub fn close_settles_every_slice<F: Fixture>() {
    const LEN: usize = 4 << 20;
    let (initiator, target) = F::pair();
    let local = local_memory(&initiator, LEN, 40);
    let remote = target_memory::<F>(&target, 0, LEN, 41);
    let link = initiator.connect(&target);
    assert!(link.failure().is_none());
    let ops: Vec<_> = (0..64)
        .map(|i| i * (LEN as u64 / 64))
        .map(|at| Op::write(local.addr() + at, remote.addr() + at, LEN as u64 / 64))
        .collect();
    let (batch, slices) = initiator.prepare(&ops);
    push(&*link, &batch, slices);
    link.close();
    assert!(batch.is_settled() && link.open_slices() == 0);
    assert!(link.failure().is_some());
    let (batch, mut slices) = initiator.prepare(&ops[..2]);
    link.submit(&mut slices);
    drop(slices);
    assert!(batch.is_settled());
    assert!(!matches!(batch.status().state, TaskState::Completed));
    link.close();
    // The transport makes a new one.
    let link = initiator.connect(&target);
    let (_, status) = initiator.run(&*link, &ops);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
}

/// While one thread writes without pause, the owner unregisters: afterwards no byte changes, and writes are refused. The
/// memory can be registered again.
pub fn unregistered_memory_is_left_alone<F: Fixture>() {
    const LEN: usize = 1 << 20;
    let (initiator, target) = F::pair();
    let local = local_memory(&initiator, LEN, 50);
    let remote = target_memory::<F>(&target, 0, LEN, 51);
    let link = initiator.connect(&target);
    let (stop, refused) = (AtomicBool::new(false), AtomicU64::new(0));
    let (initiator, local_addr, remote_addr, link) = (&initiator, local.addr(), remote.addr(), &*link);
    std::thread::scope(|scope| {
        let stop = StopOnDrop(&stop);
        let writer = scope.spawn(|| {
            while !stop.0.load(Ordering::Acquire) {
                let at = (0..16u64).map(|i| i * 65_536);
                let ops: Vec<_> = at.map(|at| Op::write(local_addr + at, remote_addr + at, 65_536)).collect();
                let (_, status) = initiator.run(link, &ops);
                // A transport may have to end its connection to end a write that is under way.
                let is_refusal = |e: &TransferError| matches!(e.class(), ErrorClass::Refused | ErrorClass::PeerDown);
                match status.error {
                    None => {}
                    Some(error) if is_refusal(&error) => {
                        refused.fetch_add(1, Ordering::AcqRel);
                    }
                    Some(error) => panic!("{error}"),
                }
            }
        });
        for round in 0..10u8 {
            wait_for("the writer", || bytes_of(&remote, 0, 64) == bytes_of(&local, 0, 64));
            target.unregister(&remote, PATIENCE).unwrap();
            remote.fill(0, LEN, round).unwrap();
            let (before, all) = (refused.load(Ordering::Acquire), vec![round; LEN]);
            for _ in 0..50 {
                assert!(bytes_of(&remote, 0, LEN) == all, "written after unregister returned");
            }
            // Two: the first may be of a batch that was under way.
            wait_for("the writer to be refused", || refused.load(Ordering::Acquire) >= before + 2);
            assert!(bytes_of(&remote, 0, LEN) == all, "written after unregister returned");
            target.register(&remote, F::is_shared(0));
        }
        stop.0.store(true, Ordering::Release);
        writer.join().unwrap();
    });
}

/// Ends the other thread also when this one panics; the scope would wait for it for ever otherwise.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A wrong token, and the generation of an earlier life, are refused with the reason.
pub fn stranger_is_refused_with_the_reason<F: Fixture>() {
    let (initiator, target) = F::pair();
    let mut wrong_token = target.descriptor();
    wrong_token.tidewire.as_mut().unwrap().token = "00".repeat(16);
    let mut earlier = target.descriptor();
    earlier.tidewire.as_mut().unwrap().generation = "0123456789abcdef".to_owned();
    for (descriptor, expected) in [(wrong_token, RefuseReason::Token), (earlier, RefuseReason::Generation)] {
        match initiator.try_connect(descriptor).map(|_| ()) {
            Err(TransferError::HandshakeRefused { segment, reason, .. }) => {
                assert_eq!((segment.as_str(), reason), ("target", expected));
            }
            other => panic!("{expected:?}: {other:?}"),
        }
    }
    initiator.connect(&target);
}

/// A slice that nobody settles is settled as cancelled; a failing step keeps its own error.
pub fn script_decides_how_slices_end() {
    use tidewire_engine::transport::{Transport, fake::Step};
    let target = super::fixture::Fake::node("target");
    let fake = FakeTransport::new(Arc::clone(&target.regions));
    let mut initiator = super::fixture::Fake::node("initiator");
    initiator.transport = Arc::clone(&fake) as Arc<dyn Transport>;
    let local = local_memory(&initiator, 4096, 1);
    let remote = target_memory::<super::fixture::Fake>(&target, 0, 4096, 2);
    let link = initiator.connect(&target);
    let ops: Vec<_> = (0..4u64).map(|i| Op::write(local.addr() + i * 64, remote.addr() + i * 64, 64)).collect();
    let timed_out = TransferError::Internal { reason: "scripted" };
    fake.script([
        Step::DropToken,
        Step::FailAfter { bytes: 10, error: timed_out.clone() },
        Step::Hold,
        Step::Refuse,
        Step::Complete,
    ]);
    let (batch, mut slices) = initiator.prepare(&ops);
    link.submit(&mut slices);
    assert_eq!((slices.len(), fake.held(), link.open_slices()), (1, 1, 1));
    link.submit(&mut slices);
    assert!(slices.is_empty() && !batch.is_settled());
    fake.release(9);
    assert!(batch.is_settled());
    let ends: Vec<_> = (0..4).map(|i| batch.task_status(i).unwrap()).collect();
    assert_eq!(ends[0].error, Some(TransferError::Cancelled));
    assert_eq!(ends[1].error, Some(timed_out));
    assert_eq!((ends[2].state, ends[3].state), (TaskState::Completed, TaskState::Completed));
    let sent = bytes_of(&local, 0, 256);
    let got = bytes_of(&remote, 0, 256);
    assert!(got[64..74] == sent[64..74] && got[74..128] != sent[74..128] && got[128..] == sent[128..]);
    // Held slices end with the peer.
    fake.hold_all(Some(2));
    let (batch, mut slices) = initiator.prepare(&ops);
    link.submit(&mut slices);
    assert_eq!((slices.len(), fake.held()), (2, 2));
    fake.go_down("scripted");
    link.submit(&mut slices);
    assert!(batch.is_settled() && batch.status().error.is_some_and(|e| e.class() == ErrorClass::PeerDown));
    assert!(link.failure().is_some());
}
