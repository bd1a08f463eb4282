//! Two engines in one process move bytes over TCP.

use std::time::Duration;

use tidewire_engine::{
    Buffer, Config, Location, Notify, Opcode, SegmentId, TaskState, TransferEngine, TransferError, TransferRequest,
    TransportKind,
};

const LIMIT: Duration = Duration::from_secs(10);

fn engine() -> TransferEngine {
    TransferEngine::builder("127.0.0.1").config(Config::default()).transports(&[TransportKind::Tcp]).build().unwrap()
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8).wrapping_add(seed)).collect()
}

fn buffer(engine: &TransferEngine, len: usize) -> Buffer {
    engine.allocate(len, Location::Cpu(0)).unwrap()
}

fn request(opcode: Opcode, source: u64, target: SegmentId, target_offset: u64, length: u64) -> TransferRequest {
    TransferRequest { opcode, source, target, target_offset, length }
}

#[test]
fn written_bytes_are_read_back() {
    let (target, initiator) = (engine(), engine());
    let (there, here) = (buffer(&target, 3 << 20), buffer(&initiator, 6 << 20));
    let len = 3 << 20;
    let bytes = pattern(len, 1);
    here.write_at(0, &bytes).unwrap();
    let segment = initiator.open_segment(target.segment_name()).unwrap();
    initiator.transfer_sync(&[request(Opcode::Write, here.addr(), segment, there.addr(), len as u64)], LIMIT).unwrap();
    let mut seen = vec![0; len];
    there.read_at(0, &mut seen).unwrap();
    assert!(seen == bytes);
    let back = here.addr() + len as u64;
    initiator.transfer_sync(&[request(Opcode::Read, back, segment, there.addr(), len as u64)], LIMIT).unwrap();
    here.read_at(len, &mut seen).unwrap();
    assert!(seen == bytes);
    let info = initiator.segment_info(segment).unwrap();
    assert_eq!(info.transport, Some(TransportKind::Tcp));
    assert_eq!(info.generation, target.generation().to_string());
    assert!(info.reason.contains("shm"), "{}", info.reason);
}

#[test]
fn notification_comes_after_the_bytes() {
    let (target, initiator) = (engine(), engine());
    let (there, here) = (buffer(&target, 1 << 20), buffer(&initiator, 1 << 20));
    here.fill(7).unwrap();
    let segment = initiator.open_segment(target.segment_name()).unwrap();
    let batch = initiator.allocate_batch(4).unwrap();
    let notify = Notify { name: "me".to_owned(), message: "done".to_owned() };
    let requests: Vec<_> = (0..4u64)
        .map(|i| request(Opcode::Write, here.addr() + i * 1000, segment, there.addr() + i * 1000, 1000))
        .collect();
    batch.submit_with_notify(&requests, notify.clone()).unwrap();
    let status = batch.wait(LIMIT).unwrap();
    assert_eq!((status.state, status.tasks, status.transferred_bytes), (TaskState::Completed, 4, 4000));
    let mut seen = vec![0; 4000];
    there.read_at(0, &mut seen).unwrap();
    assert!(seen.iter().all(|b| *b == 7));
    assert_eq!(target.take_notifications(), [notify]);
    assert_eq!(target.take_notifications(), []);
}

#[test]
fn out_of_bounds_is_refused_by_the_target_with_names() {
    let (target, initiator) = (engine(), engine());
    let (there, here) = (buffer(&target, 4096), buffer(&initiator, 8192));
    let segment = initiator.open_segment(target.segment_name()).unwrap();
    let wrong = request(Opcode::Write, here.addr(), segment, there.addr() + 1, 8000);
    match initiator.transfer_sync(&[wrong], LIMIT) {
        Err(TransferError::OutOfBounds { segment, .. }) => assert_eq!(segment, target.segment_name()),
        other => panic!("{other:?}"),
    }
}
