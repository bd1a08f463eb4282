//! Watch on etcd that outlives its streams.
//!
//! etcd's watch streams end with their connection and never come back. This one is made again from the revision after
//! the last change told; where etcd has compacted that revision, or lost it with its data, the prefix is listed and the
//! difference is told.
//!
//! Invariants:
//! * changes are told in revision order, none twice, none left out but those a compaction swallowed;
//! * the task ends with the store or with its receiver.

use std::{sync::Arc, time::Duration};

use etcd_client::{Event, EventType, WatchOptions, WatchStream};
use tokio::{sync::mpsc, time::timeout};

use super::{
    super::{Entry, StoreError, WatchEvent, known::Known, stop::StopSignal},
    backend::{EtcdBackend, entry, range_of, to_u64},
};

/// Waits before a stream is made again, doubled up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));
/// Longest message; a revision that puts many keys comes as one.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Follows one prefix for one receiver.
pub(super) struct Watcher {
    backend: Arc<EtcdBackend>,
    prefix: String,
    /// Revision of the next change.
    next: i64,
    known: Known,
    events: mpsc::Sender<WatchEvent>,
}

/// How a stream ended.
enum End {
    /// The receiver is gone.
    Receiver,
    /// The history does not reach back to `next`.
    Compacted,
}

impl Watcher {
    /// Continues from a listing.
    pub(super) fn new(
        backend: Arc<EtcdBackend>,
        prefix: &str,
        revision: i64,
        listing: &[Entry],
        events: mpsc::Sender<WatchEvent>,
    ) -> Self {
        let known = Known::from_listing(listing);
        Watcher { backend, prefix: prefix.to_owned(), next: revision + 1, known, events }
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
        loop {
            let before = self.next;
            let outcome = match self.stream().await {
                Ok(End::Receiver) => return,
                Ok(End::Compacted) => self.relist().await,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(true) => wait = RETRY.0,
                Ok(false) => return,
                Err(error) => {
                    let store = self.backend.link().describe();
                    tracing::warn!(store, prefix = self.prefix, %error, "watch is interrupted and made again");
                    if self.next != before {
                        wait = RETRY.0;
                    }
                    if stop.stopped_within(wait).await {
                        return;
                    }
                    wait = (wait * 2).min(RETRY.1);
                }
            }
        }
    }

    /// Makes a stream and tells its changes until it ends.
    async fn stream(&mut self) -> Result<End, StoreError> {
        let (mut stream, made) = self.open().await?;
        let outcome = self.follow_stream(&mut stream).await;
        if outcome.is_err() {
            self.backend.link().suspect(made).await;
        }
        outcome
    }

    async fn follow_stream(&mut self, stream: &mut WatchStream) -> Result<End, StoreError> {
        let mut fresh = true;
        loop {
            let message = if fresh {
                // etcd answers the request at once; later messages come when there is something to tell.
                let limit = self.backend.link().request_timeout();
                timeout(limit, stream.message()).await.map_err(|_| self.broken("no answer to the watch request"))?
            } else {
                stream.message().await
            };
            let message = match message {
                Ok(Some(message)) => message,
                Ok(None) => return Err(self.broken("the watch stream ended")),
                Err(error) => return Err(self.backend.link().failed("watch", &self.prefix, &error).into()),
            };
            let revision = message.header().map_or(0, |header| header.revision());
            if message.canceled() {
                if message.compact_revision() > 0 {
                    return Ok(End::Compacted);
                }
                return Err(self.broken(message.cancel_reason()));
            }
            if fresh && revision + 1 < self.next {
                // etcd came back with older data than was told: its history is another one.
                return Ok(End::Compacted);
            }
            fresh = false;
            let last = message.events().iter().filter_map(|event| event.kv().map(|kv| kv.mod_revision())).max();
            for event in message.events() {
                if let Some(event) = told(event) {
                    self.known.apply(&event);
                    if self.events.send(event).await.is_err() {
                        return Ok(End::Receiver);
                    }
                }
            }
            // A message without changes says that there are none up to its revision, but for the first.
            match last {
                Some(last) => self.next = self.next.max(last + 1),
                None if !message.created() => self.next = self.next.max(revision + 1),
                None => {}
            }
        }
    }

    async fn open(&self) -> Result<(WatchStream, u64), StoreError> {
        let link = self.backend.link();
        let (start, end) = range_of(&self.prefix);
        let options = WatchOptions::new().with_range(end).with_start_revision(self.next).with_progress_notify();
        let (client, made) = link.client().await?;
        let mut watch = client.watch_client().max_decoding_message_size(MAX_MESSAGE_BYTES);
        match timeout(link.request_timeout(), watch.watch(start, Some(options))).await {
            Ok(Ok(stream)) => Ok((stream, made)),
            Ok(Err(error)) => {
                link.suspect(made).await;
                Err(link.failed("watch", &self.prefix, &error).into())
            }
            Err(_) => {
                link.suspect(made).await;
                Err(self.broken("no answer to the watch request"))
            }
        }
    }

    /// Lists and tells the difference; `false` if the receiver is gone.
    async fn relist(&mut self) -> Result<bool, StoreError> {
        let (revision, listing) = self.backend.list(&self.prefix).await?;
        let store = self.backend.link().describe();
        tracing::info!(store, prefix = self.prefix, revision, "watch lost its history and listed again");
        let listing = listing.into_iter().map(|(entry, _)| entry).collect();
        for event in self.known.diff(listing) {
            if self.events.send(event).await.is_err() {
                return Ok(false);
            }
        }
        self.next = revision + 1;
        Ok(true)
    }

    fn broken(&self, reason: &str) -> StoreError {
        let store = self.backend.link().describe().to_owned();
        StoreError::Unreachable { store, reason: format!("watch: {reason}") }
    }
}

/// The change as the store tells it.
fn told(event: &Event) -> Option<WatchEvent> {
    let kv = event.kv()?;
    Some(match event.event_type() {
        EventType::Put => WatchEvent::Put(Entry { revision: to_u64(kv.mod_revision()), ..entry(kv) }),
        EventType::Delete => WatchEvent::Removed { key: String::from_utf8_lossy(kv.key()).into_owned() },
    })
}
