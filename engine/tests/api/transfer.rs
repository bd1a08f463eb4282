//! Engines of one process move bytes over every transport.

use tidewire_engine::{Location, Notify, SegmentId, TaskState, TransferError, TransportKind};

use crate::support::{LIMIT, buffer, engine, pattern, read, write};

/// Writes, reads back and compares, over the one transport that both sides start.
fn round_trip(kind: TransportKind) {
    if kind == TransportKind::Cma && crate::cma::skip("a round trip") {
        return;
    }
    let (target, initiator) = (engine(&[kind]), engine(&[kind]));
    let len = (3 << 20) + 17;
    let (there, here) = (buffer(&target, len), buffer(&initiator, 2 * len));
    let bytes = pattern(len, 1);
    here.write_at(0, &bytes).unwrap();
    let segment = initiator.open_segment(target.segment_name()).unwrap();
    assert_eq!(initiator.connect(segment), Ok(kind));
    initiator.transfer_sync(&[write(here.addr(), segment, there.addr(), len as u64)], LIMIT).unwrap();
    let mut seen = vec![0; len];
    there.read_at(0, &mut seen).unwrap();
    assert!(seen == bytes);
    there.write_at(5, b"changed").unwrap();
    initiator.transfer_sync(&[read(here.addr() + len as u64, segment, there.addr(), len as u64)], LIMIT).unwrap();
    here.read_at(len, &mut seen).unwrap();
    assert_eq!((&seen[5..12], &seen[..5]), (&b"changed"[..], &bytes[..5]));
    assert!(seen[12..] == bytes[12..]);

    let info = initiator.segment_info(segment).unwrap();
    assert_eq!(info.transport, Some(kind));
    assert_eq!(info.generation, target.generation().to_string());
    let wrong = write(here.addr(), segment, there.addr() + 1, len as u64);
    match initiator.transfer_sync(&[wrong], LIMIT) {
        Err(TransferError::OutOfBounds { segment, range, .. }) => {
            assert_eq!(segment, target.segment_name());
            assert!(range.end() == there.addr() + 1 + len as u64, "{range}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn tcp_moves_bytes_both_ways() {
    round_trip(TransportKind::Tcp);
}

#[test]
fn shm_moves_bytes_both_ways() {
    round_trip(TransportKind::Shm);
}

#[test]
fn cma_moves_bytes_both_ways() {
    round_trip(TransportKind::Cma);
}

#[test]
fn own_segment_needs_no_peer() {
    let engine = engine(&[]);
    assert_eq!(engine.open_segment(engine.segment_name()), Ok(SegmentId::LOCAL));
    let (a, b) = (buffer(&engine, 4096), buffer(&engine, 4096));
    a.fill(9).unwrap();
    engine.transfer_sync(&[write(a.addr(), SegmentId::LOCAL, b.addr() + 96, 4000)], LIMIT).unwrap();
    let mut seen = [0; 4096];
    b.read_at(0, &mut seen).unwrap();
    assert!(seen[..96].iter().all(|byte| *byte == 0) && seen[96..].iter().all(|byte| *byte == 9));
    let info = engine.segment_info(SegmentId::LOCAL).unwrap();
    assert_eq!((info.transport, info.buffers.len()), (Some(TransportKind::Local), 2));
    assert_eq!(info.buffers[0].location, Location::Cpu(0));
}

#[test]
fn same_host_peers_choose_shared_memory_and_say_why() {
    let (target, initiator) = (engine(&[]), engine(&[]));
    let segment = initiator.open_segment(target.segment_name()).unwrap();
    assert_eq!(initiator.connect(segment), Ok(TransportKind::Shm));
    assert_eq!(initiator.segment_info(segment).unwrap().reason, "best that both sides offer");
    let tcp_only = engine(&[TransportKind::Tcp]);
    let segment = tcp_only.open_segment(target.segment_name()).unwrap();
    assert_eq!(tcp_only.connect(segment), Ok(TransportKind::Tcp));
    let reason = tcp_only.segment_info(segment).unwrap().reason;
    assert_eq!(reason, "not shm: not started here; not cma: not started here");
}

#[test]
fn memory_of_the_caller_is_reached_where_shared_memory_cannot() {
    let (target, initiator) = (engine(&[]), engine(&[]));
    let there = pattern(100_000, 2);
    let here = buffer(&initiator, there.len());
    let segment = initiator.open_segment(target.segment_name()).unwrap();
    let addr = there.as_ptr().cast_mut();
    // SAFETY: the vector outlives the registration, which ends below; it is only read meanwhile.
    unsafe { target.register_memory(addr, there.len(), Location::Any) }.unwrap();
    initiator.transfer_sync(&[read(here.addr(), segment, addr as u64, there.len() as u64)], LIMIT).unwrap();
    let mut seen = vec![0; there.len()];
    here.read_at(0, &mut seen).unwrap();
    assert!(seen == there);
    target.unregister_memory(addr as u64).unwrap();
    let again = initiator.transfer_sync(&[read(here.addr(), segment, addr as u64, 1)], LIMIT);
    assert!(matches!(again, Err(TransferError::OutOfBounds { .. })), "{again:?}");
}

#[test]
fn one_batch_reaches_several_segments() {
    let initiator = engine(&[]);
    let targets = [engine(&[TransportKind::Tcp]), engine(&[TransportKind::Shm]), engine(&[TransportKind::Tcp])];
    let here = buffer(&initiator, 30_000);
    here.write_at(0, &pattern(30_000, 4)).unwrap();
    let there: Vec<_> = targets.iter().map(|target| buffer(target, 10_000)).collect();
    let requests: Vec<_> = (0..30)
        .map(|i| {
            let segment = initiator.open_segment(targets[i % 3].segment_name()).unwrap();
            let at = (i / 3) as u64 * 1000;
            write(here.addr() + i as u64 * 1000, segment, there[i % 3].addr() + at, 1000)
        })
        .collect();
    let status = initiator.transfer_sync(&requests, LIMIT).unwrap();
    assert_eq!((status.tasks, status.transferred_bytes), (30, 30_000));
    let sent = pattern(30_000, 4);
    for i in 0..30 {
        let mut seen = vec![0; 1000];
        there[i % 3].read_at(i / 3 * 1000, &mut seen).unwrap();
        assert!(seen == sent[i * 1000..][..1000], "entry {i}");
    }
}

#[test]
fn notification_comes_after_the_bytes_once() {
    for kind in [TransportKind::Tcp, TransportKind::Shm, TransportKind::Local] {
        let (target, initiator) = (engine(&[kind]), engine(&[kind]));
        let target = if kind == TransportKind::Local { &initiator } else { &target };
        let (there, here) = (buffer(target, 1 << 20), buffer(&initiator, 1 << 20));
        here.fill(7).unwrap();
        let segment = initiator.open_segment(target.segment_name()).unwrap();
        let batch = initiator.allocate_batch(4).unwrap();
        let notify = Notify { name: "me".to_owned(), message: "done\nüber".to_owned() };
        let requests: Vec<_> =
            (0..4).map(|i| write(here.addr() + i * 1000, segment, there.addr() + i * 1000, 1000)).collect();
        batch.submit_with_notify(&requests, notify.clone()).unwrap();
        let status = batch.wait(LIMIT).unwrap();
        assert_eq!((status.state, status.tasks, status.transferred_bytes), (TaskState::Completed, 4, 4000));
        assert_eq!(target.take_notifications(), [notify]);
        assert_eq!(target.take_notifications(), []);
        let mut seen = vec![0; 4000];
        there.read_at(0, &mut seen).unwrap();
        assert!(seen.iter().all(|byte| *byte == 7));
    }
}

#[test]
fn a_restarted_peer_is_refused_until_it_is_opened_again() {
    let store = "memory://restarted-peer";
    let start = || {
        let config = tidewire_engine::Config::default();
        let builder = tidewire_engine::TransferEngine::builder("127.0.0.1:node-a").config(config).metadata(store);
        builder.transports(&[TransportKind::Tcp]).build().unwrap()
    };
    let initiator = tidewire_engine::TransferEngine::builder("127.0.0.1:node-b")
        .config(tidewire_engine::Config::default())
        .metadata(store)
        .transports(&[TransportKind::Tcp])
        .build()
        .unwrap();
    let first = start();
    let here = buffer(&initiator, 4096);
    let there = buffer(&first, 4096);
    let segment = initiator.open_segment("127.0.0.1:node-a").unwrap();
    initiator.transfer_sync(&[write(here.addr(), segment, there.addr(), 4096)], LIMIT).unwrap();
    first.shutdown(LIMIT);

    let second = start();
    let there = buffer(&second, 4096);
    let request = [write(here.addr(), segment, there.addr(), 4096)];
    let mut refused = initiator.transfer_sync(&request, LIMIT);
    if matches!(refused, Err(TransferError::PeerDown { ref reason, .. }) if !reason.contains("restarted")) {
        // The link was found dead only with the request on it.
        refused = initiator.transfer_sync(&request, LIMIT);
    }
    match refused {
        Err(TransferError::PeerDown { segment, reason, .. }) => {
            assert_eq!(segment, "127.0.0.1:node-a");
            assert!(reason.contains("restarted"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(initiator.open_segment("127.0.0.1:node-a"), Ok(segment));
    initiator.transfer_sync(&request, LIMIT).unwrap();
    assert_eq!(initiator.segment_info(segment).unwrap().generation, second.generation().to_string());
}
