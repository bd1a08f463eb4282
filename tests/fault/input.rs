//! Requests and registrations that are wrong: refused before anything is queued, by a variant that names the range.

use std::time::Duration;

use tidewire_engine::{
    TransferEngine,
    core::{ErrorClass, Location, Notify, Opcode, SegmentId, TaskState, TransferError, TransferRequest},
};

use super::target::{engine, request};

const LEN: usize = 1 << 20;
const LIMIT: Duration = Duration::from_secs(20);

struct Pair {
    near: TransferEngine,
    far: TransferEngine,
    source: tidewire_engine::Buffer,
    target: tidewire_engine::Buffer,
    segment: SegmentId,
}

fn pair(transports: &str) -> Pair {
    let (near, far) = (engine(transports), engine(transports));
    let source = near.allocate(LEN, Location::Any).unwrap();
    let target = far.allocate(LEN, Location::Any).unwrap();
    target.fill(0x11).unwrap();
    source.fill(0x22).unwrap();
    let segment = near.open_segment(far.segment_name()).unwrap();
    Pair { near, far, source, target, segment }
}

impl Pair {
    fn write(&self, source: u64, target: u64, length: u64) -> TransferRequest {
        request(Opcode::Write, source, self.segment, target, length)
    }

    /// Submits a good entry with a bad one and expects that neither is queued.
    fn refused(&self, bad: TransferRequest) -> TransferError {
        let batch = self.near.allocate_batch(4).unwrap();
        let good = self.write(self.source.addr(), self.target.addr(), 4096);
        let error = batch.submit(&[good, bad]).unwrap_err();
        assert_eq!(batch.status().tasks, 0, "nothing is queued with a bad entry");
        assert_eq!(error.class(), ErrorClass::InvalidArgument, "{error}");
        error
    }
}

const ALL: [&str; 4] = ["tcp", "shm,cma", "cma", "mooncake-tcp"];

#[test]
fn unregistered_source_is_refused_on_every_transport() {
    for transports in ALL {
        let pair = pair(transports);
        let stray = vec![0u8; 4096];
        let error = pair.refused(pair.write(stray.as_ptr() as u64, pair.target.addr(), 4096));
        assert!(matches!(error, TransferError::SourceNotRegistered { range } if range.len() == 4096), "{error}");
        // One byte beyond the end of the buffer counts as well.
        let error = pair.refused(pair.write(pair.source.addr() + 1, pair.target.addr(), LEN as u64));
        assert!(matches!(error, TransferError::SourceNotRegistered { .. }), "{error}");
    }
}

#[test]
fn empty_and_overflowing_ranges_are_refused() {
    let pair = pair("tcp");
    let error = pair.refused(pair.write(pair.source.addr(), pair.target.addr(), 0));
    assert!(matches!(error, TransferError::ZeroLength { .. }), "{error}");
    let error = pair.refused(pair.write(pair.source.addr(), u64::MAX - 8, 4096));
    assert!(matches!(error, TransferError::RangeOverflow { len: 4096, .. }), "{error}");
    let error = pair.refused(pair.write(u64::MAX - 8, pair.target.addr(), 4096));
    assert!(matches!(error, TransferError::RangeOverflow { .. }), "{error}");
}

#[test]
fn out_of_bounds_target_fails_that_entry_and_no_byte_is_written() {
    for transports in ALL {
        if transports == "cma" && crate::cma::skip("a target out of bounds") {
            continue;
        }
        let pair = pair(transports);
        let (from, to) = (pair.source.addr(), pair.target.addr());
        let end = to + LEN as u64;
        for bad in [(end - 100, 200), (end + (1 << 30), 64), (to - 1, 10)] {
            let batch = pair.near.allocate_batch(2).unwrap();
            batch.submit(&[pair.write(from, to, 4096), pair.write(from + 8192, bad.0, bad.1)]).unwrap();
            let status = batch.wait(LIMIT).unwrap();
            assert_eq!(status.state, TaskState::Failed, "{transports}");
            let error = batch.task_status(1).unwrap().error.unwrap();
            match &error {
                TransferError::OutOfBounds { segment, range, .. } => {
                    assert_eq!((segment.as_str(), range.addr()), (pair.far.segment_name(), bad.0));
                }
                other => panic!("{transports}: {other}"),
            }
        }
        let mut bytes = vec![0; LEN];
        pair.target.read_at(0, &mut bytes).unwrap();
        assert!(bytes[4096..].iter().all(|b| *b == 0x11), "{transports}: bytes of a refused entry were placed");
        // And the segment still works.
        pair.near.transfer_sync(&[pair.write(from, to, LEN as u64)], LIMIT).unwrap();
    }
}

#[test]
fn two_neighbouring_buffers_are_not_one() {
    let (near, far) = (engine("tcp"), engine("tcp"));
    let memory = vec![0x11u8; 8192];
    let source = near.allocate(8192, Location::Any).unwrap();
    register(&far, &memory[..4096]);
    register(&far, &memory[4096..]);
    let segment = near.open_segment(far.segment_name()).unwrap();
    let across = request(Opcode::Write, source.addr(), segment, memory.as_ptr() as u64 + 4000, 200);
    let error = near.transfer_sync(&[across], LIMIT).unwrap_err();
    assert!(matches!(error, TransferError::OutOfBounds { .. }), "{error}");
    far.shutdown(Duration::ZERO);
    assert!(memory.iter().all(|b| *b == 0x11));
}

fn register(engine: &TransferEngine, memory: &[u8]) {
    // SAFETY: callers keep `memory` until the engine is shut down and read it only then.
    unsafe { engine.register_memory(memory.as_ptr().cast_mut(), memory.len(), Location::Any) }.unwrap();
}

#[test]
fn bad_registrations_are_refused_by_name() {
    let engine = engine("tcp");
    let memory = vec![0u8; 8192];
    let addr = memory.as_ptr().cast_mut();
    register(&engine, &memory);
    // SAFETY: as in `register`; these calls are refused.
    let again = unsafe { engine.register_memory(addr, 8192, Location::Any) }.unwrap_err();
    assert!(matches!(again, TransferError::Overlap { .. }), "{again}");
    // SAFETY: the same.
    let inside = unsafe { engine.register_memory(addr.wrapping_add(4096), 8192, Location::Any) }.unwrap_err();
    assert!(matches!(inside, TransferError::Overlap { existing, .. } if existing.len() == 8192), "{inside}");
    // SAFETY: the same.
    let empty = unsafe { engine.register_memory(addr, 0, Location::Any) }.unwrap_err();
    assert!(matches!(empty, TransferError::ZeroLength { .. }), "{empty}");
    // SAFETY: the same.
    let huge = unsafe { engine.register_memory(addr, usize::MAX, Location::Any) }.unwrap_err();
    assert!(matches!(huge, TransferError::RangeOverflow { .. }), "{huge}");
    let unknown = engine.unregister_memory(addr as u64 + 1).unwrap_err();
    assert!(matches!(unknown, TransferError::NotRegistered { .. }), "{unknown}");
    engine.unregister_memory(addr as u64).unwrap();
    engine.unregister_memory(addr as u64).unwrap_err();
}

#[test]
fn unknown_segments_batches_and_peers_are_refused_by_name() {
    let pair = pair("tcp");
    let stray = request(Opcode::Read, pair.source.addr(), SegmentId(99), pair.target.addr(), 8);
    let error = pair.refused(stray);
    assert!(matches!(error, TransferError::UnknownSegment { segment: SegmentId(99) }), "{error}");
    let error = pair.near.open_segment("127.0.0.1:1").unwrap_err();
    assert_eq!(error.class(), ErrorClass::Metadata, "{error}");
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    let id = pair.near.allocate_batch(1).unwrap().id();
    let error = pair.near.batch(id).unwrap_err();
    assert!(matches!(error, TransferError::UnknownBatch { .. }), "{error}");
    let batch = pair.near.allocate_batch(1).unwrap();
    let good = pair.write(pair.source.addr(), pair.target.addr(), 8);
    let error = batch.submit(&[good, good]).unwrap_err();
    assert!(matches!(error, TransferError::BatchFull { capacity: 1, used: 0, requested: 2 }), "{error}");
    let empty = Notify { name: "n".into(), message: String::new() };
    let error = batch.submit_with_notify(&[good], empty).unwrap_err();
    assert!(matches!(error, TransferError::NotifyFailed { .. }), "{error}");
}

#[test]
fn a_shut_down_engine_refuses_work() {
    let pair = pair("tcp");
    let batch = pair.near.allocate_batch(1).unwrap();
    pair.near.shutdown(Duration::from_secs(1));
    let good = pair.write(pair.source.addr(), pair.target.addr(), 8);
    assert!(matches!(batch.submit(&[good]), Err(TransferError::ShutDown)));
    assert!(matches!(pair.near.allocate_batch(1), Err(TransferError::ShutDown)));
}
