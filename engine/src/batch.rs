//! Accounting of a batch: every slice settles exactly once, the last one wakes the waiter.
//!
//! A [`SliceToken`] is the duty to settle one slice; it is consumed by [`SliceToken::complete`] or [`SliceToken::fail`],
//! and dropping it settles the slice as cancelled. The pins of the local memory live in the batch until the last slice is
//! settled. A batch may carry a closing step (its notification): it runs once, after the last slice, if none failed.
//!
//! Invariants:
//! * completion of a batch means every byte of every entry is in place, and the closing step is done;
//! * the first error of a task, and of the batch, is kept; later ones are dropped;
//! * after the count reached zero no transport holds an address of the batch's local memory.

use std::{
    fmt,
    fs::File,
    io::Write,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Poll, Waker},
    time::Instant,
};

use tidewire_core::{BatchStatus, ErrorClass, TaskState, TaskStatus, TransferError};

use crate::memory::{LocalRegion, RegionPin, lock};

/// Bit of [`BatchCore::open`] that stands for the closing step.
const CLOSING: usize = 1 << (usize::BITS - 2);

/// What runs after the last slice of a batch; it owns the token that ends the batch.
pub type ClosingStep = Box<dyn FnOnce(ClosingToken) + Send>;

/// Shared state of one batch.
pub struct BatchCore {
    tasks: Box<[Task]>,
    used: AtomicUsize,
    /// Slices not settled, plus submits in progress, plus [`CLOSING`].
    open: AtomicUsize,
    bytes_done: AtomicU64,
    inner: Mutex<Inner>,
    wake: Condvar,
}

#[derive(Default)]
struct Inner {
    pins: Vec<RegionPin>,
    error: Option<TransferError>,
    closing: Option<ClosingStep>,
    wakers: Vec<Waker>,
    parked: usize,
    nudged: bool,
    event: Option<File>,
}

#[derive(Default)]
struct Task {
    open: AtomicU32,
    bytes_done: AtomicU64,
    error: Mutex<Option<TransferError>>,
}

impl fmt::Debug for BatchCore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BatchCore")
            .field("used", &self.used.load(Ordering::Relaxed))
            .field("open", &self.open.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

impl BatchCore {
    /// A batch for at most `capacity` entries.
    pub fn new(capacity: usize) -> Arc<Self> {
        Arc::new(BatchCore {
            tasks: (0..capacity).map(|_| Task::default()).collect(),
            used: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            bytes_done: AtomicU64::new(0),
            inner: Mutex::new(Inner::default()),
            wake: Condvar::new(),
        })
    }

    /// Entries the batch was made for.
    pub fn capacity(&self) -> usize {
        self.tasks.len()
    }

    /// Entries submitted so far.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Acquire)
    }

    /// Whether nothing is in flight.
    pub fn is_settled(&self) -> bool {
        // Acquire pairs with the AcqRel of `release`: who sees zero sees the bytes of every slice.
        self.open.load(Ordering::Acquire) == 0
    }

    /// Bytes of settled slices.
    pub fn bytes_settled(&self) -> u64 {
        self.bytes_done.load(Ordering::Acquire)
    }

    /// Whether the batch holds a pin of `region`.
    pub fn holds(&self, region: &Arc<LocalRegion>) -> bool {
        lock(&self.inner).pins.iter().any(|pin| Arc::ptr_eq(pin.region(), region))
    }

    /// Opens a submit of the given numbers of slices per new task; the batch cannot settle before the guard is dropped.
    ///
    /// `pins` hold the local memory of these tasks until the batch settles. Concurrent submits to one batch are the
    /// caller's to exclude.
    ///
    /// # Errors
    /// [`TransferError::BatchFull`]; nothing is changed then.
    pub fn begin(
        self: &Arc<Self>,
        slices_per_task: &[u32],
        pins: Vec<RegionPin>,
        closing: Option<ClosingStep>,
    ) -> Result<Submit, TransferError> {
        let first = self.used.load(Ordering::Relaxed);
        let last = first + slices_per_task.len();
        if last > self.tasks.len() {
            let (capacity, requested) = (self.tasks.len(), slices_per_task.len());
            return Err(TransferError::BatchFull { capacity, used: first, requested });
        }
        let mut slices = 0;
        for (task, count) in self.tasks.iter().skip(first).zip(slices_per_task) {
            task.open.store(*count, Ordering::Relaxed);
            slices += *count as usize;
        }
        {
            let mut inner = lock(&self.inner);
            inner.pins.extend(pins);
            let bit = if closing.is_some() && inner.closing.is_none() { CLOSING } else { 0 };
            if closing.is_some() {
                inner.closing = closing;
            }
            self.open.fetch_add(slices + 1 + bit, Ordering::AcqRel);
        }
        self.used.store(last, Ordering::Release);
        Ok(Submit { batch: Arc::clone(self), first })
    }

    /// Waits until the batch is settled or `deadline` passes; whether it is settled. Blocks the thread.
    pub fn park(&self, deadline: Instant) -> bool {
        let mut inner = lock(&self.inner);
        inner.parked += 1;
        while !self.is_settled() && !inner.nudged {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { break };
            inner = self.wake.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        inner.nudged = false;
        inner.parked -= 1;
        self.is_settled()
    }

    /// Like [`BatchCore::park`], and not ended early by a nudge, which is left for whoever it was meant for.
    pub fn park_settled(&self, deadline: Instant) -> bool {
        let mut inner = lock(&self.inner);
        inner.parked += 1;
        while !self.is_settled() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { break };
            inner = self.wake.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        inner.parked -= 1;
        if inner.nudged && inner.parked != 0 {
            self.wake.notify_one();
        }
        self.is_settled()
    }

    /// Makes one [`BatchCore::park`] of this batch, the present one or the next, return early: its thread is to drive
    /// progress itself.
    pub fn nudge(&self) {
        let mut inner = lock(&self.inner);
        inner.nudged = true;
        if inner.parked != 0 {
            self.wake.notify_one();
        }
    }

    /// Readiness for a future: registers `waker` unless the batch is settled.
    pub fn poll_settled(&self, waker: &Waker) -> Poll<()> {
        if self.is_settled() {
            return Poll::Ready(());
        }
        let mut inner = lock(&self.inner);
        if !inner.wakers.iter().any(|w| w.will_wake(waker)) {
            inner.wakers.push(waker.clone());
        }
        // The last slice may have settled before the waker was in place; `finish` takes the same lock after the count.
        if self.is_settled() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Sets the eventfd that is written when the batch settles; written at once if it is settled already.
    pub fn set_event(&self, event: File) {
        let mut inner = lock(&self.inner);
        if self.is_settled() && self.used() > 0 {
            signal(&event);
        }
        inner.event = Some(event);
    }

    /// State of the whole batch.
    pub fn status(&self) -> BatchStatus {
        let tasks = self.used();
        let settled = self.is_settled();
        let open_tasks = self.tasks.iter().take(tasks).filter(|t| t.open.load(Ordering::Acquire) != 0).count();
        let error = lock(&self.inner).error.clone();
        let state = match (&error, settled) {
            (_, false) => TaskState::Waiting,
            (Some(error), true) => state_of(error),
            (None, true) => TaskState::Completed,
        };
        BatchStatus { state, tasks, open_tasks, transferred_bytes: self.bytes_done.load(Ordering::Acquire), error }
    }

    /// State of one task; `None` if it was not submitted.
    pub fn task_status(&self, index: usize) -> Option<TaskStatus> {
        let task = self.tasks.get(index).filter(|_| index < self.used())?;
        let open = task.open.load(Ordering::Acquire);
        let error = lock(&task.error).clone();
        let state = match (&error, open) {
            (_, 1..) => TaskState::Waiting,
            (Some(error), 0) => state_of(error),
            (None, 0) => TaskState::Completed,
        };
        Some(TaskStatus { state, transferred_bytes: task.bytes_done.load(Ordering::Acquire), error })
    }

    fn record(&self, task: Option<u32>, error: TransferError) {
        if let Some(task) = task.and_then(|t| self.tasks.get(t as usize)) {
            lock(&task.error).get_or_insert_with(|| error.clone());
        }
        lock(&self.inner).error.get_or_insert(error);
    }

    fn release(self: &Arc<Self>, count: usize) {
        // AcqRel: the last release sees what every other slice wrote.
        let left = self.open.fetch_sub(count, Ordering::AcqRel) - count;
        if left == CLOSING {
            self.run_closing();
        } else if left == 0 {
            self.finish();
        }
    }

    fn run_closing(self: &Arc<Self>) {
        let (step, failed) = {
            let mut inner = lock(&self.inner);
            (inner.closing.take(), inner.error.is_some())
        };
        // Without a step the bit is that of a closing under way, and its token ends the batch.
        let Some(step) = step else { return };
        let token = ClosingToken { batch: Some(Arc::clone(self)) };
        if failed { token.done() } else { step(token) }
    }

    fn finish(&self) {
        let (pins, wakers) = {
            let mut inner = lock(&self.inner);
            if inner.parked != 0 {
                self.wake.notify_all();
            }
            if let Some(event) = &inner.event {
                signal(event);
            }
            // Another submit may have begun since the count; under this lock that is certain, and its pins stay.
            let pins = if self.is_settled() { std::mem::take(&mut inner.pins) } else { Vec::new() };
            (pins, std::mem::take(&mut inner.wakers))
        };
        drop(pins);
        for waker in wakers {
            waker.wake();
        }
    }
}

fn signal(mut event: &File) {
    // An eventfd whose counter is full is readable already; any other failure leaves nothing to do here.
    let _ = event.write(&1u64.to_ne_bytes());
}

fn state_of(error: &TransferError) -> TaskState {
    match error.class() {
        ErrorClass::TimedOut => TaskState::TimedOut,
        ErrorClass::Cancelled => TaskState::Cancelled,
        _ => TaskState::Failed,
    }
}

/// A submit in progress; dropping it lets the batch settle.
#[derive(Debug)]
pub struct Submit {
    batch: Arc<BatchCore>,
    first: usize,
}

impl Submit {
    /// Token of one slice of `len` bytes of the `index`-th entry of this submit. Called exactly as many times per entry
    /// as was said to [`BatchCore::begin`].
    pub fn token(&self, index: usize, len: u64) -> SliceToken {
        SliceToken { batch: Some(Arc::clone(&self.batch)), task: (self.first + index) as u32, len }
    }
}

impl Drop for Submit {
    fn drop(&mut self) {
        self.batch.release(1);
    }
}

/// The duty to settle one slice.
#[derive(Debug)]
#[must_use = "dropping a token cancels its slice"]
pub struct SliceToken {
    batch: Option<Arc<BatchCore>>,
    task: u32,
    len: u64,
}

impl SliceToken {
    /// Settles the slice: all its bytes are in place.
    pub fn complete(mut self) {
        if let Some(batch) = self.batch.take() {
            if let Some(task) = batch.tasks.get(self.task as usize) {
                task.bytes_done.fetch_add(self.len, Ordering::Relaxed);
                task.open.fetch_sub(1, Ordering::AcqRel);
            }
            batch.bytes_done.fetch_add(self.len, Ordering::Relaxed);
            batch.release(1);
        }
    }

    /// Settles the slice as failed. Nothing touches its local memory any more.
    pub fn fail(mut self, error: TransferError) {
        self.end_with(error);
    }

    /// The batch this slice belongs to.
    pub fn batch(&self) -> Option<&Arc<BatchCore>> {
        self.batch.as_ref()
    }

    /// Whether this slice belongs to `batch`.
    pub fn is_of(&self, batch: &Arc<BatchCore>) -> bool {
        self.batch.as_ref().is_some_and(|b| Arc::ptr_eq(b, batch))
    }

    fn end_with(&mut self, error: TransferError) {
        if let Some(batch) = self.batch.take() {
            batch.record(Some(self.task), error);
            if let Some(task) = batch.tasks.get(self.task as usize) {
                task.open.fetch_sub(1, Ordering::AcqRel);
            }
            batch.release(1);
        }
    }
}

impl Drop for SliceToken {
    fn drop(&mut self) {
        self.end_with(TransferError::Cancelled);
    }
}

/// The duty to end a batch after its closing step.
#[derive(Debug)]
pub struct ClosingToken {
    batch: Option<Arc<BatchCore>>,
}

impl ClosingToken {
    /// Ends the batch.
    pub fn done(mut self) {
        if let Some(batch) = self.batch.take() {
            batch.release(CLOSING);
        }
    }

    /// Ends the batch with an error.
    pub fn fail(mut self, error: TransferError) {
        if let Some(batch) = self.batch.take() {
            batch.record(None, error);
            batch.release(CLOSING);
        }
    }
}

impl Drop for ClosingToken {
    fn drop(&mut self) {
        if let Some(batch) = self.batch.take() {
            batch.record(None, TransferError::Cancelled);
            batch.release(CLOSING);
        }
    }
}

#[cfg(test)]
mod tests;
