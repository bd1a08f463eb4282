//! Watch over HTTP: long polls of our server, from revision to revision.
//!
//! Invariants:
//! * a poll that fails is repeated from the same revision, so nothing is missed or told twice;
//! * a server that lost its history, or was restarted, is listed again and the difference is told.

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc;

use super::{
    super::{Entry, StoreError, WatchEvent, known::Known, stop::StopSignal},
    backend::HttpBackend,
};

/// How long one poll waits for a change.
const POLL: Duration = Duration::from_secs(10);
/// Waits after a failed poll, doubled up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// Follows one prefix for one receiver.
pub(super) struct Watcher {
    backend: Arc<HttpBackend>,
    prefix: String,
    after: u64,
    known: Known,
    events: mpsc::Sender<WatchEvent>,
}

impl Watcher {
    /// Continues from a listing.
    pub(super) fn new(
        backend: Arc<HttpBackend>,
        prefix: &str,
        revision: u64,
        listing: &[Entry],
        events: mpsc::Sender<WatchEvent>,
    ) -> Self {
        let known = Known::from_listing(listing);
        Watcher { backend, prefix: prefix.to_owned(), after: revision, known, events }
    }

    /// Runs until the store stops or the receiver is gone.
    pub(super) async fn run(mut self, mut stop: StopSignal) {
        let (events, pause) = (self.events.clone(), stop.clone());
        tokio::select! {
            () = stop.stopped() => {}
            () = events.closed() => {}
            () = self.follow(pause) => {}
        }
    }

    async fn follow(&mut self, mut stop: StopSignal) {
        let mut wait = RETRY.0;
        let mut failing = false;
        loop {
            match self.step().await {
                Ok(true) => (wait, failing) = (RETRY.0, false),
                Ok(false) => return,
                Err(error) => {
                    if !failing {
                        tracing::warn!(store = self.backend.connections().describe(), %error, "watch is interrupted");
                    }
                    failing = true;
                    if stop.stopped_within(wait).await {
                        return;
                    }
                    wait = (wait * 2).min(RETRY.1);
                }
            }
        }
    }

    /// One poll; `false` if the receiver is gone.
    async fn step(&mut self) -> Result<bool, StoreError> {
        let (revision, events) = match self.backend.changes(&self.prefix, self.after, POLL).await? {
            Some((revision, events)) => {
                events.iter().for_each(|event| self.known.apply(event));
                (revision, events)
            }
            None => {
                let (revision, listing) = self.backend.list(&self.prefix).await?;
                (revision, self.known.diff(listing))
            }
        };
        self.after = revision;
        for event in events {
            if self.events.send(event).await.is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
