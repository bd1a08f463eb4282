//! The thread `tw-tick`: keeps the deadlines of batches that nobody waits for, and sees to it that they go on.
//!
//! Sleeps without a timer while nothing is in flight, so an idle engine costs nothing. A caller that waits for its batch
//! does all this itself; the ticker only finds it done.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering, fence},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tidewire_core::TransferError;

use super::table::BatchTable;
use crate::memory::lock;

/// Time between two rounds while something is in flight.
const ROUND: Duration = Duration::from_millis(10);
/// The same while slices wait for room in a link.
const ROUND_WITH_BACKLOG: Duration = Duration::from_millis(1);

/// The ticking thread of one engine.
#[derive(Debug)]
pub struct Ticker {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    asleep: AtomicBool,
    stop: AtomicBool,
    guard: Mutex<()>,
    wake: Condvar,
}

impl Ticker {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`TransferError::Os`].
    pub fn start(batches: Arc<BatchTable>) -> Result<Self, TransferError> {
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("tw-tick".to_owned())
            .spawn(move || own.run(&batches))
            .map_err(|e| TransferError::os("spawn tw-tick", &e))?;
        Ok(Ticker { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Says that something is in flight now. Costs one load while the ticker is awake.
    pub fn notice(&self) {
        // Pairs with the fence in `Shared::sleep`: either that thread sees the open batch, or this one sees it asleep.
        fence(Ordering::SeqCst);
        if self.shared.asleep.load(Ordering::Relaxed) {
            self.shared.wake_up();
        }
    }

    /// Stops the thread.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake_up();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != thread::current().id()) {
            // The loop has nothing that panics; were it otherwise there would be nothing left to stop.
            let _ = thread.join();
        }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn run(&self, batches: &BatchTable) {
        while !self.stop.load(Ordering::Acquire) {
            let open = batches.in_flight();
            if open.is_empty() {
                self.sleep(batches);
                continue;
            }
            let now = Instant::now();
            let backlog = open.iter().fold(false, |backlog, flight| flight.tick(now) | backlog);
            drop(open);
            self.pause(if backlog { ROUND_WITH_BACKLOG } else { ROUND });
        }
    }

    /// Sleeps until something is in flight.
    fn sleep(&self, batches: &BatchTable) {
        let mut guard = lock(&self.guard);
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if batches.in_flight().is_empty() {
            while self.asleep.load(Ordering::Relaxed) && !self.stop.load(Ordering::Acquire) {
                guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
        }
        self.asleep.store(false, Ordering::Relaxed);
    }

    fn pause(&self, time: Duration) {
        let guard = lock(&self.guard);
        if !self.stop.load(Ordering::Acquire) {
            drop(self.wake.wait_timeout(guard, time).unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn wake_up(&self) {
        let _guard = lock(&self.guard);
        self.asleep.store(false, Ordering::Relaxed);
        self.wake.notify_all();
    }
}
