//! Deadlines, cancellation, waiting in every form, shutdown.

use std::{
    future::Future,
    pin::pin,
    sync::{Arc, mpsc},
    task::{Context, Poll, Wake, Waker},
    thread::Thread,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tidewire_engine::{Notify, TaskState, TransferError, transport::fake::Step};

use crate::support::{LIMIT, scripted, wait_until};

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future on this thread; no runtime is needed.
fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let (mut future, mut context) = (pin!(future), Context::from_waker(&waker));
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        assert!(Instant::now() < deadline, "future is not ready");
        std::thread::park_timeout(LIMIT);
    }
}

#[test]
fn a_wait_that_times_out_ends_the_batch() {
    let s = scripted(|_| {});
    s.fake.hold_all(Some(100));
    let batch = s.engine.allocate_batch(4).unwrap();
    batch.submit(&s.writes(3, 64)).unwrap();
    let started = Instant::now();
    match batch.wait(Duration::from_millis(60)) {
        Err(TransferError::TimedOut { segment, timeout_ms, range, .. }) => {
            assert_eq!((segment.as_str(), timeout_ms), (s.peer.segment_name(), 60));
            assert_eq!(range.len(), 64);
        }
        other => panic!("{other:?}"),
    }
    assert!(started.elapsed() >= Duration::from_millis(60) && started.elapsed() < Duration::from_secs(2));
    assert_eq!((batch.status().state, batch.status().open_tasks), (TaskState::TimedOut, 0));
    assert_eq!(s.fake.held(), 0);
    assert_eq!(batch.submit(&s.writes(1, 64)), Err(TransferError::Cancelled));
    s.engine.unregister_memory(s.here.addr()).unwrap();
    assert!(s.arrived(192).iter().all(|byte| *byte == 0));
    assert_eq!(s.engine.status().counters.timeouts, 1);
}

#[test]
fn a_batch_without_progress_ends_with_nobody_waiting() {
    let s = scripted(|config| config.batch_timeout = Duration::from_millis(80));
    s.fake.hold_all(Some(100));
    let batch = s.engine.allocate_batch(2).unwrap();
    let started = Instant::now();
    batch.submit(&s.writes(2, 64)).unwrap();
    let status = block_on(batch.settled());
    assert_eq!(status.state, TaskState::TimedOut);
    assert!(started.elapsed() >= Duration::from_millis(80), "{:?}", started.elapsed());
}

#[test]
fn progress_restarts_the_deadline() {
    let s = scripted(|config| config.batch_timeout = Duration::from_millis(400));
    s.fake.hold_all(Some(100));
    let batch = s.engine.allocate_batch(6).unwrap();
    batch.submit(&s.writes(6, 64)).unwrap();
    let started = Instant::now();
    // One slice every 150 ms: together longer than the deadline, each step shorter.
    let (_keep, steps) = mpsc::channel::<()>();
    for _ in 0..6 {
        assert_eq!(steps.recv_timeout(Duration::from_millis(150)), Err(mpsc::RecvTimeoutError::Timeout));
        s.fake.release(1);
    }
    assert!(started.elapsed() > Duration::from_millis(800));
    assert_eq!(block_on(batch.settled()).state, TaskState::Completed);
}

#[test]
fn a_future_is_woken_by_the_last_slice() {
    let s = scripted(|_| {});
    s.fake.hold_all(Some(100));
    let batch = s.engine.allocate_batch(2).unwrap();
    batch.submit(&s.writes(2, 64)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            s.fake.release(1);
            s.fake.release(1);
        });
        assert_eq!(block_on(batch.settled()).state, TaskState::Completed);
    });
    assert_eq!(block_on(batch.settled()).tasks, 2);
}

#[test]
fn slices_without_room_go_on_with_nobody_waiting() {
    let s = scripted(|_| {});
    s.fake.hold_all(Some(2));
    let batch = s.engine.allocate_batch(9).unwrap();
    batch.submit(&s.writes(9, 64)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !batch.status().state.is_terminal() {
                s.fake.release(1);
                std::thread::yield_now();
            }
        });
        assert_eq!(block_on(batch.settled()).transferred_bytes, 9 * 64);
    });
}

#[test]
fn an_eventfd_is_readable_when_the_batch_is_settled() {
    let s = scripted(|_| {});
    s.fake.hold_all(Some(100));
    let batch = s.engine.allocate_batch(2).unwrap();
    batch.submit(&s.writes(1, 64)).unwrap();
    let event = batch.event_fd().unwrap();
    let readable = |limit: Duration| {
        let mut fds = [PollFd::new(&event, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::try_from(limit).unwrap())).unwrap() == 1
    };
    assert!(!readable(Duration::from_millis(20)));
    s.fake.release(1);
    assert!(readable(LIMIT));
    let mut count = [0; 8];
    assert_eq!(rustix::io::read(event, &mut count).unwrap(), 8);
    assert!(!readable(Duration::ZERO));
    batch.submit(&s.writes(1, 64)).unwrap();
    s.fake.release(1);
    assert!(readable(LIMIT));
}

#[test]
fn cancel_ends_what_is_open_and_keeps_what_is_done() {
    let s = scripted(|_| {});
    s.fake.script([Step::Complete, Step::Hold, Step::Hold]);
    let batch = s.engine.allocate_batch(3).unwrap();
    batch.submit(&s.writes(3, 64)).unwrap();
    batch.cancel();
    let states: Vec<_> = (0..3).map(|i| batch.task_status(i).unwrap().state).collect();
    assert_eq!(states, [TaskState::Completed, TaskState::Cancelled, TaskState::Cancelled]);
    assert_eq!((batch.status().state, s.fake.held()), (TaskState::Cancelled, 0));
}

#[test]
fn a_cancelled_batch_sends_no_notification() {
    let s = scripted(|_| {});
    s.fake.hold_all(Some(100));
    let batch = s.engine.allocate_batch(1).unwrap();
    batch.submit_with_notify(&s.writes(1, 64), Notify { name: "n".to_owned(), message: "m".to_owned() }).unwrap();
    batch.cancel();
    assert_eq!(batch.wait(LIMIT).unwrap().state, TaskState::Cancelled);
    assert_eq!(s.peer.take_notifications(), []);
}

#[test]
fn a_dropped_batch_goes_on_and_pins_its_memory() {
    let s = scripted(|_| {});
    s.fake.hold_all(Some(100));
    let batch = s.engine.allocate_batch(2).unwrap();
    batch.submit(&s.writes(2, 64)).unwrap();
    drop(batch);
    assert_eq!((s.fake.held(), s.engine.status().open_batches), (2, 1));
    s.fake.release(2);
    wait_until("the batch ends", || s.engine.status().open_batches == 0);
    assert!(s.arrived(128).iter().any(|byte| *byte != 0));
}

#[test]
fn unregistering_ends_what_uses_the_memory() {
    let s = scripted(|_| {});
    s.fake.hold_all(Some(100));
    let batch = s.engine.allocate_batch(2).unwrap();
    batch.submit(&s.writes(2, 64)).unwrap();
    s.engine.unregister_memory(s.here.addr()).unwrap();
    assert_eq!((s.fake.held(), batch.status().state), (0, TaskState::Cancelled));
    let refused = s.engine.transfer_sync(&s.writes(1, 64), LIMIT).unwrap_err();
    assert!(matches!(refused, TransferError::SourceNotRegistered { .. }));
}

#[test]
fn shutdown_drains_then_ends_then_refuses() {
    let s = scripted(|_| {});
    s.fake.hold_all(Some(100));
    let batch = s.engine.allocate_batch(2).unwrap();
    batch.submit(&s.writes(2, 64)).unwrap();
    let started = Instant::now();
    s.engine.shutdown(Duration::from_millis(100));
    assert!(started.elapsed() >= Duration::from_millis(100));
    assert_eq!((batch.status().state, s.fake.held()), (TaskState::Cancelled, 0));
    assert_eq!(batch.submit(&[]), Err(TransferError::ShutDown));
    assert!(matches!(s.engine.allocate_batch(1), Err(TransferError::ShutDown)));
    assert!(matches!(s.engine.open_segment("127.0.0.1:1"), Err(TransferError::ShutDown)));
    assert!(matches!(s.engine.allocate(64, tidewire_engine::Location::Any), Err(TransferError::ShutDown)));
}

#[test]
fn shutdown_lets_a_batch_end() {
    let s = scripted(|_| {});
    s.fake.hold_all(Some(100));
    let batch = s.engine.allocate_batch(1).unwrap();
    batch.submit(&s.writes(1, 64)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| s.engine.shutdown(LIMIT));
        wait_until("the gate is closed", || s.engine.allocate_batch(1).is_err());
        s.fake.release(1);
    });
    assert_eq!(batch.status().state, TaskState::Completed);
}

#[test]
fn an_idle_engine_sleeps() {
    let s = scripted(|_| {});
    s.engine.transfer_sync(&s.writes(1, 64), LIMIT).unwrap();
    let (_keep, silence) = mpsc::channel::<()>();
    let ticks = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let of = |entry: std::io::Result<std::fs::DirEntry>| {
            let path = entry.ok()?.path();
            let name = std::fs::read_to_string(path.join("comm")).ok()?;
            let status = std::fs::read_to_string(path.join("status")).ok()?;
            let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches"))?;
            (name.trim() == "tw-tick").then(|| line.split_whitespace().nth(1)?.parse::<u64>().ok()).flatten()
        };
        tasks.filter_map(of).collect::<Vec<_>>()
    };
    // Other tests of this process have tickers too; ours is asleep when at least one does not move.
    let before = ticks();
    assert_eq!(silence.recv_timeout(Duration::from_millis(200)), Err(mpsc::RecvTimeoutError::Timeout));
    let after = ticks();
    assert!(before.iter().any(|count| after.contains(count)), "{before:?} {after:?}");
}
