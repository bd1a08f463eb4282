//! Links against the data port and against scripted targets.

use std::sync::mpsc::{Sender, channel};

use super::*;

fn error_of(status: BatchStatus) -> TransferError {
    assert_ne!(status.state, TaskState::Completed);
    status.error.unwrap()
}

/// A target made of a closure per connection, called on a thread of its own.
fn scripted(serve: impl Fn(usize, Raw) + Send + Sync + 'static) -> (SocketAddr, Sender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = channel::<()>();
    let serve = Arc::new(serve);
    std::thread::spawn(move || {
        for (index, stream) in listener.incoming().enumerate() {
            let serve = Arc::clone(&serve);
            let stream = stream.unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            std::thread::spawn(move || serve(index, Raw(stream)));
        }
        drop(stopped);
    });
    (address, stop)
}

fn read_header(raw: &mut Raw) -> Option<DataHeader> {
    let mut bytes = [0; HEADER_BYTES];
    raw.0.read_exact(&mut bytes).ok()?;
    assert_eq!(bytes[17..], [0; 7], "padding must be zero");
    Some(DataHeader::decode(&bytes).unwrap())
}

#[test]
fn batches_of_all_sizes_arrive_in_both_versions() {
    const LEN: usize = 24 << 20;
    for version in [2, 1] {
        let (mut from, mut to) = (Node::initiator(LEN), Node::target(LEN));
        fill(&mut from.memory, 3);
        let link = from.link_to(to.address(), version);
        let mut writes = Vec::new();
        let mut offset = 0;
        for len in [1, 7, 4096, 65535, 65536, 1 << 20, (9 << 20) + 5, 3, 4096, 4096] {
            writes.push((Opcode::Write, offset, to.base + offset as u64, len as u64));
            offset += len;
        }
        let status = from.run(&link, &writes);
        assert_eq!(
            (status.state, status.transferred_bytes),
            (TaskState::Completed, offset as u64),
            "{:?}",
            status.error
        );
        assert!(to.memory[..offset] == from.memory[..offset], "v{version}: written bytes differ");
        assert!(to.memory[offset..].iter().all(|b| *b == 0));
        fill(&mut to.memory, 4);
        let reads: Vec<_> = writes.iter().map(|w| (Opcode::Read, w.1, w.2, w.3)).collect();
        let status = from.run(&link, &reads);
        assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
        assert!(to.memory[..offset] == from.memory[..offset], "v{version}: read bytes differ");
        assert_eq!(link.open_slices(), 0);
        assert!(link.describe().contains(&format!("v{version}")) && link.failure().is_none());
        to.transport.shutdown(Duration::ZERO);
    }
}

#[test]
fn thousands_of_small_blocks_arrive() {
    const COUNT: usize = 5000;
    let (mut from, to) = (Node::initiator(COUNT * 100), Node::target(COUNT * 100));
    fill(&mut from.memory, 5);
    let link = from.link_to(to.address(), 2);
    let at = |i: usize| (i * 100, to.base + ((COUNT - 1 - i) * 100) as u64, 100);
    let writes: Vec<_> = (0..COUNT).map(at).map(|(l, r, n)| (Opcode::Write, l, r, n)).collect();
    assert_eq!(from.run(&link, &writes).state, TaskState::Completed);
    let original = from.memory.clone();
    from.memory.fill(0);
    let reads: Vec<_> = (0..COUNT).map(at).map(|(l, r, n)| (Opcode::Read, l, r, n)).collect();
    assert_eq!(from.run(&link, &reads).state, TaskState::Completed);
    assert!(original == from.memory);
}

#[test]
fn refused_range_fails_its_entry_and_no_other() {
    for version in [2, 1] {
        let (mut from, to) = (Node::initiator(1 << 20), Node::target(1 << 20));
        fill(&mut from.memory, 6);
        let link = from.link_to(to.address(), version);
        let outside = to.base + (1 << 20) - 10;
        let mut entries: Vec<_> = (0..20).map(|i| (Opcode::Write, i * 1000, to.base + i as u64 * 1000, 1000)).collect();
        entries.insert(5, (Opcode::Write, 0, outside, 1000));
        entries.insert(12, (Opcode::Read, 500_000, outside, 11));
        let batch = from.submit(&link, &entries);
        assert!(batch.park(Instant::now() + PATIENCE));
        for index in 0..entries.len() {
            let task = batch.task_status(index).unwrap();
            if index == 5 || index == 12 {
                let Some(TransferError::OutOfBounds { segment, peer, range }) = task.error else {
                    panic!("v{version} entry {index}: {:?}", task.error)
                };
                assert_eq!((segment.as_str(), peer.as_str(), range.addr()), ("seg", "127.0.0.1:1", outside));
            } else {
                assert_eq!(task.state, TaskState::Completed, "v{version} entry {index}: {:?}", task.error);
            }
        }
        assert!(to.memory[..20_000] == from.memory[..20_000]);
        assert!(link.failure().is_none());
    }
}

#[test]
fn long_write_that_is_refused_ends_early() {
    let (from, to) = (Node::initiator(64 << 20), Node::target(64));
    let link = from.link_to(to.address(), 2);
    let started = Instant::now();
    let error = error_of(from.run(&link, &[(Opcode::Write, 0, to.base, 64 << 20)]));
    assert!(matches!(error, TransferError::OutOfBounds { .. }), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn connection_found_dead_is_replaced_once() {
    let (address, _stop) = scripted(|index, mut raw| {
        if index == 0 {
            // Takes the first request and dies without a byte of reply.
            read_header(&mut raw);
            return;
        }
        while let Some(request) = read_header(&mut raw) {
            raw.send(&DataStatus::Ok.encode());
            raw.send(&vec![9; request.size as usize]);
        }
    });
    let from = Node::initiator(4096);
    let link = from.link_to(address, 2);
    let status = from.run(&link, &[(Opcode::Read, 0, 0x1000, 100), (Opcode::Read, 100, 0x2000, 100)]);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    assert!(from.memory[..200].iter().all(|b| *b == 9));
    assert!(link.describe().contains("2 retries"), "{}", link.describe());
}

#[test]
fn peer_that_always_dies_is_an_error_naming_it() {
    let (address, _stop) = scripted(|_, mut raw| {
        let _ = read_header(&mut raw);
    });
    let from = Node::initiator(4096);
    let link = from.link_to(address, 2);
    let error = error_of(from.run(&link, &[(Opcode::Read, 0, 0x1000, 100)]));
    let TransferError::PeerDown { peer, range, reason, .. } = &error else { panic!("{error:?}") };
    assert_eq!((peer.as_str(), range.addr()), ("127.0.0.1:1", 0x1000));
    assert!(reason.contains(&address.to_string()), "{reason}");
}

#[test]
fn peer_killed_mid_batch_fails_everything_soon() {
    let to = Node::target(64 << 20);
    let from = Node::initiator(64 << 20);
    let link = from.link_to(to.address(), 2);
    let entries: Vec<_> = (0..64).map(|i| (Opcode::Write, i << 20, to.base + ((i as u64) << 20), 1 << 20)).collect();
    let batches: Vec<_> = (0..8).map(|_| from.submit(&link, &entries)).collect();
    to.transport.shutdown(Duration::ZERO);
    let killed = Instant::now();
    let mut failed = 0;
    for batch in batches {
        assert!(batch.park(Instant::now() + PATIENCE));
        failed += usize::from(matches!(batch.status().error, Some(TransferError::PeerDown { .. })));
    }
    assert!(killed.elapsed() < Duration::from_secs(3), "{:?}", killed.elapsed());
    assert!(failed > 0 && link.open_slices() == 0);
    assert!(matches!(link.failure(), Some(TransferError::Unreachable { .. })), "{:?}", link.failure());
    let error = error_of(from.run(&link, &entries));
    assert!(matches!(error, TransferError::Unreachable { .. }), "{error:?}");
}

#[test]
fn silent_peer_is_given_up_after_the_configured_time() {
    let (hold, held) = channel::<()>();
    let held = std::sync::Mutex::new(held);
    let (address, _stop) = scripted(move |_, mut raw| {
        read_header(&mut raw);
        let _ = held.lock().unwrap().recv();
    });
    let progress_timeout = Duration::from_millis(300);
    let from = Node::new(1 << 20, false, MooncakeTcpOptions { progress_timeout, ..MooncakeTcpOptions::default() });
    let link = from.link_to(address, 2);
    let started = Instant::now();
    let error = error_of(from.run(&link, &[(Opcode::Write, 0, 0x1000, 1 << 20), (Opcode::Read, 0, 0x1000, 10)]));
    let TransferError::PeerSilent { peer, silent_ms: 300, .. } = &error else { panic!("{error:?}") };
    assert_eq!(peer, "127.0.0.1:1");
    assert!(started.elapsed() >= progress_timeout && started.elapsed() < Duration::from_secs(5));
    drop(hold);
}

#[test]
fn replies_that_are_not_the_protocol_fail_the_request() {
    for (reply, text) in [
        (vec![1, 2, 3, 4, 5, 6, 7, 8], "no status frame"),
        (DataStatus::Unknown(77).encode().to_vec(), "status code 77"),
    ] {
        let (address, _stop) = scripted(move |_, mut raw| {
            read_header(&mut raw);
            raw.send(&reply);
            raw.rest();
        });
        let from = Node::initiator(4096);
        let link = from.link_to(address, 2);
        let error = error_of(from.run(&link, &[(Opcode::Read, 0, 0x1000, 100)]));
        assert!(matches!(&error, TransferError::Protocol { reason, .. } if reason.contains(text)), "{error:?}");
    }
}

#[test]
fn cancel_leaves_the_memory_alone_and_other_batches_go_on() {
    let (go, gate) = channel::<()>();
    let gate = std::sync::Mutex::new(gate);
    let (address, _stop) = scripted(move |index, mut raw| {
        while let Some(request) = read_header(&mut raw) {
            if index == 0 {
                // Stopped; resumes late, after the cancel.
                let _ = gate.lock().unwrap().recv();
            }
            let _ = raw.0.write_all(&DataStatus::Ok.encode());
            let _ = raw.0.write_all(&vec![9; request.size as usize]);
        }
    });
    let mut from = Node::initiator(4096);
    let link = from.link_to(address, 2);
    let cancelled = from.submit(&link, &[(Opcode::Read, 0, 0x1000, 1000)]);
    let other = from.submit(&link, &[(Opcode::Read, 2000, 0x2000, 1000)]);
    link.cancel(&cancelled, &|range| TransferError::TimedOut {
        segment: "seg".into(),
        peer: "p".into(),
        range,
        timeout_ms: 5,
    });
    let status = cancelled.status();
    assert_eq!(status.state, TaskState::TimedOut, "{:?}", status.error);
    from.memory[..1000].fill(1);
    go.send(()).unwrap();
    assert!(other.park(Instant::now() + PATIENCE));
    assert_eq!(other.status().state, TaskState::Completed, "{:?}", other.status().error);
    drop(go);
    link.close();
    assert!(from.memory[..1000].iter().all(|b| *b == 1) && from.memory[2000..3000].iter().all(|b| *b == 9));
}

#[test]
fn close_and_shutdown_settle_everything() {
    let (address, _stop) = scripted(|_, mut raw| drop(raw.rest()));
    let from = Node::initiator(4096);
    let links = [from.link_to(address, 2), from.link_to(address, 2)];
    let batches = links.each_ref().map(|link| from.submit(link, &[(Opcode::Read, 0, 0x1000, 100)]));
    links[0].close();
    assert!(batches[0].is_settled() && matches!(batches[0].status().error, Some(TransferError::ShutDown)));
    from.transport.shutdown(Duration::from_millis(50));
    assert!(batches[1].is_settled());
    assert!(matches!(error_of(from.run(&links[1], &[(Opcode::Read, 0, 0x1000, 1)])), TransferError::ShutDown));
}

#[test]
fn peers_without_data_port_are_unavailable_and_absent_ones_unreachable() {
    let from = Node::initiator(64);
    let connect = |descriptor| {
        let peer = Peer { segment: "s".into(), address: "127.0.0.1:1".into(), descriptor: Arc::new(descriptor) };
        from.transport.connect(Arc::new(peer)).unwrap_err()
    };
    assert!(matches!(connect(SegmentDescriptor::tcp("s", "", 0)), TransferError::Unavailable { .. }));
    let mut rdma = SegmentDescriptor::tcp("s", "", 1);
    rdma.protocol = "rdma".into();
    assert!(matches!(connect(rdma), TransferError::Unavailable { .. }));
    let error = connect(SegmentDescriptor::tcp("s", "", 1));
    assert!(matches!(&error, TransferError::Unreachable { reason, .. } if reason.contains("127.0.0.1:1")), "{error:?}");
}
