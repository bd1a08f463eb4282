//! Sums over the life of an engine.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Counters; every one only grows.
#[derive(Debug, Default)]
pub struct Counters {
    /// Batches allocated.
    pub batches: AtomicU64,
    /// Requests submitted.
    pub requests: AtomicU64,
    /// Bytes of these requests.
    pub bytes: AtomicU64,
    /// Batches ended because nothing settled for too long, or a wait ran out.
    pub timeouts: AtomicU64,
    /// Links made.
    pub links: AtomicU64,
    /// Links lost, or not made.
    pub link_errors: AtomicU64,
    /// Notifications received.
    pub notifications_received: AtomicU64,
    /// Notifications delivered to peers.
    pub notifications_sent: AtomicU64,
    /// Descriptors written to the store.
    pub publications: AtomicU64,
}

/// Values of [`Counters`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CounterValues {
    /// Batches allocated.
    pub batches: u64,
    /// Requests submitted.
    pub requests: u64,
    /// Bytes of these requests.
    pub bytes: u64,
    /// Batches ended because nothing settled for too long, or a wait ran out.
    pub timeouts: u64,
    /// Links made.
    pub links: u64,
    /// Links lost, or not made.
    pub link_errors: u64,
    /// Notifications received.
    pub notifications_received: u64,
    /// Notifications delivered to peers.
    pub notifications_sent: u64,
    /// Descriptors written to the store.
    pub publications: u64,
}

impl Counters {
    /// Adds to one counter.
    pub fn add(counter: &AtomicU64, count: u64) {
        // Relaxed: a sum, read for people; it orders nothing.
        counter.fetch_add(count, Ordering::Relaxed);
    }

    /// The values now.
    pub fn values(&self) -> CounterValues {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CounterValues {
            batches: load(&self.batches),
            requests: load(&self.requests),
            bytes: load(&self.bytes),
            timeouts: load(&self.timeouts),
            links: load(&self.links),
            link_errors: load(&self.link_errors),
            notifications_received: load(&self.notifications_received),
            notifications_sent: load(&self.notifications_sent),
            publications: load(&self.publications),
        }
    }
}
