//! What is refused, and that nothing is queued then; what statuses say.

use tidewire_engine::{
    BatchId, Location, Notify, SegmentId, TaskState, TransferError, TransferRequest, transport::fake::Step,
};

use crate::support::{LIMIT, SCRIPTED_LEN, Scripted, pattern, scripted, wait_until, write};

/// Submits a good entry followed by `bad` and gives the error; nothing may have reached the link.
fn refusal(scripted: &Scripted, bad: TransferRequest) -> TransferError {
    let batch = scripted.engine.allocate_batch(2).unwrap();
    let good = scripted.writes(1, 16)[0];
    let error = batch.submit(&[good, bad]).unwrap_err();
    assert_eq!(scripted.fake.submitted(), 0);
    assert_eq!((batch.status().tasks, batch.status().state), (0, TaskState::Completed));
    error
}

#[test]
fn unregistered_source_is_refused_before_anything_is_queued() {
    let s = scripted(|_| {});
    let outside = s.here.addr() + SCRIPTED_LEN as u64 - 8;
    let error = refusal(&s, write(outside, s.segment, s.there.addr(), 16));
    match error {
        TransferError::SourceNotRegistered { range } => assert_eq!((range.addr(), range.len()), (outside, 16)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn zero_length_is_refused_before_anything_is_queued() {
    let s = scripted(|_| {});
    let error = refusal(&s, write(s.here.addr(), s.segment, s.there.addr(), 0));
    assert_eq!(error, TransferError::ZeroLength { addr: s.here.addr() });
}

#[test]
fn overflowing_ranges_are_refused_before_anything_is_queued() {
    let s = scripted(|_| {});
    let error = refusal(&s, write(u64::MAX - 3, s.segment, s.there.addr(), 16));
    assert_eq!(error, TransferError::RangeOverflow { addr: u64::MAX - 3, len: 16 });
    let error = refusal(&s, write(s.here.addr(), s.segment, u64::MAX - 3, 16));
    assert_eq!(error, TransferError::RangeOverflow { addr: u64::MAX - 3, len: 16 });
}

#[test]
fn unknown_segment_is_refused_before_anything_is_queued() {
    let s = scripted(|_| {});
    let error = refusal(&s, write(s.here.addr(), SegmentId(77), s.there.addr(), 16));
    assert_eq!(error, TransferError::UnknownSegment { segment: SegmentId(77) });
    s.engine.close_segment(s.segment).unwrap();
    let error = s.engine.transfer_sync(&s.writes(1, 16), LIMIT).unwrap_err();
    assert_eq!(error, TransferError::UnknownSegment { segment: s.segment });
}

#[test]
fn more_entries_than_the_capacity_are_refused_as_a_whole() {
    let s = scripted(|_| {});
    let batch = s.engine.allocate_batch(3).unwrap();
    batch.submit(&s.writes(2, 16)).unwrap();
    let error = batch.submit(&s.writes(2, 16)).unwrap_err();
    assert_eq!(error, TransferError::BatchFull { capacity: 3, used: 2, requested: 2 });
    batch.submit(&s.writes(1, 16)).unwrap();
    assert_eq!(batch.wait(LIMIT).unwrap().tasks, 3);
}

#[test]
fn a_full_queue_is_refused_as_a_whole() {
    let s = scripted(|config| config.max_queued_slices = 4);
    s.fake.hold_all(Some(100));
    let batch = s.engine.allocate_batch(8).unwrap();
    batch.submit(&s.writes(3, 16)).unwrap();
    match batch.submit(&s.writes(2, 16)).unwrap_err() {
        TransferError::QueueFull { queued, limit, peer, .. } => {
            assert_eq!((queued, limit), (3, 4));
            assert_eq!(peer, s.peer.segment_name());
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(s.fake.held(), 3);
    batch.cancel();
}

#[test]
fn overlapping_registration_is_refused_and_leaves_nothing() {
    let s = scripted(|_| {});
    let mut memory = vec![0u8; 8192];
    let base = memory.as_mut_ptr();
    // SAFETY: the vector lives to the end of the test, after every registration of it.
    let result =
        unsafe { s.engine.register_memory_batch(&[(base, 4096), (base.wrapping_add(4095), 16)], Location::Any) };
    assert!(matches!(result, Err(TransferError::Overlap { .. })), "{result:?}");
    let none = s.engine.unregister_memory(base as u64);
    assert_eq!(none, Err(TransferError::NotRegistered { addr: base as u64 }));
    // SAFETY: as above.
    unsafe { s.engine.register_memory_batch(&[(base, 4096), (base.wrapping_add(4096), 16)], Location::Any) }.unwrap();
    s.engine.unregister_memory_batch(&[base as u64, base as u64 + 4096]).unwrap();
}

#[test]
fn each_entry_has_its_own_status() {
    let s = scripted(|_| {});
    s.fake.script([Step::Complete, Step::Fail(TransferError::ShutDown), Step::Complete, Step::DropToken]);
    let batch = s.engine.allocate_batch(4).unwrap();
    batch.submit(&s.writes(4, 100)).unwrap();
    let status = batch.wait(LIMIT).unwrap();
    assert_eq!((status.tasks, status.open_tasks, status.transferred_bytes), (4, 0, 200));
    assert_eq!(status.error, Some(TransferError::ShutDown));
    let states: Vec<_> = (0..4).map(|i| batch.task_status(i).unwrap().state).collect();
    use TaskState::{Cancelled, Completed};
    assert_eq!(states, [Completed, Cancelled, Completed, Cancelled]);
    assert!(batch.task_status(4).is_none());
}

#[test]
fn a_failed_slice_fails_its_entry_with_the_links_error() {
    let s = scripted(|_| {});
    let error = TransferError::Protocol { peer: "p".to_owned(), reason: "r".to_owned() };
    s.fake.script([Step::FailAfter { bytes: 10, error: error.clone() }]);
    assert_eq!(s.engine.transfer_sync(&s.writes(1, 100), LIMIT).unwrap_err(), error);
    assert_eq!(s.engine.transfer_sync(&s.writes(1, 100), LIMIT).unwrap().transferred_bytes, 100);
}

#[test]
fn slices_without_room_wait_and_go_on() {
    let s = scripted(|_| {});
    s.fake.hold_all(Some(3));
    let batch = s.engine.allocate_batch(20).unwrap();
    batch.submit(&s.writes(20, 512)).unwrap();
    assert_eq!(s.fake.held(), 3);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut released = 0;
            while released < 20 {
                let held = s.fake.held();
                s.fake.release(held);
                released += held;
                std::thread::yield_now();
            }
        });
        assert_eq!(batch.wait(LIMIT).unwrap().state, TaskState::Completed);
    });
    assert!(s.arrived(20 * 512) == pattern(SCRIPTED_LEN, 3)[..20 * 512]);
}

#[test]
fn an_id_outlives_its_handle_but_not_its_batch() {
    let s = scripted(|_| {});
    let id = s.engine.allocate_batch(2).unwrap().into_id();
    s.engine.batch(id).unwrap().submit(&s.writes(2, 16)).unwrap();
    assert_eq!(s.engine.batch(id).unwrap().wait(LIMIT).unwrap().tasks, 2);
    s.engine.free_batch(id).unwrap();
    let unknown = TransferError::UnknownBatch { batch: id.raw() };
    assert_eq!(s.engine.batch(id).unwrap_err(), unknown);
    assert_eq!(s.engine.free_batch(id).unwrap_err(), unknown);
    let next = s.engine.allocate_batch(1).unwrap();
    assert_ne!(next.id(), id);
    assert_eq!(next.id().index(), id.index());
    assert!(s.engine.batch(BatchId::new(9000, 1)).is_err());
}

#[test]
fn no_notification_after_a_failure() {
    let s = scripted(|_| {});
    s.fake.script([Step::Fail(TransferError::ShutDown)]);
    let batch = s.engine.allocate_batch(2).unwrap();
    let notify = Notify { name: "n".to_owned(), message: "m".to_owned() };
    batch.submit_with_notify(&s.writes(2, 16), notify.clone()).unwrap();
    assert_eq!(batch.wait(LIMIT).unwrap().error, Some(TransferError::ShutDown));
    s.engine.send_notify(s.segment, Notify { name: "n".to_owned(), message: "marker".to_owned() }).unwrap();
    let seen: Vec<_> = s.peer.take_notifications().into_iter().map(|notify| notify.message).collect();
    assert_eq!(seen, ["marker"]);
}

#[test]
fn a_notification_waits_for_the_last_slice() {
    let s = scripted(|_| {});
    s.fake.script([Step::Complete, Step::Hold]);
    let batch = s.engine.allocate_batch(2).unwrap();
    let notify = Notify { name: "n".to_owned(), message: "m".to_owned() };
    batch.submit_with_notify(&s.writes(2, 16), notify.clone()).unwrap();
    s.engine.send_notify(s.segment, Notify { name: "n".to_owned(), message: "before".to_owned() }).unwrap();
    let before: Vec<_> = s.peer.take_notifications().into_iter().map(|notify| notify.message).collect();
    assert_eq!((before, batch.status().state), (vec!["before".to_owned()], TaskState::Waiting));
    s.fake.release(1);
    assert_eq!(batch.wait(LIMIT).unwrap().state, TaskState::Completed);
    assert_eq!(s.peer.take_notifications(), [notify]);
}

#[test]
fn a_notification_that_is_not_delivered_is_the_batchs_error() {
    let s = scripted(|_| {});
    s.peer.shutdown(LIMIT);
    let batch = s.engine.allocate_batch(1).unwrap();
    let notify = Notify { name: "n".to_owned(), message: "m".to_owned() };
    batch.submit_with_notify(&s.writes(1, 16), notify).unwrap();
    let status = batch.wait(LIMIT).unwrap();
    assert!(matches!(status.error, Some(TransferError::NotifyFailed { .. })), "{status:?}");
    assert_eq!(batch.task_status(0).unwrap().state, TaskState::Completed);
}

#[test]
fn first_submits_share_one_attempt_to_connect() {
    let s = scripted(|_| {});
    std::thread::scope(|scope| {
        for i in 0..8 {
            let (s, request) = (&s, s.writes(8, 64)[i]);
            scope.spawn(move || s.engine.transfer_sync(&[request], LIMIT).unwrap());
        }
    });
    assert_eq!(s.engine.status().counters.links, 1);
    wait_until("nothing in flight", || s.engine.status().open_batches == 0);
}
