//! What peers ask on the control port: the own descriptor, and to take a notification.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use tidewire_core::Notify;

use crate::{
    control::{ControlHandler, NotifyRefused},
    memory::lock,
    observe::Counters,
    segment::own::OwnSegment,
};

/// Answers peers and keeps their notifications, at most a set number of them.
#[derive(Debug)]
pub struct Inbox {
    own: Arc<OwnSegment>,
    /// Whether peers ask this engine for its descriptor, rather than a store.
    p2p: bool,
    limit: usize,
    waiting: Mutex<VecDeque<Notify>>,
    closed: AtomicBool,
    counters: Arc<Counters>,
}

impl Inbox {
    /// An empty inbox.
    pub fn new(own: Arc<OwnSegment>, p2p: bool, limit: usize, counters: Arc<Counters>) -> Self {
        Inbox { own, p2p, limit, waiting: Mutex::default(), closed: AtomicBool::new(false), counters }
    }

    /// Takes what has come, in order of arrival.
    pub fn take(&self) -> Vec<Notify> {
        lock(&self.waiting).drain(..).collect()
    }

    /// Number that wait.
    pub fn len(&self) -> usize {
        lock(&self.waiting).len()
    }

    /// Refuses further notifications.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Adds a notification.
    ///
    /// # Errors
    /// [`NotifyRefused`].
    pub fn push(&self, notify: Notify) -> Result<(), NotifyRefused> {
        if self.closed.load(Ordering::Acquire) {
            return Err(NotifyRefused::ShuttingDown);
        }
        let mut waiting = lock(&self.waiting);
        if waiting.len() >= self.limit {
            return Err(NotifyRefused::Full { queued: waiting.len() });
        }
        waiting.push_back(notify);
        Counters::add(&self.counters.notifications_received, 1);
        Ok(())
    }
}

impl ControlHandler for Inbox {
    fn metadata(&self, _request: &[u8]) -> Vec<u8> {
        let json = if self.p2p { self.own.json() } else { None };
        json.map_or_else(|| b"null".to_vec(), |json| json.to_vec())
    }

    fn notify(&self, name: String, message: String) -> Result<(), NotifyRefused> {
        self.push(Notify { name, message })
    }

    fn probe(&self) -> bool {
        !self.closed.load(Ordering::Acquire)
    }
}
