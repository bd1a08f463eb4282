//! The path to one official peer: what the engine holds of the connections that the loop owns.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::sync_channel,
    },
    time::Duration,
};

use tidewire_core::{ByteRange, TransferError};

use super::{
    poller::Mailbox,
    request::{OpenGuard, Request},
    worker::Command,
};
use crate::{
    batch::BatchCore,
    memory::lock,
    transport::{Drive, Link, Peer, Slice, TransportKind},
};

/// What the link and the loop both see.
#[derive(Debug)]
pub(super) struct LinkShared {
    pub(super) key: u64,
    pub(super) address: SocketAddr,
    /// Version 2.
    pub(super) acknowledged: bool,
    peer: Arc<Peer>,
    open: Arc<AtomicUsize>,
    lanes: AtomicUsize,
    retries: AtomicU64,
    failure: Mutex<Option<TransferError>>,
}

impl LinkShared {
    pub(super) fn new(key: u64, address: SocketAddr, acknowledged: bool, peer: Arc<Peer>) -> Self {
        LinkShared {
            key,
            address,
            acknowledged,
            peer,
            open: Arc::default(),
            lanes: AtomicUsize::new(0),
            retries: AtomicU64::new(0),
            failure: Mutex::new(None),
        }
    }

    pub(super) fn open_requests(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    pub(super) fn note_lanes(&self, lanes: usize) {
        self.lanes.store(lanes, Ordering::Relaxed);
    }

    pub(super) fn note_retry(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn failure(&self) -> Option<TransferError> {
        lock(&self.failure).clone()
    }

    /// Keeps the first failure.
    pub(super) fn set_failure(&self, error: TransferError) {
        lock(&self.failure).get_or_insert(error);
    }

    pub(super) fn unreachable(&self, error: &io::Error) -> TransferError {
        unreachable(&self.peer, &format!("{}: {error}", self.address))
    }

    pub(super) fn silent(&self, range: ByteRange, silence: Duration) -> TransferError {
        TransferError::PeerSilent {
            segment: self.peer.segment.clone(),
            peer: self.peer.address.clone(),
            range,
            silent_ms: silence.as_millis() as u64,
        }
    }

    pub(super) fn protocol_error(&self, reason: &str) -> TransferError {
        TransferError::Protocol { peer: self.peer.address.clone(), reason: reason.to_owned() }
    }

    /// Fails a request that the target refused.
    pub(super) fn refuse(&self, request: Request) {
        let (segment, peer) = (self.peer.segment.clone(), self.peer.address.clone());
        let range = request.target;
        request.fail(TransferError::OutOfBounds { segment, peer, range });
    }

    /// Fails a request whose second connection was lost too, which ends the link. Version 1 has no other way to refuse a
    /// range than to close, so there it is a refusal.
    pub(super) fn fail_lost(&self, request: Request, reason: &str) {
        if !self.acknowledged {
            return self.refuse(request);
        }
        self.set_failure(unreachable(&self.peer, &format!("{}: {reason}", self.address)));
        self.fail_down(request, reason);
    }

    /// Fails a request because the peer is gone.
    pub(super) fn fail_down(&self, request: Request, reason: &str) {
        let error = TransferError::PeerDown {
            segment: self.peer.segment.clone(),
            peer: self.peer.address.clone(),
            range: request.target,
            reason: format!("{}: {reason}", self.address),
        };
        request.fail(error);
    }
}

/// The error of a peer that could not be connected.
pub(super) fn unreachable(peer: &Peer, reason: &str) -> TransferError {
    TransferError::Unreachable {
        segment: peer.segment.clone(),
        peer: peer.address.clone(),
        transport: TransportKind::MooncakeTcp.name(),
        reason: reason.to_owned(),
    }
}

/// Link to an official peer. Its loop makes progress by itself; waiting is parking.
#[derive(Debug)]
pub(super) struct MooncakeLink {
    pub(super) shared: Arc<LinkShared>,
    pub(super) mailbox: Arc<Mailbox<Command>>,
    pub(super) max_open_slices: usize,
}

impl MooncakeLink {
    /// Asks the loop for requests and waits for its answer; nothing if the loop has ended (it settled everything then).
    fn ask(&self, command: impl FnOnce(std::sync::mpsc::SyncSender<Vec<Request>>) -> Command) -> Vec<Request> {
        let (sender, answer) = sync_channel(1);
        match self.mailbox.put(command(sender)) {
            Ok(()) => answer.recv().unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    }
}

impl Link for MooncakeLink {
    fn kind(&self) -> TransportKind {
        TransportKind::MooncakeTcp
    }

    fn submit(&self, slices: &mut Vec<Slice>) {
        if let Some(failure) = self.shared.failure() {
            return slices.drain(..).for_each(|slice| slice.token.fail(failure.clone()));
        }
        let room = self.max_open_slices.saturating_sub(self.shared.open_requests());
        let open = &self.shared.open;
        let requests: Vec<Request> = slices
            .drain(..room.min(slices.len()))
            .filter_map(|slice| Request::new(slice, OpenGuard::new(open), self.shared.acknowledged))
            .collect();
        if requests.is_empty() {
            return;
        }
        let command = Command::Submit { link: self.shared.key, requests };
        if let Err(Command::Submit { requests, .. }) = self.mailbox.put(command) {
            requests.into_iter().for_each(|request| request.fail(TransferError::ShutDown));
        }
    }

    fn drive(&self, batch: &Arc<BatchCore>, how: Drive) -> bool {
        batch.park(how.deadline)
    }

    fn cancel(&self, batch: &Arc<BatchCore>, error: &dyn Fn(ByteRange) -> TransferError) {
        let (link, batch) = (self.shared.key, Arc::clone(batch));
        for request in self.ask(|answer| Command::Cancel { link, batch, answer }) {
            let error = error(request.target);
            request.fail(error);
        }
    }

    fn open_slices(&self) -> usize {
        self.shared.open_requests()
    }

    fn failure(&self) -> Option<TransferError> {
        self.shared.failure()
    }

    fn describe(&self) -> String {
        let version = if self.shared.acknowledged { 2 } else { 1 };
        let (lanes, retries) = (self.shared.lanes.load(Ordering::Relaxed), self.shared.retries.load(Ordering::Relaxed));
        format!("mooncake v{version} to {}, {lanes} connections, {retries} retries", self.shared.address)
    }

    fn close(&self) {
        let link = self.shared.key;
        self.shared.set_failure(TransferError::ShutDown);
        for request in self.ask(|answer| Command::Remove { link, answer: Some(answer) }) {
            request.fail(TransferError::ShutDown);
        }
    }
}

impl Drop for MooncakeLink {
    fn drop(&mut self) {
        // A loop that has ended holds nothing of this link.
        let _ = self.mailbox.put(Command::Remove { link: self.shared.key, answer: None });
    }
}
