//! A batch while something of it is in flight: the links that have its slices, and the slices no link had room for.
//!
//! Invariants:
//! * after [`Flight::abort`] returned no slice of the batch is open, and none can be added;
//! * slices that wait for room are settled here if their batch ends first.

use std::{
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tidewire_core::{BatchId, ByteRange, TransferError};
use tokio::task::AbortHandle;

use crate::{
    batch::BatchCore,
    memory::lock,
    observe::Counters,
    segment::remote::Segment,
    transport::{Drive, Link, Slice},
};

/// How long a link may take to let go of the slices of a batch that ends.
const FENCE: Duration = Duration::from_secs(2);
/// How long a waiting caller drives its link before it tries again to hand over slices that had no room.
const BACKLOG_STEP: Duration = Duration::from_millis(1);

/// State of one batch.
#[derive(Debug)]
pub struct Flight {
    /// Its id.
    pub id: BatchId,
    /// Its accounting.
    pub core: Arc<BatchCore>,
    /// The eventfd, once asked for.
    pub event: OnceLock<OwnedFd>,
    /// Threads in [`Flight::drive`].
    waiters: AtomicUsize,
    limits: Limits,
    counters: Arc<Counters>,
    inner: Mutex<Inner>,
    /// Apart from `inner`, because the closing step may begin while slices are handed to a link.
    closing: Mutex<Closing>,
}

#[derive(Debug, Default)]
struct Closing {
    delivery: Option<AbortHandle>,
    ended: bool,
}

/// Times that hold for every batch of an engine.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Time without progress after which a batch ends.
    pub without_progress: Duration,
    /// How long a waiting caller polls before it sleeps.
    pub spin: Duration,
}

/// What [`Flight::submitting`] guards.
#[derive(Debug)]
pub struct Inner {
    /// One per link in use.
    pub lanes: Vec<Lane>,
    ended: bool,
    freed: bool,
    detached: bool,
    /// Bytes settled and entries submitted when progress was seen last.
    seen: (u64, usize),
    since: Instant,
}

/// A link with slices of this batch.
#[derive(Debug)]
pub struct Lane {
    /// The link.
    pub link: Arc<dyn Link>,
    /// The segment it leads to.
    pub segment: Arc<Segment>,
    /// Slices it had no room for.
    pub waiting: Vec<Slice>,
}

impl Flight {
    /// An empty batch.
    pub fn new(id: BatchId, capacity: usize, limits: Limits, counters: Arc<Counters>) -> Arc<Self> {
        let inner = Inner {
            lanes: Vec::new(),
            ended: false,
            freed: false,
            detached: false,
            seen: (0, 0),
            since: Instant::now(),
        };
        Arc::new(Flight {
            id,
            core: BatchCore::new(capacity),
            event: OnceLock::new(),
            waiters: AtomicUsize::new(0),
            limits,
            counters,
            inner: Mutex::new(inner),
            closing: Mutex::default(),
        })
    }

    /// Opens the batch for more slices. One caller at a time.
    ///
    /// # Errors
    /// [`TransferError::Cancelled`] once the batch was ended, [`TransferError::UnknownBatch`] once it was freed.
    pub fn submitting(&self) -> Result<MutexGuard<'_, Inner>, TransferError> {
        let mut inner = lock(&self.inner);
        if inner.freed {
            return Err(TransferError::UnknownBatch { batch: self.id.raw() });
        }
        if inner.ended {
            return Err(TransferError::Cancelled);
        }
        inner.detached = false;
        inner.since = Instant::now();
        Ok(inner)
    }

    /// Keeps what ends the delivery of the notification.
    pub fn set_closing(&self, delivery: AbortHandle) {
        let mut closing = lock(&self.closing);
        if closing.ended {
            delivery.abort();
        }
        closing.delivery = Some(delivery);
    }

    /// Drives the links from the calling thread until the batch is settled or `deadline` passed; whether it is settled.
    pub fn drive(&self, deadline: Instant) -> bool {
        self.waiters.fetch_add(1, Ordering::AcqRel);
        while !self.core.is_settled() && Instant::now() < deadline {
            let (first, backlog) = self.prepare_drive();
            let step = if backlog { deadline.min(Instant::now() + BACKLOG_STEP) } else { deadline };
            match first {
                Some(link) => link.drive(&self.core, Drive { deadline: step, spin: self.limits.spin }),
                None => self.core.park(step),
            };
        }
        self.waiters.fetch_sub(1, Ordering::Relaxed);
        self.core.is_settled()
    }

    /// Hands waiting slices over; the link that the caller is to drive, and whether slices still wait. With several
    /// links none is driven: the last slice may settle on any, and who leads one does not see the others.
    fn prepare_drive(&self) -> (Option<Arc<dyn Link>>, bool) {
        let mut inner = lock(&self.inner);
        let backlog = inner.hand_over();
        if inner.lanes.len() > 1 {
            inner.lanes.iter().for_each(|lane| lane.link.detach());
            return (None, backlog);
        }
        (inner.lanes.first().map(|lane| Arc::clone(&lane.link)), backlog)
    }

    /// After a submit: a thread that waits already may be driving another link, or none.
    pub fn submitted(&self, inner: &mut Inner) {
        inner.hand_over();
        if self.waiters.load(Ordering::Acquire) != 0 {
            inner.lanes.iter().for_each(|lane| lane.link.detach());
            self.core.nudge();
        }
    }

    /// Takes the batch out of use: a handle that is left cannot submit to it.
    pub fn free(&self) {
        lock(&self.inner).freed = true;
    }

    /// Sees to it that the batch goes on with no thread waiting for it.
    pub fn detach(&self) {
        let mut inner = lock(&self.inner);
        inner.hand_over();
        inner.detached = true;
        inner.lanes.iter().for_each(|lane| lane.link.detach());
    }

    /// One step of progress, without blocking.
    pub fn poll(&self) {
        let Ok(mut inner) = self.inner.try_lock() else { return };
        inner.hand_over();
        inner.lanes.iter().for_each(|lane| lane.link.poll());
    }

    /// One round of the ticker; whether slices wait for room.
    pub fn tick(&self, now: Instant) -> bool {
        let watched = self.waiters.load(Ordering::Relaxed) != 0;
        let expired = {
            let Ok(mut inner) = self.inner.try_lock() else { return false };
            let backlog = inner.hand_over();
            if !watched && !inner.detached {
                inner.detached = true;
                inner.lanes.iter().for_each(|lane| lane.link.detach());
            }
            let seen = (self.core.bytes_settled(), self.core.used());
            if seen != inner.seen {
                (inner.seen, inner.since) = (seen, now);
            }
            if now.saturating_duration_since(inner.since) < self.limits.without_progress {
                return backlog;
            }
            self.limits.without_progress
        };
        tracing::warn!(batch = self.id.raw(), timeout_ms = expired.as_millis() as u64, "batch made no progress");
        Counters::add(&self.counters.timeouts, 1);
        self.expire(expired);
        false
    }

    /// Ends the batch because `timeout` passed.
    pub fn expire(&self, timeout: Duration) {
        self.abort(&|segment, range| TransferError::TimedOut {
            segment: segment.name().to_owned(),
            peer: segment.resolved().address.to_string(),
            range,
            timeout_ms: timeout.as_millis() as u64,
        });
    }

    /// Ends every open slice with the error that `make` gives for its segment and target range, and takes no more. When
    /// this returns no link holds a slice of the batch.
    pub fn abort(&self, make: &dyn Fn(&Segment, ByteRange) -> TransferError) {
        let lanes = {
            let mut inner = lock(&self.inner);
            inner.ended = true;
            std::mem::take(&mut inner.lanes)
        };
        for lane in lanes {
            for slice in lane.waiting {
                let target = slice.target;
                slice.token.fail(make(&lane.segment, target));
            }
            lane.link.cancel(&self.core, &|range| make(&lane.segment, range));
        }
        let delivery = {
            let mut closing = lock(&self.closing);
            closing.ended = true;
            closing.delivery.take()
        };
        if let Some(delivery) = delivery {
            delivery.abort();
        }
        if !self.core.park_settled(Instant::now() + FENCE) {
            tracing::error!(batch = self.id.raw(), "a link still holds slices of an ended batch");
        }
    }
}

impl Inner {
    /// The lane of `link`, added if need be.
    pub fn lane(&mut self, link: &Arc<dyn Link>, segment: &Arc<Segment>) -> usize {
        let found = self.lanes.iter().position(|lane| Arc::ptr_eq(&lane.link, link));
        found.unwrap_or_else(|| {
            self.lanes.push(Lane { link: Arc::clone(link), segment: Arc::clone(segment), waiting: Vec::new() });
            self.lanes.len() - 1
        })
    }

    /// Hands waiting slices to their links; whether some still wait.
    pub fn hand_over(&mut self) -> bool {
        let mut backlog = false;
        for lane in &mut self.lanes {
            if !lane.waiting.is_empty() {
                lane.link.submit(&mut lane.waiting);
                backlog |= !lane.waiting.is_empty();
            }
        }
        backlog
    }
}
