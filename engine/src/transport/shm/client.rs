//! Initiator side: one connection to the owner of memory on this host.
//!
//! A slice whose region is granted is copied at once, on the thread that submits it. Otherwise the owner is asked and the
//! slice waits; the answer arrives on `tw-local` (see `answers`), and `tw-local-copy` does the copy.
//!
//! Invariants:
//! * a slice is in exactly one place: with its caller, waiting in an `Ask`, in the ready queue, or being copied under an
//!   entry of `running`;
//! * tokens are settled without any lock held;
//! * after [`Client::close`] returned, nothing is copied any more.

use std::{
    collections::VecDeque,
    os::fd::OwnedFd,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    time::Instant,
};

use tidewire_core::{ByteRange, TransferError, local::Message};

use super::{
    asks::Asks,
    grants::{Grant, Grants},
    reactor::Shared,
    socket::{Channel, Packet},
};
use crate::{
    batch::BatchCore,
    memory::lock,
    shm::{ControlPage, RemoteProcess},
    transport::{
        Peer, Slice, TransportKind,
        cma::{self, CopyFault},
    },
};

/// What attaching found out.
#[derive(Debug)]
pub(super) struct Attachment {
    pub(super) kind: TransportKind,
    pub(super) peer: Arc<Peer>,
    pub(super) pid: i32,
    pub(super) process: RemoteProcess,
    /// Readable when the process is dead.
    pub(super) pidfd: OwnedFd,
    pub(super) control: ControlPage,
    /// Whether copies by address work, and if not why.
    pub(super) cma: Result<(), String>,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) shared: Arc<Shared>,
    pub(super) key: u64,
    pub(super) to: Attachment,
    pub(super) channel: Channel,
    pub(super) state: Mutex<State>,
    /// Something in `state` was removed.
    pub(super) changed: Condvar,
    /// Set before `State::ended`, so that the copy path need not lock.
    pub(super) down: AtomicBool,
    copying: AtomicUsize,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) grants: Grants,
    pub(super) asks: Asks,
    pub(super) ready: VecDeque<Slice>,
    /// Batches whose slices a thread is copying, one entry per thread.
    pub(super) running: Vec<Arc<BatchCore>>,
    /// Why nothing works any more.
    pub(super) ended: Option<Ended>,
}

/// Why a link is of no use any more.
#[derive(Clone, Debug)]
pub(super) enum Ended {
    /// By this side.
    Closed,
    /// The peer is gone, or broke the protocol.
    Down(String),
}

impl Client {
    pub(super) fn new(shared: &Arc<Shared>, key: u64, channel: Channel, to: Attachment) -> Self {
        Client {
            shared: Arc::clone(shared),
            key,
            to,
            channel,
            state: Mutex::default(),
            changed: Condvar::new(),
            down: AtomicBool::new(false),
            copying: AtomicUsize::new(0),
        }
    }

    pub(super) fn kind(&self) -> TransportKind {
        self.to.kind
    }

    pub(super) fn open_slices(&self) -> usize {
        let state = lock(&self.state);
        state.asks.waiting() + state.ready.len() + self.copying.load(Ordering::Acquire)
    }

    /// Whether slices to `target` can be served. Asks the owner when that is not known yet.
    pub(super) fn accepts(&self, target: ByteRange) -> bool {
        if self.to.cma.is_ok() {
            return true;
        }
        let mut state = lock(&self.state);
        if let Some(grant) = state.grants.find(target) {
            return grant.mapping.is_some();
        }
        if state.ended.is_none() && state.asks.len() < self.shared.options.max_waiting {
            self.ask(&mut state, target, None);
        }
        false
    }

    /// Takes slices from the front; all but those that would have to wait for a grant when too many do.
    pub(super) fn submit(&self, slices: &mut Vec<Slice>) {
        // Taking from the end of the reversed list keeps the caller's allocation and costs nothing per slice.
        slices.reverse();
        while let Some(batch) = slices.last().and_then(|s| s.token.batch().cloned()) {
            let mut state = lock(&self.state);
            state.running.push(Arc::clone(&batch));
            let mut grant = slices.last().and_then(|s| state.grants.find(s.target));
            drop(state);
            let mut full = false;
            // An entry of `running` stands for one batch; slices of another are taken in the next turn.
            while let Some(slice) = slices.pop_if(|s| s.token.is_of(&batch)) {
                grant = grant.filter(|g| g.region.contains(slice.target));
                grant = grant.or_else(|| lock(&self.state).grants.find(slice.target));
                let left = match &grant {
                    Some(grant) => self.attempt(grant, slice),
                    None => Some(slice),
                };
                if let Some(Err(slice)) = left.map(|s| self.enqueue(s)) {
                    slices.push(slice);
                    full = true;
                    break;
                }
            }
            self.leave(&batch);
            if full {
                break;
            }
        }
        slices.reverse();
    }

    /// Copies a slice and settles it; hands it back if the grant is no longer good.
    fn attempt(&self, grant: &Grant, slice: Slice) -> Option<Slice> {
        if self.down.load(Ordering::Acquire) {
            let error = self.ended_error(slice.target);
            slice.token.fail(error);
            return None;
        }
        let Some(access) = self.to.control.enter(grant.slot, grant.sequence) else {
            lock(&self.state).grants.remove(grant.slot, grant.sequence);
            return Some(slice);
        };
        self.copying.fetch_add(1, Ordering::AcqRel);
        let copied = match (&grant.mapping, &self.to.cma) {
            (Some(mapping), _) if mapping.copy(slice.opcode, slice.local, slice.target, &access) => Ok(()),
            (Some(_), _) => Err(CopyFault::Revoked),
            (None, Ok(())) => {
                // The id of a dead process may mean another process by now.
                let go_on = || !self.down.load(Ordering::Acquire) && !self.is_dead();
                cma::copy(self.to.process, &slice, &access, &self.to.peer, go_on)
            }
            (None, Err(reason)) => Err(CopyFault::Error(TransferError::Unavailable {
                what: format!("{} to segment {}", self.kind().name(), self.to.peer.segment),
                reason: format!("{} was not allocated by its engine, and cma: {reason}", slice.target),
            })),
        };
        // Revoked meanwhile: the owner may have cut the mapping off, so that a write went nowhere.
        let copied = copied.and_then(|()| if access.still_granted() { Ok(()) } else { Err(CopyFault::Revoked) });
        drop(access);
        match copied {
            Ok(()) if !self.down.load(Ordering::Acquire) => slice.token.complete(),
            Ok(()) => {
                let error = self.ended_error(slice.target);
                slice.token.fail(error);
            }
            Err(CopyFault::Revoked) => {
                let error = self.refused(slice.target);
                slice.token.fail(error);
            }
            Err(CopyFault::Gone) => {
                // Where it is ending already, it is for another reason.
                if !self.down.load(Ordering::Acquire) {
                    self.go_down("process ended");
                }
                let error = self.ended_error(slice.target);
                slice.token.fail(error);
            }
            Err(CopyFault::Error(error)) => slice.token.fail(error),
        }
        self.copying.fetch_sub(1, Ordering::AcqRel);
        None
    }

    /// Lets a slice wait for its grant.
    ///
    /// # Errors
    /// The slice, when too many wait.
    fn enqueue(&self, slice: Slice) -> Result<(), Slice> {
        let mut state = lock(&self.state);
        if state.ended.is_some() {
            drop(state);
            let error = self.ended_error(slice.target);
            slice.token.fail(error);
            return Ok(());
        }
        if state.asks.waiting() >= self.shared.options.max_waiting {
            return Err(slice);
        }
        let target = slice.target;
        self.ask(&mut state, target, Some(slice));
        Ok(())
    }

    /// Asks for the region of `range`, once for all slices that seem to be in one published buffer.
    pub(super) fn ask(&self, state: &mut State, range: ByteRange, slice: Option<Slice>) {
        let buffers = self.to.peer.descriptor.buffers.iter();
        let mut published = buffers.filter_map(|b| ByteRange::new(b.addr, b.length));
        let group = published.find(|b| b.contains(range)).unwrap_or(range);
        let want_file = self.kind() == TransportKind::Shm;
        state.asks.add(group, range, want_file, slice);
        self.pump(state);
    }

    /// Sends the questions whose turn it is.
    pub(super) fn pump(&self, state: &mut State) {
        let mut sent = 0;
        while let Some((id, range, want_file)) =
            state.asks.send_next(Instant::now(), self.shared.options.answer_timeout)
        {
            sent += 1;
            // A socket that takes nothing any more is reported to `tw-local`, which ends the link.
            if let Err(error) = self.channel.send(Packet::new(&Message::Ask { id, range, want_file })) {
                tracing::debug!(%error, peer = self.to.peer.address, "same-host question not sent");
            }
        }
        if sent != 0 {
            self.shared.wake();
        }
    }

    /// Runs the slices whose grant came; on `tw-local-copy`.
    fn run_ready(&self) {
        loop {
            let mut state = lock(&self.state);
            let Some(slice) = state.ready.pop_front() else { return };
            let Some(batch) = slice.token.batch().cloned() else { continue };
            state.running.push(Arc::clone(&batch));
            let grant = state.grants.find(slice.target);
            drop(state);
            let left = match &grant {
                Some(grant) => self.attempt(grant, slice),
                None => Some(slice),
            };
            if let Some(slice) = left {
                // It waited before, so it may again whatever the limit.
                let mut state = lock(&self.state);
                if state.ended.is_none() {
                    let target = slice.target;
                    self.ask(&mut state, target, Some(slice));
                } else {
                    drop(state);
                    let error = self.ended_error(slice.target);
                    slice.token.fail(error);
                }
            }
            self.leave(&batch);
        }
    }

    fn leave(&self, batch: &Arc<BatchCore>) {
        let mut state = lock(&self.state);
        if let Some(index) = state.running.iter().position(|b| Arc::ptr_eq(b, batch)) {
            state.running.swap_remove(index);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Ends the waiting slices of `batch`, and waits for the thread that is copying others (a submit in progress).
    pub(super) fn cancel(&self, batch: &Arc<BatchCore>, error: &dyn Fn(ByteRange) -> TransferError) {
        loop {
            let mut state = lock(&self.state);
            let mut ended = state.asks.extract(|s| s.token.is_of(batch));
            let (of, rest): (Vec<_>, _) =
                std::mem::take(&mut state.ready).into_iter().partition(|s| s.token.is_of(batch));
            state.ready = rest.into();
            ended.extend(of);
            if ended.is_empty() {
                if !state.running.iter().any(|b| Arc::ptr_eq(b, batch)) {
                    return;
                }
                drop(self.changed.wait(state).unwrap_or_else(PoisonError::into_inner));
                continue;
            }
            drop(state);
            for slice in ended {
                let error = error(slice.target);
                slice.token.fail(error);
            }
        }
    }

    pub(super) fn describe(&self) -> String {
        let (mapped, by_address) = lock(&self.state).grants.counts();
        let cma = match &self.to.cma {
            Ok(()) => "cma works".to_owned(),
            Err(reason) => format!("cma does not work: {reason}"),
        };
        format!("process {}, {mapped} regions mapped, {by_address} by address, {cma}", self.to.pid)
    }
}

/// The `tw-local-copy` thread: copies what had to wait for a grant, until the other end of the queue goes.
pub(super) fn copy_loop(queue: &mpsc::Receiver<Arc<Client>>) {
    for client in queue {
        client.run_ready();
    }
}
