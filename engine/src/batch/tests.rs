//! Accounting of a batch alone: no transport, tokens settled by hand.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::{
    sync::atomic::AtomicBool,
    task::Wake,
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, eventfd};
use tidewire_core::Location;

use super::*;
use crate::memory::RegionTable;

/// Counts how often it ran, and keeps its token if told so.
#[derive(Clone, Default)]
struct Closing {
    runs: Arc<AtomicUsize>,
    held: Arc<Mutex<Option<ClosingToken>>>,
}

impl Closing {
    fn step(&self) -> Option<ClosingStep> {
        let Closing { runs, held } = self.clone();
        Some(Box::new(move |token| {
            runs.fetch_add(1, Ordering::SeqCst);
            *lock(&held) = Some(token);
        }))
    }

    fn runs(&self) -> usize {
        self.runs.load(Ordering::SeqCst)
    }

    fn take(&self) -> ClosingToken {
        lock(&self.held).take().unwrap()
    }
}

#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// One submit of entries with that many slices of `len` bytes.
fn begin(batch: &Arc<BatchCore>, slices: &[u32], len: u64) -> Vec<SliceToken> {
    let submit = batch.begin(slices, vec![], None).unwrap();
    tokens(&submit, slices, len)
}

fn tokens(submit: &Submit, slices: &[u32], len: u64) -> Vec<SliceToken> {
    let entries = slices.iter().enumerate();
    entries.flat_map(|(index, count)| (0..*count).map(move |_| submit.token(index, len))).collect()
}

fn soon(ms: u64) -> Instant {
    Instant::now() + Duration::from_millis(ms)
}

fn failure() -> TransferError {
    TransferError::Internal { reason: "made by a test" }
}

#[test]
fn a_batch_settles_with_its_last_slice() {
    let batch = BatchCore::new(4);
    assert!(batch.is_settled());
    let submit = batch.begin(&[2, 1], vec![], None).unwrap();
    let mut open = tokens(&submit, &[2, 1], 10);
    assert_eq!((batch.capacity(), batch.used()), (4, 2));
    while let Some(token) = open.pop() {
        assert!(!batch.is_settled());
        token.complete();
    }
    assert!(!batch.is_settled(), "the submit is not over");
    drop(submit);
    assert!(batch.is_settled());
    let status = batch.status();
    assert_eq!((status.state, status.tasks, status.open_tasks), (TaskState::Completed, 2, 0));
    assert_eq!((status.transferred_bytes, batch.bytes_settled()), (30, 30));
}

#[test]
fn tasks_have_a_state_of_their_own() {
    let batch = BatchCore::new(4);
    let mut open = begin(&batch, &[1, 2, 1], 7);
    let last = open.pop().unwrap();
    open.pop().unwrap().fail(failure());
    let state = |index| batch.task_status(index).map(|status| (status.state, status.transferred_bytes));
    assert_eq!(state(1), Some((TaskState::Waiting, 0)), "one slice of it is open");
    open.pop().unwrap().complete();
    assert_eq!(state(1), Some((TaskState::Failed, 7)));
    open.pop().unwrap().complete();
    assert_eq!(state(0), Some((TaskState::Completed, 7)));
    assert_eq!(state(2), Some((TaskState::Waiting, 0)));
    assert_eq!(state(3), None, "never submitted");
    assert_eq!(state(4), None, "beyond the capacity");
    assert_eq!((batch.status().state, batch.status().open_tasks), (TaskState::Waiting, 1));
    last.complete();
    assert_eq!((batch.status().state, batch.status().error), (TaskState::Failed, Some(failure())));
}

#[test]
fn a_dropped_token_cancels_its_slice() {
    let batch = BatchCore::new(1);
    let mut open = begin(&batch, &[2], 5);
    drop(open.pop());
    assert!(!batch.is_settled());
    open.pop().unwrap().complete();
    let status = batch.task_status(0).unwrap();
    assert_eq!((status.state, status.transferred_bytes), (TaskState::Cancelled, 5));
    assert_eq!((batch.status().state, batch.status().error), (TaskState::Cancelled, Some(TransferError::Cancelled)));
}

#[test]
fn the_first_error_stays() {
    let batch = BatchCore::new(2);
    let mut open = begin(&batch, &[2, 1], 5);
    open.pop().unwrap().fail(TransferError::ShutDown);
    open.pop().unwrap().fail(failure());
    drop(open);
    assert_eq!(batch.status().error, Some(TransferError::ShutDown));
    assert_eq!(batch.task_status(0).unwrap().error, Some(failure()));
    assert_eq!(batch.task_status(1).unwrap().error, Some(TransferError::ShutDown));
}

#[test]
fn a_full_batch_takes_nothing_and_stays_as_it_was() {
    let batch = BatchCore::new(2);
    let open = begin(&batch, &[1], 1);
    let refused = batch.begin(&[1, 1], vec![], None).unwrap_err();
    assert_eq!(refused, TransferError::BatchFull { capacity: 2, used: 1, requested: 2 });
    assert_eq!(batch.used(), 1);
    open.into_iter().for_each(SliceToken::complete);
    assert_eq!(batch.status().state, TaskState::Completed);
}

#[test]
fn the_closing_step_runs_once_after_the_last_slice() {
    let (batch, closing) = (BatchCore::new(2), Closing::default());
    let submit = batch.begin(&[1, 1], vec![], closing.step()).unwrap();
    let mut open = tokens(&submit, &[1, 1], 1);
    drop(submit);
    open.pop().unwrap().complete();
    assert_eq!(closing.runs(), 0);
    open.pop().unwrap().complete();
    assert_eq!((closing.runs(), batch.is_settled()), (1, false));
    assert_eq!(batch.status().state, TaskState::Waiting);
    closing.take().done();
    assert_eq!((closing.runs(), batch.status().state), (1, TaskState::Completed));
}

#[test]
fn no_closing_step_after_a_failure() {
    for fail in [true, false] {
        let (batch, closing) = (BatchCore::new(1), Closing::default());
        let submit = batch.begin(&[2], vec![], closing.step()).unwrap();
        let mut open = tokens(&submit, &[2], 1);
        drop(submit);
        match fail {
            true => open.pop().unwrap().fail(failure()),
            false => drop(open.pop()),
        }
        open.pop().unwrap().complete();
        assert_eq!((closing.runs(), batch.is_settled()), (0, true));
        assert!(batch.status().error.is_some());
    }
}

#[test]
fn a_closing_step_that_fails_or_gets_lost_fails_the_batch() {
    for (lost, expected) in [(false, failure()), (true, TransferError::Cancelled)] {
        let (batch, closing) = (BatchCore::new(1), Closing::default());
        let submit = batch.begin(&[1], vec![], closing.step()).unwrap();
        tokens(&submit, &[1], 1).into_iter().for_each(SliceToken::complete);
        drop(submit);
        match lost {
            true => drop(closing.take()),
            false => closing.take().fail(failure()),
        }
        assert_eq!(batch.status().error, Some(expected));
        assert_eq!(batch.task_status(0).unwrap().state, TaskState::Completed, "the slice itself was done");
    }
}

#[test]
fn a_nudge_before_the_park_is_not_lost_and_counts_once() {
    let batch = BatchCore::new(1);
    let open = begin(&batch, &[1], 1);
    batch.nudge();
    let started = Instant::now();
    assert!(!batch.park(soon(20_000)));
    assert!(started.elapsed() < Duration::from_secs(10), "the nudge was kept");
    let started = Instant::now();
    assert!(!batch.park(soon(50)));
    assert!(started.elapsed() >= Duration::from_millis(50), "the nudge was used up");
    open.into_iter().for_each(SliceToken::complete);
    assert!(batch.park(soon(0)));
}

#[test]
fn a_parked_thread_wakes_by_nudge_and_by_the_last_slice() {
    let batch = BatchCore::new(1);
    let mut open = begin(&batch, &[1], 1);
    std::thread::scope(|scope| {
        for settle in [false, true] {
            let waiter = scope.spawn(|| batch.park(soon(20_000)));
            let deadline = soon(10_000);
            while lock(&batch.inner).parked == 0 {
                assert!(Instant::now() < deadline);
                std::thread::yield_now();
            }
            match settle {
                true => open.pop().unwrap().complete(),
                false => batch.nudge(),
            }
            assert_eq!(waiter.join().unwrap(), settle);
        }
    });
}

#[test]
fn a_nudge_is_left_for_whoever_parks_to_drive() {
    let batch = BatchCore::new(1);
    let open = begin(&batch, &[1], 1);
    batch.nudge();
    assert!(!batch.park_settled(soon(30)), "not ended by the nudge, but by its deadline");
    let started = Instant::now();
    assert!(!batch.park(soon(20_000)));
    assert!(started.elapsed() < Duration::from_secs(10), "the nudge was left");
    open.into_iter().for_each(SliceToken::complete);
    assert!(batch.park_settled(soon(0)));
}

#[test]
fn the_event_is_written_when_the_batch_settles() {
    let event = || File::from(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap());
    let count = |file: &File| {
        let mut bytes = [0; 8];
        rustix::io::read(file, &mut bytes).map(|_| u64::from_ne_bytes(bytes)).unwrap_or(0)
    };
    let batch = BatchCore::new(3);
    let first = event();
    batch.set_event(first.try_clone().unwrap());
    assert_eq!(count(&first), 0, "nothing was submitted");
    let mut open = begin(&batch, &[2], 1);
    open.pop().unwrap().complete();
    assert_eq!(count(&first), 0);
    drop(open);
    assert_eq!(count(&first), 1);
    let late = event();
    batch.set_event(late.try_clone().unwrap());
    assert_eq!(count(&late), 1, "settled already");
    begin(&batch, &[1], 1).into_iter().for_each(SliceToken::complete);
    assert_eq!((count(&late), count(&first)), (1, 0));
}

#[test]
fn a_future_is_woken_when_the_batch_settles() {
    let (batch, flag) = (BatchCore::new(1), Arc::new(Flag::default()));
    let waker = Waker::from(Arc::clone(&flag));
    let open = begin(&batch, &[1], 1);
    assert_eq!(batch.poll_settled(&waker), Poll::Pending);
    assert_eq!(batch.poll_settled(&waker), Poll::Pending);
    assert_eq!(lock(&batch.inner).wakers.len(), 1, "the same waker is kept once");
    open.into_iter().for_each(SliceToken::complete);
    assert!(flag.0.load(Ordering::SeqCst));
    assert_eq!(batch.poll_settled(&waker), Poll::Ready(()));
}

#[test]
fn eight_threads_settle_every_slice_once() {
    const THREADS: u32 = 8;
    for round in 0..500u32 {
        let (batch, closing) = (BatchCore::new(THREADS as usize), Closing::default());
        let slices = [3; THREADS as usize];
        let submit = batch.begin(&slices, vec![], closing.step()).unwrap();
        let failing = round % 2 == 1;
        let ready = std::sync::Barrier::new(THREADS as usize + 1);
        std::thread::scope(|scope| {
            for index in 0..THREADS {
                let (submit, ready) = (&submit, &ready);
                scope.spawn(move || {
                    let own: Vec<_> = (0..3).map(|_| submit.token(index as usize, 2)).collect();
                    ready.wait();
                    for (nth, token) in own.into_iter().enumerate() {
                        match (failing && index == round % THREADS, nth) {
                            (true, 0) => token.fail(failure()),
                            (true, 1) => drop(token),
                            _ => token.complete(),
                        }
                    }
                });
            }
            ready.wait();
        });
        drop(submit);
        assert_eq!(closing.runs(), usize::from(!failing), "round {round}");
        if !failing {
            assert!(!batch.is_settled());
            closing.take().done();
        }
        assert!(batch.is_settled());
        assert_eq!(batch.open.load(Ordering::SeqCst), 0);
        let status = batch.status();
        assert_eq!((status.open_tasks, status.transferred_bytes), (0, if failing { 44 } else { 48 }));
        assert_eq!(status.error, failing.then(failure));
    }
}

#[test]
fn pins_go_with_the_last_slice() {
    let (table, memory) = (RegionTable::default(), vec![0u8; 64]);
    let region = table.register(memory.as_ptr() as u64, 64, Location::Any, None).unwrap();
    let batch = BatchCore::new(1);
    let submit = batch.begin(&[1], vec![region.pin().unwrap()], None).unwrap();
    let token = submit.token(0, 1);
    drop(submit);
    assert!(batch.holds(&region));
    token.complete();
    assert!(!batch.holds(&region));
}

#[test]
fn a_submit_right_after_the_end_of_the_one_before_keeps_its_pins() {
    const ROUNDS: usize = 4000;
    let (table, memory) = (RegionTable::default(), vec![0u8; 64]);
    let region = table.register(memory.as_ptr() as u64, 64, Location::Any, None).unwrap();
    let batch = BatchCore::new(2 * ROUNDS);
    let (to_settle, tokens) = std::sync::mpsc::channel::<SliceToken>();
    let (done, settled) = std::sync::mpsc::channel();
    let settler = std::thread::spawn(move || {
        for token in tokens {
            token.complete();
            done.send(()).unwrap();
        }
    });
    for round in 0..ROUNDS {
        let submit = batch.begin(&[1], vec![region.pin().unwrap()], None).unwrap();
        let first = submit.token(0, 1);
        drop(submit);
        to_settle.send(first).unwrap();
        // The count is zero before the settling thread is done with the batch.
        while !batch.is_settled() {
            std::hint::spin_loop();
        }
        let submit = batch.begin(&[1], vec![region.pin().unwrap()], None).unwrap();
        let second = submit.token(0, 1);
        drop(submit);
        settled.recv().unwrap();
        assert!(batch.holds(&region), "round {round}: a slice is open");
        second.complete();
        assert!(!batch.holds(&region), "round {round}");
    }
    drop(to_settle);
    settler.join().unwrap();
}
