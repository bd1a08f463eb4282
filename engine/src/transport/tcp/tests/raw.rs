//! The target side against raw connections: refused, malformed, half sent, fenced.

use std::net::Shutdown;

use super::*;

#[test]
fn another_protocol_version_is_refused_by_name() {
    let end = End::new(4096, TcpOptions::default());
    let mut socket = TcpStream::connect(("127.0.0.1", end.transport.port())).unwrap();
    let hello = Hello {
        oldest: 9,
        newest: 12,
        features: 0,
        token: TOKEN,
        generation: GENERATION,
        session: 1,
        stream: 0,
        attempt: 1,
    };
    socket.write_all(&hello.encode()).unwrap();
    let mut answer = [0; HELLO_LEN];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(Welcome::decode(&answer).unwrap().refused, Some(RefuseReason::Version));
    assert_eq!(socket.read(&mut answer).unwrap(), 0, "closed after the refusal");
}

#[test]
fn garbage_and_malformed_frames_close_only_their_connection() {
    let (a, b, link) = pair(1 << 16, TcpOptions::default());
    let mut noise = TcpStream::connect(("127.0.0.1", b.transport.port())).unwrap();
    noise
        .write_all(b"GET / HTTP/1.1\r\nHost: example\r\n\r\nxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx")
        .unwrap();
    let mut rest = Vec::new();
    let _ = noise.read_to_end(&mut rest);
    assert!(rest.is_empty(), "a stranger gets no answer");

    let too_long = frame(FrameKind::Write, 1, &[(b.addr(), 8)], 1 << 40);
    let sum = frame(FrameKind::Write, 1, &[(b.addr(), 8)], 9);
    let mut flipped = frame(FrameKind::Read, 1, &[(b.addr(), 8)], 8);
    flipped[40] ^= 1;
    let wrong_way = FrameHeader::bare(FrameKind::WriteDone, FrameStatus::Done, 4).encode().to_vec();
    for (session, bytes) in [too_long, sum, flipped, wrong_way].into_iter().enumerate() {
        let (mut socket, _) = b.raw(1000 + session as u64, 1);
        socket.write_all(&bytes).unwrap();
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        let header = FrameHeader::decode(&answer).unwrap();
        assert_eq!((header.kind, header.status()), (FrameKind::Goodbye, FrameStatus::Malformed));
    }
    assert_eq!(b.transport.target_status().malformed, 4);

    let batch = start(&link, Opcode::Write, &[(a.addr(), b.addr(), 100)]);
    assert!(link.drive(&batch, soon()));
    assert_eq!(batch.status().state, TaskState::Completed);
}

#[test]
fn a_half_sent_hello_times_out() {
    let options = TcpOptions { hello_timeout: Duration::from_millis(200), ..Default::default() };
    let end = End::new(4096, options);
    let mut socket = TcpStream::connect(("127.0.0.1", end.transport.port())).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket.write_all(b"TIDEWIRE").unwrap();
    let mut answer = [0; 1];
    assert_eq!(socket.read(&mut answer).unwrap(), 0);
}

#[test]
fn a_newer_attempt_fences_the_older_one() {
    let end = End::new(1 << 16, TcpOptions::default());
    let (mut old, welcome) = end.raw(5, 1);
    assert_eq!(welcome.refused, None);
    // Half a write: header and table, 10 of 100 bytes.
    let mut half = frame(FrameKind::Write, 1, &[(end.addr(), 100)], 100);
    half.extend_from_slice(&[1; 10]);
    old.write_all(&half).unwrap();
    let (_new, welcome) = end.raw(5, 2);
    assert_eq!(welcome.refused, None);
    let before = end.memory.clone();
    let _ = old.write_all(&[1; 90]);
    let _ = old.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = old.read_to_end(&mut answer);
    assert!(answer.is_empty(), "the fenced write is not answered");
    assert_eq!(end.memory, before, "nothing is placed after the fence");

    // An older attempt that arrives late gets no entry.
    let mut late = TcpStream::connect(("127.0.0.1", end.transport.port())).unwrap();
    let hello = Hello {
        oldest: 1,
        newest: 1,
        features: 0,
        token: TOKEN,
        generation: GENERATION,
        session: 5,
        stream: 0,
        attempt: 1,
    };
    late.write_all(&hello.encode()).unwrap();
    let mut answer = Vec::new();
    let _ = late.read_to_end(&mut answer);
    assert!(answer.is_empty());
}

#[test]
fn unregister_ends_a_half_sent_write_and_leaves_the_memory_alone() {
    let end = End::new(1 << 16, TcpOptions::default());
    let (mut writer, _) = end.raw(6, 1);
    let mut half = frame(FrameKind::Write, 1, &[(end.addr(), 1000)], 1000);
    half.extend_from_slice(&[1; 10]);
    writer.write_all(&half).unwrap();
    // The target has the frame once its pin blocks a short unregister.
    let deadline = Instant::now() + Duration::from_secs(10);
    let region = end.regions.at(end.addr()).unwrap();
    loop {
        if std::hint::black_box(&end.memory)[9] == 1 {
            break;
        }
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    let transport = Arc::clone(&end.transport);
    let evict = |region: &Arc<LocalRegion>| transport.evict(region, Duration::from_secs(1));
    end.regions.unregister(end.addr(), Duration::from_millis(100), evict).unwrap();
    assert!(region.pin().is_none());
    let before = end.memory.clone();
    let _ = writer.write_all(&[2; 990]);
    let mut answer = Vec::new();
    let _ = writer.read_to_end(&mut answer);
    assert_eq!(end.memory, before);
}
