//! How a link ends, and what its slices are told.

use std::sync::{PoisonError, atomic::Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tidewire_core::{ByteRange, TransferError};

use super::client::{Client, Ended};
use crate::memory::lock;

impl Client {
    /// Ends the link because of the peer.
    pub(super) fn go_down(&self, reason: &str) {
        self.down.store(true, Ordering::Release);
        self.end(Ended::Down(reason.to_owned()));
    }

    /// Ends the link and waits for the copies in progress.
    pub(super) fn close(&self) {
        self.down.store(true, Ordering::Release);
        self.end(Ended::Closed);
        let mut state = lock(&self.state);
        while !state.running.is_empty() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the link without waiting: a copy in progress on another thread ends under the pins of its batch.
    pub(super) fn detach(&self) {
        self.down.store(true, Ordering::Release);
        self.end(Ended::Closed);
    }

    fn end(&self, why: Ended) {
        let mut state = lock(&self.state);
        if state.ended.is_some() {
            return;
        }
        if let Ended::Down(reason) = &why {
            tracing::info!(peer = self.to.peer.address, pid = self.to.pid, reason, "same-host peer went down");
        }
        state.ended = Some(why);
        let mut slices = state.asks.take_all();
        slices.extend(std::mem::take(&mut state.ready));
        state.grants.clear();
        drop(state);
        self.changed.notify_all();
        self.shared.remove_client(self.key);
        self.shared.poller.remove(&self.to.pidfd);
        self.channel.close();
        for slice in slices {
            let error = self.ended_error(slice.target);
            slice.token.fail(error);
        }
    }

    /// Whether the peer's process has ended, asked of the kernel.
    pub(super) fn is_dead(&self) -> bool {
        let mut fds = [PollFd::new(&self.to.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready != 0)
    }

    /// The end of the link as the error of a slice.
    pub(super) fn ended_error(&self, range: ByteRange) -> TransferError {
        let ended = lock(&self.state).ended.clone();
        let (segment, peer) = (self.to.peer.segment.clone(), self.to.peer.address.clone());
        match ended {
            Some(Ended::Closed) => TransferError::ShutDown,
            Some(Ended::Down(reason)) => TransferError::PeerDown { segment, peer, range, reason },
            None => TransferError::PeerDown { segment, peer, range, reason: "link is ending".to_owned() },
        }
    }

    /// The owner's refusal as the error of a slice.
    pub(super) fn refused(&self, range: ByteRange) -> TransferError {
        let (segment, peer) = (self.to.peer.segment.clone(), self.to.peer.address.clone());
        TransferError::OutOfBounds { segment, peer, range }
    }

    pub(super) fn failure(&self) -> Option<TransferError> {
        let ended = lock(&self.state).ended.clone()?;
        let (segment, peer) = (self.to.peer.segment.clone(), self.to.peer.address.clone());
        match ended {
            Ended::Closed => Some(TransferError::ShutDown),
            Ended::Down(reason) => {
                Some(TransferError::Unreachable { segment, peer, transport: self.kind().name(), reason })
            }
        }
    }
}
