//! The wish to stop: set by Ctrl-C or SIGTERM, seen by every loop of a command.
//!
//! The first signal asks for an orderly end, the second ends the process at once with status 130. One thread,
//! `tw-signal`, waits for signals; it starts with [`Stop::listen`].

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use tokio::signal::unix::{SignalKind, signal};

/// Status of a process that a signal ended.
const INTERRUPTED: i32 = 130;

/// Shared flag; clones see the same one.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    requested: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Stop {
    /// A flag that nothing sets but [`Stop::request`].
    pub fn new() -> Self {
        Stop::default()
    }

    /// A flag that SIGINT and SIGTERM set.
    ///
    /// # Errors
    /// The operating system's, when the handlers cannot be installed.
    pub fn listen() -> io::Result<Self> {
        let stop = Stop::new();
        let seen = stop.clone();
        let (ready, installed) = mpsc::channel();
        thread::Builder::new().name("tw-signal".to_owned()).spawn(move || seen.watch_signals(&ready))?;
        installed.recv().map_err(|_| io::Error::other("the signal thread ended"))??;
        Ok(stop)
    }

    fn watch_signals(&self, ready: &mpsc::Sender<io::Result<()>>) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(ready.send(Err(error))),
        };
        runtime.block_on(async {
            let handlers = signal(SignalKind::interrupt()).and_then(|i| Ok((i, signal(SignalKind::terminate())?)));
            let (mut interrupt, mut terminate) = match handlers {
                Ok(handlers) => handlers,
                Err(error) => return drop(ready.send(Err(error))),
            };
            // The receiver is gone only if the caller is, and then so is the process.
            let _ = ready.send(Ok(()));
            loop {
                tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
                if self.is_requested() {
                    std::process::exit(INTERRUPTED);
                }
                self.request();
            }
        });
    }

    /// Asks every loop to end.
    pub fn request(&self) {
        self.inner.requested.store(true, Ordering::Release);
        let _guard = self.inner.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.wake.notify_all();
    }

    /// Whether the command is to end.
    pub fn is_requested(&self) -> bool {
        self.inner.requested.load(Ordering::Acquire)
    }

    /// Blocks until a stop is asked for, at most for `duration`; whether it was.
    pub fn wait(&self, duration: Duration) -> bool {
        let Some(deadline) = Instant::now().checked_add(duration) else { return self.wait_forever() };
        let mut guard = self.inner.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.is_requested() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { break };
            guard = self.inner.wake.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        self.is_requested()
    }

    /// Blocks until a stop is asked for; always true.
    pub fn wait_forever(&self) -> bool {
        let mut guard = self.inner.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.is_requested() {
            guard = self.inner.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_ends_a_wait_early_and_a_quiet_wait_says_no() {
        let stop = Stop::new();
        assert!(!stop.wait(Duration::from_millis(1)));
        let other = stop.clone();
        let asked = thread::spawn(move || other.request());
        assert!(stop.wait(Duration::from_secs(30)) && stop.wait_forever());
        assert!(asked.join().is_ok());
    }
}
