//! Loop `tw-mooncake-out`: owns every outgoing connection, deals requests out to them, retries and times out.
//!
//! Other threads reach it only through its mailbox. Requests of a link wait in one line; lanes take from it while they have
//! room, and a lane is added when all are full. A lane that is lost puts its requests back in line once.
//!
//! Invariants:
//! * a request is in its link's line or on one lane, and is settled exactly once;
//! * after the answer to a cancel, no request of that batch is in the loop and its connections are reset.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::OwnedFd,
    sync::{Arc, mpsc::SyncSender},
    time::{Duration, Instant},
};

use tidewire_core::{ByteRange, TransferError};

use super::{
    MooncakeTcpOptions, dial,
    lane::{End, Lane},
    link::LinkShared,
    poller::{CloseOnDrop, Mailbox, Poller, Slab},
    request::Request,
};
use crate::batch::BatchCore;

/// Losses of a connection that a request survives.
const MAX_LOSSES: u32 = 1;

/// What the loop is asked to do.
#[derive(Debug)]
pub(super) enum Command {
    /// Serve a new link over a connected socket.
    Add { link: Arc<LinkShared>, socket: OwnedFd },
    /// Move slices.
    Submit { link: u64, requests: Vec<Request> },
    /// Hand back the requests of a batch; nothing touches their memory any more.
    Cancel { link: u64, batch: Arc<BatchCore>, answer: SyncSender<Vec<Request>> },
    /// Hand back all requests of a link and forget it.
    Remove { link: u64, answer: Option<SyncSender<Vec<Request>>> },
    /// End when nothing is open, at the latest at this time.
    Stop { deadline: Instant },
}

#[derive(Debug)]
struct LinkState {
    shared: Arc<LinkShared>,
    line: VecDeque<Request>,
    lanes: Vec<u64>,
    /// A further connection was refused; the ones there are have to do.
    grown: bool,
}

/// The loop.
#[derive(Debug)]
pub(super) struct Worker {
    options: MooncakeTcpOptions,
    poller: Poller,
    mailbox: Arc<Mailbox<Command>>,
    links: HashMap<u64, LinkState>,
    lanes: Slab<Lane>,
    tick_at: Option<Instant>,
    stop_at: Option<Instant>,
    now: Instant,
}

impl Worker {
    /// Starts the loop; it ends on [`Command::Stop`].
    pub(super) fn spawn(
        options: MooncakeTcpOptions,
    ) -> io::Result<(Arc<Mailbox<Command>>, std::thread::JoinHandle<()>)> {
        let (poller, mailbox) = Poller::new()?;
        let worker = Worker {
            options,
            poller,
            mailbox: Arc::clone(&mailbox),
            links: HashMap::new(),
            lanes: Slab::default(),
            tick_at: None,
            stop_at: None,
            now: Instant::now(),
        };
        let thread = std::thread::Builder::new().name("tw-mooncake-out".to_owned()).spawn(move || worker.run())?;
        Ok((mailbox, thread))
    }

    fn run(mut self) {
        let _close = CloseOnDrop(Arc::clone(&self.mailbox));
        let mut ready = Vec::new();
        while !self.may_stop() {
            let until = self.tick_at.into_iter().chain(self.stop_at).min();
            let timeout = until.map(|until| until.saturating_duration_since(Instant::now()));
            if let Err(error) = self.poller.wait(&mut ready, timeout) {
                tracing::error!(%error, "mooncake connections cannot be watched, their loop ends");
                break;
            }
            self.now = Instant::now();
            for command in self.mailbox.take() {
                self.obey(command);
            }
            for &(key, _) in &ready {
                self.on_ready(key);
            }
            if self.tick_at.is_some_and(|at| at <= self.now) {
                self.tick();
            }
        }
        let links: Vec<u64> = self.links.keys().copied().collect();
        for request in links.into_iter().flat_map(|link| self.remove_link(link)) {
            request.fail(TransferError::ShutDown);
        }
    }

    fn may_stop(&self) -> bool {
        let idle = || self.links.values().all(|link| link.shared.open_requests() == 0);
        self.stop_at.is_some_and(|deadline| self.now >= deadline || idle())
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Add { link, socket } => self.add_link(link, socket),
            Command::Submit { link, requests } => self.submit(link, requests),
            // A receiver that is gone leaves the requests here, where dropping them settles them as cancelled.
            Command::Cancel { link, batch, answer } => drop(answer.send(self.cancel(link, &batch))),
            Command::Remove { link, answer } => {
                let requests = self.remove_link(link);
                if let Some(answer) = answer {
                    drop(answer.send(requests.into()));
                }
            }
            Command::Stop { deadline } => self.stop_at = Some(deadline),
        }
    }

    fn add_link(&mut self, shared: Arc<LinkShared>, socket: OwnedFd) {
        let key = shared.key;
        let state = LinkState { shared, line: VecDeque::new(), lanes: Vec::new(), grown: false };
        self.links.insert(key, state);
        if let Err(error) = self.add_lane(key, socket, true) {
            self.lane_failed(key, &error);
        }
    }

    fn add_lane(&mut self, link_key: u64, socket: OwnedFd, connected: bool) -> io::Result<()> {
        let Some(link) = self.links.get_mut(&link_key) else { return Ok(()) };
        let mut lane = Lane::new(socket, connected, link.shared.acknowledged, link_key, self.now);
        lane.interest = lane.wanted();
        let interest = lane.interest;
        let key = self.lanes.insert(lane);
        if let Some(lane) = self.lanes.get_mut(key)
            && let Err(error) = self.poller.add(lane.socket(), key, interest)
        {
            self.lanes.remove(key);
            return Err(error);
        }
        link.lanes.push(key);
        link.shared.note_lanes(link.lanes.len());
        self.arm_tick();
        Ok(())
    }

    fn submit(&mut self, link_key: u64, requests: Vec<Request>) {
        let link = self.links.get_mut(&link_key);
        let failure = link.as_ref().map_or(Some(TransferError::ShutDown), |link| link.shared.failure());
        match (link, failure) {
            (Some(link), None) => link.line.extend(requests),
            (_, failure) => {
                let failure = failure.unwrap_or(TransferError::ShutDown);
                return requests.into_iter().for_each(|request| request.fail(failure.clone()));
            }
        }
        self.pump(link_key);
    }

    /// Deals the line out to the lanes, and dials another lane if it is not empty then.
    fn pump(&mut self, link_key: u64) {
        let Some(link) = self.links.get_mut(&link_key) else { return };
        while !link.line.is_empty() {
            let mut best = None;
            for &key in &link.lanes {
                if let Some(lane) = self.lanes.get_mut(key)
                    && lane.has_room()
                    && best.is_none_or(|(backlog, _)| lane.backlog_bytes() < backlog)
                {
                    best = Some((lane.backlog_bytes(), key));
                }
            }
            let Some(lane) = best.and_then(|(_, key)| self.lanes.get_mut(key)) else { break };
            if let Some(request) = link.line.pop_front() {
                lane.push(request, self.now);
            }
        }
        for key in link.lanes.clone() {
            if let Some(lane) = self.lanes.get_mut(key) {
                lane.send(self.now);
            }
            self.rewatch(key);
        }
        match self.links.get(&link_key).map_or(0, |link| link.line.len()) {
            0 => {}
            wanting => self.grow(link_key, wanting),
        }
        self.arm_tick();
    }

    fn grow(&mut self, link_key: u64, wanting: usize) {
        let Some(link) = self.links.get_mut(&link_key) else { return };
        let (acknowledged, address) = (link.shared.acknowledged, link.shared.address);
        let (mut lanes, mut dialling) = (0, 0);
        for &key in &link.lanes {
            if let Some(lane) = self.lanes.get_mut(key) {
                lanes += usize::from(lane.counts());
                dialling += usize::from(!lane.is_connected());
            }
        }
        // Version 1 needs a connection per request; version 2 tries one more at a time.
        let more = if acknowledged { usize::from(dialling == 0) } else { wanting.saturating_sub(dialling) };
        if link.grown && lanes > 0 {
            return;
        }
        for _ in lanes..(lanes + more).min(self.options.lanes_per_peer.max(1)) {
            let dialled = dial::start(address).and_then(|socket| self.add_lane(link_key, socket, false));
            if let Err(error) = dialled {
                return self.lane_failed(link_key, &error);
            }
        }
    }

    fn rewatch(&mut self, key: u64) {
        if let Some(lane) = self.lanes.get_mut(key)
            && lane.wanted() != lane.interest
        {
            lane.interest = lane.wanted();
            if let Err(error) = self.poller.modify(lane.socket(), key, lane.interest) {
                self.end_lane(key, End::Lost(error));
            }
        }
    }

    fn on_ready(&mut self, key: u64) {
        let Some(lane) = self.lanes.get_mut(key) else { return };
        let link = lane.link;
        match lane.ready(self.now) {
            Err(end) => self.end_lane(key, end),
            Ok(()) if lane.is_spent() => drop(self.drop_lane(key)),
            Ok(()) => self.rewatch(key),
        }
        if self.links.get(&link).is_some_and(|link| !link.line.is_empty()) {
            self.pump(link);
        }
    }

    /// Takes a lane out; its requests, in order.
    fn drop_lane(&mut self, key: u64) -> VecDeque<Request> {
        let Some(lane) = self.lanes.remove(key) else { return VecDeque::new() };
        if let Some(link) = self.links.get_mut(&lane.link) {
            link.lanes.retain(|k| *k != key);
            link.shared.note_lanes(link.lanes.len());
        }
        lane.close()
    }

    fn end_lane(&mut self, key: u64, end: End) {
        let Some(link_key) = self.lanes.get_mut(key).map(|lane| lane.link) else { return };
        let mut requests = self.drop_lane(key);
        let Some(link) = self.links.get_mut(&link_key) else { return };
        let shared = Arc::clone(&link.shared);
        let first_is_blamed = matches!(end, End::Rejected | End::Protocol(_));
        let blamed = if first_is_blamed { requests.pop_front() } else { None };
        let reason = match end {
            End::NotConnected(error) => return self.lane_failed(link_key, &error),
            End::Rejected => {
                blamed.into_iter().for_each(|request| shared.refuse(request));
                None
            }
            End::Protocol(reason) => {
                tracing::warn!(peer = %shared.address, reason, "mooncake peer broke the protocol");
                blamed.into_iter().for_each(|request| request.fail(shared.protocol_error(&reason)));
                Some(reason)
            }
            End::Lost(error) => Some(error.to_string()),
        };
        let retry_now = !requests.is_empty();
        for mut request in requests.into_iter().rev() {
            // Behind a refused request nothing was lost, the target just did not look at it.
            if let Some(reason) = &reason {
                request.losses += 1;
                if request.losses > MAX_LOSSES {
                    shared.fail_lost(request, reason);
                    continue;
                }
            }
            shared.note_retry();
            request.rewind();
            link.line.push_front(request);
        }
        if reason.is_some() && retry_now {
            self.retire_lanes(link_key);
        }
    }

    /// What was lost is repeated on a connection made after the loss: the ones there are may be as dead.
    fn retire_lanes(&mut self, link_key: u64) {
        let Some(link) = self.links.get(&link_key) else { return };
        for key in link.lanes.clone() {
            if self.lanes.get_mut(key).is_some_and(Lane::retire) {
                self.drop_lane(key);
            }
        }
    }

    /// A connection could not be made. Without another one the link is down.
    fn lane_failed(&mut self, link_key: u64, error: &io::Error) {
        let Some(link) = self.links.get_mut(&link_key) else { return };
        link.grown = true;
        let lanes = &mut self.lanes;
        if link.lanes.iter().any(|key| lanes.get_mut(*key).is_some_and(|lane| lane.counts())) {
            return;
        }
        let shared = Arc::clone(&link.shared);
        shared.set_failure(shared.unreachable(error));
        for request in std::mem::take(&mut link.line) {
            shared.fail_down(request, &error.to_string());
        }
    }

    fn tick(&mut self) {
        self.tick_at = None;
        let (now, progress, connect) = (self.now, self.options.progress_timeout, self.options.connect_timeout);
        let mut late = Vec::new();
        let mut waiting = false;
        for (key, lane) in self.lanes.iter_mut().filter(|(_, lane)| lane.is_waiting()) {
            let limit = if lane.is_connected() { progress } else { connect };
            match now.saturating_duration_since(lane.progress) >= limit {
                true => late.push((key, lane.link, lane.is_connected())),
                false => waiting = true,
            }
        }
        for (key, link_key, connected) in late {
            if !connected {
                self.end_lane(key, End::NotConnected(io::ErrorKind::TimedOut.into()));
                continue;
            }
            let mut requests = self.drop_lane(key);
            let Some(link) = self.links.get_mut(&link_key) else { continue };
            requests.append(&mut link.line);
            let silent = |range: ByteRange| link.shared.silent(range, progress);
            if let Some(first) = requests.front() {
                link.shared.set_failure(silent(first.target));
            }
            for request in requests {
                let error = silent(request.target);
                request.fail(error);
            }
        }
        if waiting {
            self.arm_tick();
        }
    }

    fn arm_tick(&mut self) {
        if self.tick_at.is_none() {
            let shortest = self.options.progress_timeout.min(self.options.connect_timeout);
            let period = (shortest / 8).clamp(Duration::from_millis(5), Duration::from_millis(500));
            self.tick_at = Some(self.now + period);
        }
    }

    fn cancel(&mut self, link_key: u64, batch: &Arc<BatchCore>) -> Vec<Request> {
        let mut taken = Vec::new();
        let Some(link) = self.links.get_mut(&link_key) else { return taken };
        let mut kept = VecDeque::new();
        for &key in &link.lanes.clone() {
            let carries = self.lanes.get_mut(key).is_some_and(|lane| lane.any(|r| r.token.is_of(batch)));
            if carries {
                kept.append(&mut self.drop_lane(key));
            }
        }
        let Some(link) = self.links.get_mut(&link_key) else { return taken };
        kept.iter_mut().for_each(Request::rewind);
        kept.append(&mut link.line);
        for request in kept {
            if request.token.is_of(batch) { taken.push(request) } else { link.line.push_back(request) }
        }
        self.pump(link_key);
        taken
    }

    fn remove_link(&mut self, link_key: u64) -> VecDeque<Request> {
        let Some(link) = self.links.remove(&link_key) else { return VecDeque::new() };
        let mut requests = VecDeque::new();
        for key in link.lanes {
            requests.append(&mut self.drop_lane(key));
        }
        requests.extend(link.line);
        requests
    }
}
