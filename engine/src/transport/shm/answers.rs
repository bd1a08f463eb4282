//! What a link does with the owner's messages; runs on `tw-local`.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Instant,
};

use rustix::event::epoll::EventFlags;
use tidewire_core::{
    ByteRange, TransferError,
    local::{DenyReason, Message},
};

use super::{
    asks::Ask,
    client::{Client, State},
    grants::Grant,
    socket::{Packet, Received},
};
use crate::{
    memory::lock,
    shm::{PeerMapping, SLOTS},
    transport::{Slice, TransportKind},
};

/// The fields of a [`Message::Grant`] that matter.
struct Granted {
    slot: u32,
    sequence: u64,
    region: ByteRange,
    /// Set if the owner counts this grant as one by file.
    file_offset: Option<u64>,
    /// Missing where the kernel dropped it: the process has no descriptor left.
    file: Option<OwnedFd>,
}

impl Client {
    /// Reads and handles what the socket has, at most `turn` packets.
    pub(super) fn on_ready(self: &Arc<Self>, flags: EventFlags, turn: usize) {
        if let Err(reason) = self.read_packets(flags, turn) {
            self.go_down(&reason);
        }
    }

    fn read_packets(self: &Arc<Self>, flags: EventFlags, turn: usize) -> Result<(), String> {
        if flags.contains(EventFlags::OUT) {
            self.channel.flush().map_err(|e| e.to_string())?;
        }
        for _ in 0..turn {
            match self.channel.receive().map_err(|e| e.to_string())? {
                Received::Message(message, file) => self.on_message(message, file)?,
                Received::Nothing => return Ok(()),
                Received::Closed => return Err("connection closed by the peer".to_owned()),
            }
        }
        Ok(())
    }

    fn on_message(self: &Arc<Self>, message: Message, file: Option<OwnedFd>) -> Result<(), String> {
        match message {
            Message::Grant { id, slot, sequence, region, file_offset } => {
                self.on_grant(id, Granted { slot, sequence, region, file_offset, file })
            }
            Message::Deny { id, reason } => {
                self.on_deny(id, reason);
                Ok(())
            }
            Message::Revoke { slot, sequence } => {
                lock(&self.state).grants.remove(slot, sequence);
                Ok(())
            }
            _ => Err("peer sent a message that an owner does not send".to_owned()),
        }
    }

    fn on_grant(self: &Arc<Self>, id: u64, granted: Granted) -> Result<(), String> {
        let Some(range) = lock(&self.state).asks.range_of(id) else { return Ok(()) };
        if granted.slot >= SLOTS || !granted.region.contains(range) {
            return Err("peer granted something else than was asked for".to_owned());
        }
        // A grant by file must not be used by address: the owner would take a fence for enough.
        let by_file = granted.file_offset.is_some();
        let known = lock(&self.state).grants.same(granted.slot, granted.sequence, by_file);
        let grant = match known {
            Some(grant) => Ok(grant),
            None => self.make_grant(granted),
        };
        let mut state = lock(&self.state);
        let Some(ask) = state.asks.take(id) else { return Ok(()) };
        let mut failed = Vec::new();
        match grant {
            Ok(grant) => {
                self.keep(&mut state, &grant);
                self.distribute(&mut state, ask.slices, grant.region);
            }
            // By address, then, where that is allowed.
            Err(error) if self.to.cma.is_ok() && ask.want_file => {
                tracing::warn!(%error, range = %ask.range, "region of a same-host peer is not mapped, cma is used");
                for slice in ask.slices {
                    state.asks.add(slice.target, slice.target, false, Some(slice));
                }
            }
            Err(error) => failed.extend(ask.slices.into_iter().map(|s| (s, error.clone()))),
        }
        self.after_answer(state, failed);
        Ok(())
    }

    fn make_grant(&self, granted: Granted) -> Result<Arc<Grant>, TransferError> {
        let Granted { slot, sequence, region, file_offset, file } = granted;
        let mapping = match (file_offset, file) {
            (Some(offset), Some(file)) => {
                let mapped = PeerMapping::new(file.as_fd(), offset, region);
                Some(mapped.map_err(|e| TransferError::os("mmap of a peer's region", &e))?)
            }
            (Some(_), None) => {
                let error = io::Error::from(rustix::io::Errno::MFILE);
                return Err(TransferError::os("recvmsg of the file of a peer's region", &error));
            }
            (None, _) => None,
        };
        Ok(Arc::new(Grant::new(region, slot, sequence, mapping)))
    }

    fn keep(&self, state: &mut State, grant: &Arc<Grant>) {
        for old in state.grants.insert(grant, self.shared.options.max_mappings) {
            if Arc::ptr_eq(&old, grant) {
                continue;
            }
            let release = Message::Release { slot: old.slot, sequence: old.sequence };
            if let Err(error) = self.channel.send(Packet::new(&release)) {
                tracing::debug!(%error, "grant not given back");
            }
        }
    }

    /// Slices inside `region` are ready; the others were grouped with it by mistake and ask for themselves.
    fn distribute(self: &Arc<Self>, state: &mut State, slices: Vec<Slice>, region: ByteRange) {
        let (inside, outside): (Vec<_>, Vec<_>) = slices.into_iter().partition(|s| region.contains(s.target));
        if !inside.is_empty() {
            state.ready.extend(inside);
            if let Some(jobs) = lock(&self.shared.jobs).as_ref() {
                // The receiver lives as long as its thread; without it the engine is stopping and closes this link.
                let _ = jobs.send(Arc::clone(self));
            }
        }
        self.ask_singly(state, outside);
    }

    fn ask_singly(&self, state: &mut State, slices: Vec<Slice>) {
        let want_file = self.kind() == TransportKind::Shm;
        for slice in slices {
            state.asks.add(slice.target, slice.target, want_file, Some(slice));
        }
    }

    fn on_deny(&self, id: u64, reason: DenyReason) {
        let mut state = lock(&self.state);
        let Some(Ask { range, slices, .. }) = state.asks.take(id) else { return };
        let mut failed = Vec::new();
        match reason {
            DenyReason::NotRegistered => {
                let (asked, others): (Vec<_>, Vec<_>) = slices.into_iter().partition(|s| s.target == range);
                failed.extend(asked.into_iter().map(|s| {
                    let error = self.refused(s.target);
                    (s, error)
                }));
                self.ask_singly(&mut state, others);
            }
            DenyReason::Limit | DenyReason::Failed => {
                let what = format!("{} to segment {}", self.kind().name(), self.to.peer.segment);
                let reason = "the peer cannot grant more regions".to_owned();
                let error = TransferError::Unavailable { what, reason };
                failed.extend(slices.into_iter().map(|s| (s, error.clone())));
            }
        }
        self.after_answer(state, failed);
    }

    /// Sends what may be sent now, wakes who waits, and fails slices with the lock released.
    fn after_answer(&self, mut state: std::sync::MutexGuard<'_, State>, failed: Vec<(Slice, TransferError)>) {
        self.pump(&mut state);
        drop(state);
        self.changed.notify_all();
        for (slice, error) in failed {
            slice.token.fail(error);
        }
    }

    /// When [`Self::expire`] has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        lock(&self.state).asks.next_deadline()
    }

    /// Fails the slices whose question was not answered in time.
    pub(super) fn expire(&self, now: Instant) {
        let mut state = lock(&self.state);
        let late = state.asks.take_expired(now);
        if late.is_empty() {
            return;
        }
        let mut failed = Vec::new();
        for ask in late {
            let silent_ms = ask.silent_ms(now);
            for slice in ask.slices {
                let (segment, peer) = (self.to.peer.segment.clone(), self.to.peer.address.clone());
                let error = TransferError::PeerSilent { segment, peer, range: slice.target, silent_ms };
                failed.push((slice, error));
            }
        }
        self.after_answer(state, failed);
    }
}
