//! The data port against raw bytes.

use super::*;

const OK: [u8; STATUS_BYTES] = [0, 0, 0, 0, 0x56, 0x54, 0x43, 0x4d];
const REJECTED: [u8; STATUS_BYTES] = [1, 0, 0, 0, 0x56, 0x54, 0x43, 0x4d];

#[test]
fn pipelined_requests_of_all_sizes_are_served_in_order() {
    let mut node = Node::target(1 << 20);
    fill(&mut node.memory, 1);
    let mut expected = node.memory.clone();
    let mut raw = Raw::new(node.address());
    let (mut bytes, mut replies) = (Vec::new(), Vec::new());
    let mut state = 7u64;
    for round in 0..300u64 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let len = (state >> 40) % if round % 10 == 0 { 200_000 } else { 3000 } + 1;
        let offset = (state >> 20) % (expected.len() as u64 - len);
        let range = offset as usize..(offset + len) as usize;
        if state >> 63 == 0 {
            bytes.extend(header(0x80, node.base + offset, len));
            replies.extend(OK);
            replies.extend(&expected[range]);
        } else {
            let mut payload = vec![0; len as usize];
            fill(&mut payload, state);
            bytes.extend(header(0x81, node.base + offset, len));
            bytes.extend(&payload);
            expected[range].copy_from_slice(&payload);
            replies.extend(OK);
        }
    }
    let mut sender = raw.0.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        // Odd pieces, so that headers and payloads are cut everywhere.
        for piece in bytes.chunks(7001) {
            sender.write_all(piece).unwrap();
        }
    });
    assert!(raw.take(replies.len()) == replies, "replies differ");
    sending.join().unwrap();
    node.transport.shutdown(Duration::from_secs(5));
    assert!(node.memory == expected, "memory differs");
    assert_eq!(node.transport.target_stats().served, 300);
}

#[test]
fn version_1_gets_payload_only_and_writes_land_before_the_close() {
    let mut node = Node::target(4096);
    fill(&mut node.memory, 2);
    let mut raw = Raw::new(node.address());
    raw.send(&header(0, node.base + 10, 20));
    assert_eq!(raw.take(20), &node.memory[10..30]);
    raw.send(&header(1, node.base, 5));
    raw.send(b"hello");
    raw.0.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(raw.rest(), b"");
    node.transport.shutdown(Duration::ZERO);
    assert_eq!(&node.memory[..5], b"hello");
}

#[test]
fn bad_ranges_are_rejected_and_end_the_connection() {
    let node = Node::target(8192);
    let end = node.base + 8192;
    for (addr, size) in
        [(node.base, 0), (node.base - 1, 2), (end - 1, 2), (end, 1), (u64::MAX, 2), (0, 1), (node.base, u64::MAX)]
    {
        for opcode in [0x80, 0x81] {
            let mut raw = Raw::new(node.address());
            raw.send(&header(opcode, addr, size));
            assert_eq!(raw.take(STATUS_BYTES), REJECTED, "{opcode:#x} {addr:#x} {size}");
            raw.0.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(raw.rest(), b"");
            let mut raw = Raw::new(node.address());
            raw.send(&header(opcode & 1, addr, size));
            assert_eq!(raw.rest(), b"", "v1 {opcode:#x} {addr:#x} {size}");
        }
    }
    node.transport.shutdown(Duration::ZERO);
    assert!(node.memory.iter().all(|b| *b == 0));
    assert_eq!(node.transport.target_stats().refused, 28);
}

#[test]
fn neighbouring_buffers_do_not_merge() {
    let node = Node::target(64);
    let mut block = vec![0u8; 4096];
    let base = block.as_mut_ptr() as u64;
    node.regions.register(base, 2048, Location::Any, None).unwrap();
    node.regions.register(base + 2048, 2048, Location::Any, None).unwrap();
    let mut raw = Raw::new(node.address());
    raw.send(&header(0x80, base + 2047, 1));
    assert_eq!(raw.take(STATUS_BYTES + 1)[..STATUS_BYTES], OK);
    raw.send(&header(0x80, base + 2047, 2));
    assert_eq!(raw.rest(), REJECTED);
}

#[test]
fn rejection_of_a_long_write_arrives_while_the_body_is_being_sent() {
    let node = Node::target(64);
    let mut raw = Raw::new(node.address());
    raw.send(&header(0x81, node.base + 60, 32 << 20));
    let mut sender = raw.0.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        let body = vec![7u8; 1 << 20];
        while sender.write_all(&body).is_ok() {}
    });
    assert_eq!(raw.take(STATUS_BYTES), REJECTED);
    assert_eq!(raw.rest(), b"");
    drop(raw);
    sending.join().unwrap();
}

#[test]
fn unknown_opcodes_and_garbage_are_closed_without_a_word() {
    let node = Node::target(4096);
    for opcode in [2, 0x7f, 0x82, 0xff] {
        let mut raw = Raw::new(node.address());
        raw.send(&header(opcode, node.base, 1));
        assert_eq!(raw.rest(), b"", "{opcode:#x}");
    }
    let mut raw = Raw::new(node.address());
    raw.send(&[b'x'; 4000]);
    assert_eq!(raw.rest(), b"");
    node.transport.shutdown(Duration::ZERO);
    assert!(node.memory.iter().all(|b| *b == 0));
}

#[test]
fn half_sent_requests_time_out_and_delay_nobody() {
    let progress_timeout = Duration::from_millis(200);
    let node = Node::new(4096, true, MooncakeTcpOptions { progress_timeout, ..MooncakeTcpOptions::default() });
    let mut half_header = Raw::new(node.address());
    half_header.send(&header(0x81, node.base, 100)[..11]);
    let mut half_body = Raw::new(node.address());
    half_body.send(&header(0x81, node.base, 100));
    half_body.send(&[1; 50]);
    let idle: Vec<Raw> = (0..1000).map(|_| Raw::new(node.address())).collect();
    let mut other = Raw::new(node.address());
    let started = Instant::now();
    other.send(&header(0x80, node.base, 8));
    assert_eq!(other.take(STATUS_BYTES + 8)[..STATUS_BYTES], OK);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert_eq!(half_header.rest(), b"");
    assert_eq!(half_body.rest(), b"");
    assert_eq!(node.transport.target_stats().late, 2);
    assert_eq!(node.transport.target_stats().open, 1001);
    drop(idle);
}

#[test]
fn beyond_the_limit_the_longest_idle_connection_goes() {
    let node = Node::new(4096, true, MooncakeTcpOptions { max_inbound: 2, ..MooncakeTcpOptions::default() });
    let mut first = Raw::new(node.address());
    wait_until("accept", || node.transport.target_stats().open == 1);
    let mut second = Raw::new(node.address());
    wait_until("accept", || node.transport.target_stats().open == 2);
    let mut third = Raw::new(node.address());
    assert_eq!(first.rest(), b"");
    for raw in [&mut second, &mut third] {
        raw.send(&header(0x80, node.base, 1));
        assert_eq!(raw.take(STATUS_BYTES + 1)[..STATUS_BYTES], OK);
    }
}

#[test]
fn unregister_cuts_a_stopped_writer_and_its_late_bytes_land_nowhere() {
    let node = Node::target(4096);
    let mut stopped = Raw::new(node.address());
    stopped.send(&header(0x81, node.base, 4000));
    stopped.send(&[1; 100]);
    wait_until("first bytes", || std::hint::black_box(&node.memory)[99] == 1);
    let drain = Duration::from_millis(50);
    let transport = &node.transport;
    node.regions.unregister(node.base, drain, |region| transport.evict(region, drain)).unwrap();
    // It resumes late.
    let _ = stopped.0.write_all(&[2; 3900]);
    assert_eq!(stopped.rest(), b"");
    let mut refused = Raw::new(node.address());
    refused.send(&header(0x80, node.base, 1));
    assert_eq!(refused.take(STATUS_BYTES), REJECTED);
    node.transport.shutdown(Duration::ZERO);
    assert!(node.memory[100..].iter().all(|b| *b == 0));
}

#[test]
fn stop_closes_port_and_connections() {
    let node = Node::target(64);
    let (address, mut idle) = (node.address(), Raw::new(node.address()));
    let started = Instant::now();
    node.transport.shutdown(Duration::from_secs(10));
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(idle.rest(), b"");
    assert!(TcpStream::connect(address).is_err());
}
