//! The initiator against targets that break the protocol: a typed error that names the peer, in bounded time, and local
//! memory that nobody touches afterwards.

use tidewire_core::{ErrorClass, native::hello::Limits};

use super::{
    faulty_target::{FaultyTarget, PEER, admit, answer, hear, request, welcome},
    *,
};

/// Longest time any of these faults may take to be reported.
const BOUND: Duration = Duration::from_secs(5);
const LEN: u64 = 100_000;

type Answer = fn(&mut TcpStream, &FrameHeader) -> std::io::Result<()>;

fn options() -> TcpOptions {
    TcpOptions {
        streams: 1,
        connect_timeout: Duration::from_millis(500),
        heartbeat_interval: Duration::from_millis(100),
        heartbeat_timeout: Duration::from_millis(400),
        ..Default::default()
    }
}

fn refused(name: &str, script: impl Fn(&mut TcpStream) -> std::io::Result<()> + Send + 'static) -> TransferError {
    let (end, target) = (End::new(4096, options()), FaultyTarget::start(script));
    let started = Instant::now();
    let error = end.transport.connect(target.peer()).unwrap_err();
    assert!(started.elapsed() < BOUND, "{name}: {:?}", started.elapsed());
    assert!(error.to_string().contains(PEER), "{name}: {error}");
    error
}

#[test]
fn a_bad_welcome_is_refused_by_name() {
    let unreachable = |name: &str, expected: &str, bytes: Vec<u8>| {
        let error = refused(name, move |socket| {
            hear(socket)?;
            socket.write_all(&bytes)?;
            // What is missing never comes; the connection stays until the initiator gives up.
            socket.read(&mut [0; 1]).map(drop)
        });
        match &error {
            TransferError::Unreachable { reason, .. } => assert!(reason.contains(expected), "{name}: {reason}"),
            other => panic!("{name}: {other:?}"),
        }
    };
    let good = welcome().encode().to_vec();
    let mut flipped = good.clone();
    flipped[20] ^= 4;
    unreachable("garbage", "not a tidewire hello", b"HTTP/1.1 400 Bad Request\r\n".repeat(4));
    unreachable("zeroes", "not a tidewire hello", vec![0; HELLO_LEN]);
    unreachable("a flipped bit", "checksum", flipped);
    unreachable("half a welcome", "handshake", good[..40].to_vec());
    unreachable("silence", "handshake", Vec::new());
    let limits = welcome().limits;
    for limits in [
        Limits { entries: 0, ..limits },
        Limits { frame_bytes: 0, ..limits },
        Limits { open_frames: 0, ..limits },
        Limits { entries: 0, frame_bytes: 0, open_frames: 0, heartbeat_ms: 0 },
    ] {
        unreachable("a limit of zero", "limit of zero", Welcome { limits, ..welcome() }.encode().to_vec());
    }
    let short = Limits { frame_bytes: 10, ..limits };
    unreachable("frames too short", "too short", Welcome { limits: short, ..welcome() }.encode().to_vec());
    let closed = refused("closed", hear);
    assert!(matches!(closed, TransferError::Unreachable { .. }), "{closed:?}");
}

#[test]
fn a_refusal_keeps_its_reason() {
    use RefuseReason as R;
    for reason in [R::Version, R::Token, R::Generation, R::Limit, R::ShuttingDown, R::Unknown(77)] {
        let error = refused("refusal", move |socket| {
            hear(socket)?;
            socket.write_all(&Welcome { refused: Some(reason), ..welcome() }.encode())
        });
        match error {
            TransferError::HandshakeRefused { reason: seen, .. } => assert_eq!(seen, reason),
            other => panic!("{other:?}"),
        }
    }
}

/// Bad answers to the first request, each followed by bytes that must not reach anybody's memory.
const BAD_ANSWERS: [(&str, Answer); 10] = [
    ("an id nobody gave", |socket, to| {
        let id = to.id + 1;
        socket.write_all(&FrameHeader { id, ..answer(to) }.encode())
    }),
    ("too little data", |socket, to| {
        let payload_len = to.payload_len - 1;
        socket.write_all(&FrameHeader { kind: FrameKind::ReadData, payload_len, ..answer(to) }.encode())
    }),
    ("too much data", |socket, to| {
        let payload_len = to.payload_len + 1;
        socket.write_all(&FrameHeader { kind: FrameKind::ReadData, payload_len, ..answer(to) }.encode())
    }),
    ("an endless length", |socket, to| {
        let (kind, payload_len) = (FrameKind::ReadData, u64::MAX);
        socket.write_all(&FrameHeader { kind, payload_len, ..answer(to) }.encode())
    }),
    ("an unknown kind", |socket, to| {
        let mut bytes = answer(to).encode();
        bytes[0] = 0x7f;
        let crc = crc32c::crc32c(&bytes[..28]);
        bytes[28..].copy_from_slice(&crc.to_le_bytes());
        socket.write_all(&bytes)
    }),
    ("a header with a flipped bit", |socket, to| {
        let mut bytes = answer(to).encode();
        bytes[9] ^= 1;
        socket.write_all(&bytes)
    }),
    ("the answer of the other direction", |socket, to| {
        let other = if to.kind == FrameKind::Read { FrameKind::WriteDone } else { FrameKind::ReadData };
        socket.write_all(&FrameHeader { kind: other, ..answer(to) }.encode())
    }),
    ("a request", |socket, to| socket.write_all(&FrameHeader { kind: FrameKind::Write, ..answer(to) }.encode())),
    ("goodbye", |socket, _| {
        socket.write_all(&FrameHeader::bare(FrameKind::Goodbye, FrameStatus::ShuttingDown, 0).encode())
    }),
    ("a status nobody knows", |socket, to| {
        let (entries_or_status, payload_len) = (999, 0);
        socket.write_all(&FrameHeader { entries_or_status, payload_len, ..answer(to) }.encode())
    }),
];

/// One request against a target that answers it with `bad`.
fn one_request(name: &str, opcode: Opcode, detached: bool, bad: Answer) {
    let name = format!("{name}, {opcode:?}, detached: {detached}");
    let mut end = End::new(LEN as usize, options());
    let target = FaultyTarget::start(move |socket| {
        admit(socket)?;
        let header = request(socket)?;
        bad(socket, &header)?;
        socket.write_all(&[0xee; 1 << 16])?;
        socket.read(&mut [0; 1]).map(drop)
    });
    let link = end.transport.connect(target.peer()).unwrap();
    let started = Instant::now();
    let batch = start(&link, opcode, &[(end.addr(), 0x10_0000, LEN)]);
    if detached {
        link.detach();
        assert!(batch.park(started + BOUND), "{name}: not settled");
    } else {
        assert!(link.drive(&batch, soon()), "{name}: not settled");
    }
    assert!(started.elapsed() < BOUND, "{name}: {:?}", started.elapsed());
    let error = batch.status().error.unwrap_or_else(|| panic!("{name}: no error"));
    assert_eq!(error.class(), ErrorClass::PeerDown, "{name}: {error:?}");
    assert!(error.to_string().contains(PEER) && error.to_string().contains("faulty"), "{name}: {error}");
    assert_eq!((batch.task_status(0).unwrap().state, link.open_slices()), (TaskState::Failed, 0), "{name}");
    // The batch is over: whatever the target still sends goes nowhere.
    end.memory.fill(0x5a);
    drop(target);
    assert!(std::hint::black_box(&end.memory).iter().all(|byte| *byte == 0x5a), "{name}: touched after the end");
}

#[test]
fn a_bad_answer_fails_the_request_by_name() {
    for (name, bad) in BAD_ANSWERS {
        for opcode in [Opcode::Read, Opcode::Write] {
            for detached in [false, true] {
                one_request(name, opcode, detached, bad);
            }
        }
    }
}

#[test]
fn a_connection_that_ends_or_stalls_inside_the_payload_fails_the_request() {
    let closes: Answer = |socket, to| {
        socket.write_all(&answer(to).encode())?;
        socket.write_all(&vec![0xdd; LEN as usize / 2])?;
        Err(std::io::ErrorKind::ConnectionAborted.into())
    };
    let stalls: Answer = |socket, to| {
        socket.write_all(&answer(to).encode())?;
        socket.write_all(&vec![0xdd; LEN as usize / 2])?;
        socket.read_to_end(&mut Vec::new()).map(drop)
    };
    let says_nothing: Answer = |socket, _| socket.read_to_end(&mut Vec::new()).map(drop);
    for detached in [false, true] {
        one_request("closes", Opcode::Read, detached, closes);
        one_request("stalls", Opcode::Read, detached, stalls);
        one_request("says nothing", Opcode::Read, detached, says_nothing);
        one_request("says nothing", Opcode::Write, detached, says_nothing);
    }
}

#[test]
fn read_data_that_differs_from_its_checksum_is_named_and_the_connection_goes_on() {
    let target = FaultyTarget::start(|socket| {
        admit(socket)?;
        for flipped in [true, false, true] {
            let header = request(socket)?;
            assert!(header.checksum, "the initiator asks for a checksum");
            let mut data = vec![0x42; header.payload_len as usize];
            let crc = crc32c::crc32c(&data);
            if flipped {
                data[77] ^= 8;
            }
            socket.write_all(&[&answer(&header).encode()[..], &data, &crc.to_le_bytes()].concat())?;
        }
        socket.read(&mut [0; 1]).map(drop)
    });
    let end = End::new(LEN as usize, TcpOptions { checksum: true, ..options() });
    let link = end.transport.connect(target.peer()).unwrap();
    for flipped in [true, false, true] {
        let batch = start(&link, Opcode::Read, &[(end.addr(), 0x10_0000, LEN)]);
        assert!(link.drive(&batch, soon()));
        let status = batch.status();
        match (flipped, status.error) {
            (true, Some(TransferError::ChecksumMismatch { segment, peer, range })) => {
                assert_eq!((segment.as_str(), peer.as_str()), ("faulty", PEER));
                assert_eq!(range, ByteRange::new(0x10_0000, LEN).unwrap());
            }
            (false, None) => assert!(end.memory.iter().all(|byte| *byte == 0x42)),
            (_, other) => panic!("{other:?}"),
        }
    }
    assert_eq!(link.failure(), None);
    assert!(link.describe().ends_with("0 redials"), "{}", link.describe());
}

#[test]
fn a_target_that_finds_a_checksum_wrong_is_believed() {
    let target = FaultyTarget::start(|socket| {
        admit(socket)?;
        let header = request(socket)?;
        let entries_or_status = FrameStatus::Checksum.code();
        socket.write_all(&FrameHeader { entries_or_status, ..answer(&header) }.encode())?;
        socket.read(&mut [0; 1]).map(drop)
    });
    let end = End::new(LEN as usize, options());
    let link = end.transport.connect(target.peer()).unwrap();
    let batch = start(&link, Opcode::Write, &[(end.addr(), 0x10_0000, LEN)]);
    assert!(link.drive(&batch, soon()));
    let error = batch.status().error.unwrap();
    assert!(matches!(&error, TransferError::ChecksumMismatch { peer, .. } if peer == PEER), "{error:?}");
}
