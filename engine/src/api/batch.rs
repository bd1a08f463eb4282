//! The caller's handle of a batch.

use std::{
    fs::File,
    future::Future,
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, eventfd};
use tidewire_core::{BatchId, BatchStatus, Notify, TaskState, TaskStatus, TransferError, TransferRequest};

use super::{engine::EngineInner, flight::Flight, submit};
use crate::observe::Counters;

/// A set of requests that is waited for as a whole.
///
/// Dropping it cancels interest only: what is in flight goes on until it is settled or its deadline passes, and its local
/// memory stays pinned for as long. Several submits may append until the capacity is used up; concurrent ones are put in
/// an order.
#[derive(Debug)]
pub struct Batch {
    engine: Arc<EngineInner>,
    flight: Arc<Flight>,
    /// Whether dropping the handle frees the batch.
    owner: bool,
}

impl Batch {
    pub(crate) fn new(engine: Arc<EngineInner>, flight: Arc<Flight>, owner: bool) -> Self {
        Batch { engine, flight, owner }
    }

    /// Its id, for callers that cannot keep a handle. Valid until the batch is freed.
    pub fn id(&self) -> BatchId {
        self.flight.id
    }

    /// Gives the handle up for the id: the batch stays until [`crate::TransferEngine::free_batch`].
    pub fn into_id(mut self) -> BatchId {
        self.owner = false;
        self.flight.id
    }

    /// Entries it was made for.
    pub fn capacity(&self) -> usize {
        self.flight.core.capacity()
    }

    /// Starts transfers. All entries are checked before the first is queued.
    ///
    /// The first submit to a segment makes the link and may block for the connect timeout; later ones do not block
    /// (a `shm`, `cma` or `local` link copies on this thread before the call returns).
    ///
    /// # Errors
    /// [`TransferError::BatchFull`], [`TransferError::ZeroLength`], [`TransferError::RangeOverflow`],
    /// [`TransferError::SourceNotRegistered`], [`TransferError::UnknownSegment`], [`TransferError::QueueFull`],
    /// [`TransferError::ShutDown`], [`TransferError::Cancelled`] after the batch was ended, and what making the link gave.
    /// Nothing was queued in any of these cases.
    pub fn submit(&self, requests: &[TransferRequest]) -> Result<(), TransferError> {
        submit::submit(&self.engine, &self.flight, requests, None)
    }

    /// Like [`Batch::submit`], with a notification for the segment of the first entry.
    ///
    /// It is delivered once every byte submitted to this batch is in place, at most once, and not at all if an entry
    /// failed. The batch is settled after the delivery; a delivery that fails is the batch's error. A batch carries one
    /// notification: a second call before the batch is settled replaces the first one's.
    ///
    /// # Errors
    /// As [`Batch::submit`]; [`TransferError::NotifyFailed`] for an empty message or no entries.
    pub fn submit_with_notify(&self, requests: &[TransferRequest], notify: Notify) -> Result<(), TransferError> {
        submit::submit(&self.engine, &self.flight, requests, Some(notify))
    }

    /// Waits until every entry is settled. Blocks; the calling thread drives the transfers itself.
    ///
    /// A failed batch is `Ok` too: its status says so, and [`BatchStatus::into_result`] turns it into an error.
    ///
    /// # Errors
    /// [`TransferError::TimedOut`] when `timeout` passed first: the batch is ended then, and none of its memory is
    /// touched any more.
    pub fn wait(&self, timeout: Duration) -> Result<BatchStatus, TransferError> {
        if self.flight.drive(deadline_after(timeout)) {
            return Ok(self.flight.core.status());
        }
        Counters::add(&self.engine.counters.timeouts, 1);
        self.flight.expire(timeout);
        let status = self.flight.core.status();
        match (status.state, &status.error) {
            // The last slice settled between the timeout and the end.
            (TaskState::Completed, _) => Ok(status),
            (TaskState::Waiting, _) => {
                Err(TransferError::Internal { reason: "a link did not let go of an ended batch" })
            }
            (_, Some(error)) => Err(error.clone()),
            (_, None) => Err(TransferError::Cancelled),
        }
    }

    /// A future that is ready when every entry is settled. It belongs to no runtime, and dropping it changes nothing.
    pub fn settled(&self) -> Settled {
        Settled { flight: Arc::clone(&self.flight), started: false }
    }

    /// A descriptor that becomes readable when the batch is settled, for `epoll` and its like. It stays readable until it
    /// is read (eight bytes); after a further submit it becomes readable again.
    ///
    /// # Errors
    /// [`TransferError::Os`].
    pub fn event_fd(&self) -> Result<BorrowedFd<'_>, TransferError> {
        if self.flight.event.get().is_none() {
            let os = |call, error: &std::io::Error| TransferError::os(call, error);
            let fd =
                eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| os("eventfd", &e.into()))?;
            let writer = fd.try_clone().map_err(|e| os("dup", &e))?;
            if self.flight.event.set(fd).is_ok() {
                self.flight.core.set_event(File::from(writer));
            }
        }
        self.flight.detach();
        let internal = TransferError::Internal { reason: "eventfd is missing" };
        self.flight.event.get().map(|fd| fd.as_fd()).ok_or(internal)
    }

    /// State of the whole batch. Makes one step of progress, so a caller may poll.
    pub fn status(&self) -> BatchStatus {
        if !self.flight.core.is_settled() {
            self.flight.poll();
        }
        self.flight.core.status()
    }

    /// State of one entry, counted from 0 in order of submission; `None` if there is no such entry yet.
    pub fn task_status(&self, index: usize) -> Option<TaskStatus> {
        if !self.flight.core.is_settled() {
            self.flight.poll();
        }
        self.flight.core.task_status(index)
    }

    /// Ends what is in flight. When this returns none of the batch's memory is touched any more; entries that were done
    /// stay done. A batch that was ended takes no more entries.
    pub fn cancel(&self) {
        self.flight.abort(&|_, _| TransferError::Cancelled);
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        if self.owner {
            // A batch that was freed by its id already is as good as freed here.
            let _ = self.engine.batches.remove(self.flight.id);
        }
    }
}

/// The time `timeout` from now; a timeout that no clock can hold is a year.
pub(crate) fn deadline_after(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or_else(|| now + Duration::from_secs(365 * 86_400))
}

/// Future of [`Batch::settled`].
#[derive(Debug)]
#[must_use = "a future does nothing unless it is polled"]
pub struct Settled {
    flight: Arc<Flight>,
    started: bool,
}

impl Future for Settled {
    type Output = BatchStatus;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<BatchStatus> {
        if !self.started {
            self.started = true;
            if !self.flight.core.is_settled() {
                self.flight.detach();
            }
        }
        self.flight.core.poll_settled(context.waker()).map(|()| self.flight.core.status())
    }
}
