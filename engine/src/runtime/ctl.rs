//! The control thread `tw-ctl`: the only tokio runtime of an engine.
//!
//! Discovery, notifications, leases and the control listener run here. Callers on other threads hand it a future and wait
//! for the result with a deadline ([`Ctl::run`]); that works inside a foreign async runtime too, where it blocks.
//!
//! Invariants:
//! * no future on this thread blocks on the network outside of tokio;
//! * [`Ctl::run`] from the control thread itself is an error, not a deadlock.

use std::{
    future::Future,
    sync::{Arc, Mutex, mpsc},
    thread::{self, JoinHandle, ThreadId},
    time::{Duration, Instant},
};

use tidewire_core::TransferError;
use tokio::{runtime::Handle, sync::Notify, task::AbortHandle};

use crate::memory::lock;

/// Why [`Ctl::run`] has no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CtlError {
    /// The future did not end in time; it was dropped.
    #[error("no answer within {waited_ms} ms")]
    Elapsed {
        /// How long was waited.
        waited_ms: u64,
    },
    /// The control thread is stopped.
    #[error("control thread is stopped")]
    Stopped,
    /// Called on the control thread.
    #[error("would wait for itself")]
    OwnThread,
}

/// The control thread.
#[derive(Debug)]
pub struct Ctl {
    handle: Handle,
    stop: Arc<Notify>,
    id: ThreadId,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Ctl {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`TransferError::Os`] if the runtime or the thread cannot be made.
    pub fn start() -> Result<Self, TransferError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| TransferError::os("create control runtime", &e))?;
        let handle = runtime.handle().clone();
        let stop = Arc::new(Notify::new());
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("tw-ctl".to_owned())
            .spawn(move || {
                runtime.block_on(stopped.notified());
                runtime.shutdown_timeout(Duration::from_millis(200));
            })
            .map_err(|e| TransferError::os("spawn tw-ctl", &e))?;
        Ok(Ctl { handle, stop, id: thread.thread().id(), thread: Mutex::new(Some(thread)) })
    }

    /// Handle of its runtime.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Runs `future` on the control thread without waiting for it.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        self.handle.spawn(future).abort_handle()
    }

    /// Runs `future` on the control thread and waits at most `limit` for its result. Blocks the calling thread.
    ///
    /// # Errors
    /// See [`CtlError`]; the future is dropped in every case.
    pub fn run<T: Send + 'static>(
        &self,
        limit: Duration,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, CtlError> {
        if thread::current().id() == self.id {
            return Err(CtlError::OwnThread);
        }
        let started = Instant::now();
        let (sender, receiver) = mpsc::sync_channel(1);
        let task = self.spawn(async move {
            // The receiver is gone only if the caller gave up.
            let _ = sender.send(future.await);
        });
        receiver.recv_timeout(limit).map_err(|error| {
            task.abort();
            match error {
                mpsc::RecvTimeoutError::Timeout => {
                    CtlError::Elapsed { waited_ms: started.elapsed().as_millis() as u64 }
                }
                mpsc::RecvTimeoutError::Disconnected => CtlError::Stopped,
            }
        })
    }

    /// Stops the thread and drops what still runs on it. Further calls do nothing.
    pub fn stop(&self) {
        self.stop.notify_one();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != thread::current().id()) {
            // A panic of a control future is contained by its task; the thread itself has nothing that panics.
            let _ = thread.join();
        }
    }
}

impl Drop for Ctl {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn result_comes_back() {
        assert_eq!(Ctl::start().unwrap().run(Duration::from_secs(5), async { 7 }), Ok(7));
    }

    #[test]
    fn a_future_that_hangs_is_given_up_and_dropped() {
        let ctl = Ctl::start().unwrap();
        let alive = Arc::new(());
        let held = Arc::clone(&alive);
        let result = ctl.run(Duration::from_millis(20), async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        assert!(matches!(result, Err(CtlError::Elapsed { .. })));
        ctl.stop();
        assert_eq!(Arc::strong_count(&alive), 1);
    }

    #[test]
    fn a_stopped_thread_refuses() {
        let ctl = Ctl::start().unwrap();
        ctl.stop();
        assert_eq!(ctl.run(Duration::from_secs(5), async {}), Err(CtlError::Stopped));
    }
}
