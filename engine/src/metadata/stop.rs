//! Stopping of a store's background tasks.
//!
//! A store owns one [`StopSource`]; each task holds a [`StopSignal`]. Closing the store, or dropping it, ends every task
//! at its next wait.

use std::time::Duration;

use tokio::{sync::watch, time::timeout};

/// The end of a store that says stop.
#[derive(Debug)]
pub(crate) struct StopSource {
    sender: watch::Sender<bool>,
}

/// The end of a task that hears it.
#[derive(Clone, Debug)]
pub(crate) struct StopSignal {
    receiver: watch::Receiver<bool>,
}

impl StopSource {
    /// A source that has not said stop.
    pub(crate) fn new() -> Self {
        StopSource { sender: watch::Sender::new(false) }
    }

    /// A signal for one task.
    pub(crate) fn signal(&self) -> StopSignal {
        StopSignal { receiver: self.sender.subscribe() }
    }

    /// Says stop; whether this call was the first.
    pub(crate) fn stop(&self) -> bool {
        !self.sender.send_replace(true)
    }

    /// Whether it said stop.
    pub(crate) fn is_stopped(&self) -> bool {
        *self.sender.borrow()
    }
}

impl StopSignal {
    /// Waits for the stop.
    pub(crate) async fn stopped(&mut self) {
        // An error means that the source was dropped, which is a stop as well.
        let _ = self.receiver.wait_for(|stopped| *stopped).await;
    }

    /// Waits for the stop, at most `limit`; whether it came.
    pub(crate) async fn stopped_within(&mut self, limit: Duration) -> bool {
        timeout(limit, self.stopped()).await.is_ok()
    }
}
