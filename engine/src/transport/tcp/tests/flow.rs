//! Checksums of a raw writer, the window of a stream, streams of a link.

use std::sync::mpsc;

use super::{
    faulty_target::{FaultyTarget, admit, request},
    *,
};

/// A write with a checksum, its payload flipped after the checksum was made if told so.
fn checked_write(end: &End, id: u64, payload: &[u8], flipped: bool) -> Vec<u8> {
    let mut bytes = frame(FrameKind::Write, id, &[(end.addr(), payload.len() as u64)], payload.len() as u64);
    let header = FrameHeader { checksum: true, ..FrameHeader::decode(&bytes).unwrap() };
    bytes[..HEADER_LEN].copy_from_slice(&header.encode());
    let body = bytes.len();
    bytes.extend_from_slice(payload);
    bytes.extend_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    if flipped {
        bytes[body + payload.len() / 2] ^= 0x10;
    }
    bytes
}

#[test]
fn a_flipped_payload_byte_is_answered_by_name_and_the_connection_goes_on() {
    let end = End::new(1 << 16, TcpOptions::default());
    let (mut socket, welcome) = end.raw(1, 1);
    assert_eq!(welcome.features & 1, 1, "checksums are on");
    let answer = |socket: &mut TcpStream| {
        let mut head = [0; HEADER_LEN];
        socket.read_exact(&mut head).unwrap();
        let header = FrameHeader::decode(&head).unwrap();
        (header.kind, header.id, header.entries_or_status)
    };
    // In one piece, in two, and longer than what is staged.
    for (id, len) in [(1, 100), (3, 40_000), (5, 60_000)] {
        let payload = vec![id as u8; len];
        let bytes = checked_write(&end, id, &payload, true);
        socket.write_all(&bytes[..60]).unwrap();
        socket.write_all(&bytes[60..]).unwrap();
        assert_eq!(answer(&mut socket), (FrameKind::WriteDone, id, 2));
        socket.write_all(&checked_write(&end, id + 1, &payload, false)).unwrap();
        assert_eq!(answer(&mut socket), (FrameKind::WriteDone, id + 1, 0));
        assert_eq!(std::hint::black_box(&end.memory)[..len], payload);
    }
    assert_eq!(end.transport.target_status().malformed, 0);
}

#[test]
fn a_target_that_does_not_answer_gets_one_window() {
    const WINDOW: u64 = 64 << 10;
    const FRAME: u32 = 16 << 10;
    let hour = Duration::from_secs(3600);
    let options = TcpOptions {
        streams: 1,
        window_bytes: WINDOW,
        frame_bytes: FRAME,
        heartbeat_interval: hour,
        heartbeat_timeout: hour,
        ..Default::default()
    };
    for opcode in [Opcode::Write, Opcode::Read] {
        let (told, heard) = mpsc::channel();
        let target = FaultyTarget::start(move |socket| {
            admit(socket)?;
            loop {
                let _ = told.send(request(socket)?.payload_len);
            }
        });
        let end = End::new(4 << 20, options.clone());
        let link = end.transport.connect(target.peer()).unwrap();
        let slices: Vec<_> = (0..256u64).map(|i| (end.addr() + i * 10_000, 0x10_0000, 10_000)).collect();
        let batch = start(&link, opcode, &slices);
        // Driven all the time: more would be sent if more were allowed.
        let how = Drive { deadline: Instant::now() + Duration::from_millis(700), spin: Duration::ZERO };
        assert!(!link.drive(&batch, how));
        let sent: u64 = heard.try_iter().sum();
        assert!(sent >= WINDOW, "{opcode:?}: the window was not used: {sent}");
        assert!(sent <= WINDOW + u64::from(FRAME), "{opcode:?}: {sent} bytes without an answer");
        assert_eq!(link.open_slices(), 256);
        link.close();
        assert!(batch.is_settled());
    }
}

#[test]
fn a_large_batch_takes_more_than_one_stream() {
    let options = TcpOptions { streams: 3, ..Default::default() };
    let (a, b, link) = pair(48 << 20, options);
    assert!(link.describe().starts_with("1 of 3 streams"), "{}", link.describe());
    let small = start(&link, Opcode::Write, &[(a.addr(), b.addr(), 4096)]);
    assert!(link.drive(&small, soon()));
    assert!(link.describe().starts_with("1 of 3 streams"), "one is enough: {}", link.describe());
    let ranges: Vec<_> = (0..48).map(|i| (a.addr() + (i << 20), b.addr() + (i << 20), 1 << 20)).collect();
    let large = start(&link, Opcode::Write, &ranges);
    assert!(link.drive(&large, soon()));
    assert_eq!(large.status().state, TaskState::Completed, "{:?}", large.status().error);
    let streams = link.describe();
    assert!(streams.starts_with("2 of 3 streams") || streams.starts_with("3 of 3 streams"), "{streams}");
    assert!(b.transport.target_status().connections > 1);
}
