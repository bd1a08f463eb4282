//! From requests to slices: everything is checked before anything is queued.
//!
//! The target range is not checked against the descriptor: buffers registered after it was read are as good, so only the
//! target can judge.

use std::{
    sync::{Arc, Weak},
    time::Instant,
};

use tidewire_core::{ByteRange, Notify, SegmentId, TransferError, TransferRequest};

use super::{engine::EngineInner, flight::Flight};
use crate::{
    batch::{ClosingStep, ClosingToken},
    memory::{LocalRegion, RegionPin},
    observe::Counters,
    segment::remote::{Links, Path, Segment},
    transport::Slice,
};

/// Checks `requests` and hands them to the links. Blocks only while a link is being made.
///
/// # Errors
/// Those of [`crate::Batch::submit`]; nothing was queued then.
pub fn submit(
    engine: &EngineInner,
    flight: &Arc<Flight>,
    requests: &[TransferRequest],
    notify: Option<Notify>,
) -> Result<(), TransferError> {
    engine.check_gate()?;
    let (capacity, used) = (flight.core.capacity(), flight.core.used());
    if requests.len() > capacity - used {
        return Err(TransferError::BatchFull { capacity, used, requested: requests.len() });
    }
    let plan = Plan::make(engine, requests)?;
    let closing = notify.map(|notify| closing_step(engine, flight, requests, notify)).transpose()?;
    if requests.is_empty() {
        return Ok(());
    }
    plan.queue(engine, flight, requests, closing)
}

/// What the check found, entry by entry.
struct Plan {
    segments: Vec<Aim>,
    entries: Vec<Entry>,
    /// Slices per entry.
    slices: Vec<u32>,
    pins: Vec<RegionPin>,
    bytes: u64,
}

/// A segment of the submit, with its links.
struct Aim {
    id: SegmentId,
    segment: Arc<Segment>,
    links: Arc<Links>,
}

#[derive(Clone, Copy)]
struct Entry {
    target: ByteRange,
    /// Index into [`Plan::segments`].
    aim: usize,
    /// Index into the paths of that segment's links.
    path: usize,
    /// Longest slice of that path.
    step: u64,
}

impl Plan {
    fn make(engine: &EngineInner, requests: &[TransferRequest]) -> Result<Plan, TransferError> {
        let count = requests.len();
        let mut plan = Plan {
            segments: Vec::with_capacity(1),
            entries: Vec::with_capacity(count),
            slices: Vec::with_capacity(count),
            pins: Vec::with_capacity(1),
            bytes: 0,
        };
        // Arguments first: they are cheap to check and must not wait for a link.
        let mut targets = Vec::with_capacity(count);
        let mut known = None;
        for request in requests {
            if known != Some(request.target) {
                engine.segments.check(request.target)?;
                known = Some(request.target);
            }
            targets.push(plan.check(engine, request)?);
        }
        let deadline = Instant::now() + engine.config.tcp_connect_timeout + engine.config.control_timeout;
        let mut last = None;
        for (request, target) in requests.iter().zip(targets) {
            let aim = match last.filter(|(id, _)| *id == request.target) {
                Some((_, aim)) => aim,
                None => plan.aim(engine, request.target, deadline)?,
            };
            last = Some((request.target, aim));
            plan.add_entry(engine, aim, target)?;
        }
        plan.check_queues(engine)?;
        Ok(plan)
    }

    /// Checks one request, and pins its source.
    fn check(&mut self, engine: &EngineInner, request: &TransferRequest) -> Result<ByteRange, TransferError> {
        let (addr, len) = (request.source, request.length);
        if len == 0 {
            return Err(TransferError::ZeroLength { addr });
        }
        let source = ByteRange::new(addr, len).ok_or(TransferError::RangeOverflow { addr, len })?;
        let target = ByteRange::new(request.target_offset, len)
            .ok_or(TransferError::RangeOverflow { addr: request.target_offset, len })?;
        // Entries of a batch are mostly of one buffer.
        let pinned = self.pins.iter().rev().take(4).any(|pin| pin.region().range().contains(source));
        if !pinned {
            let missing = || TransferError::SourceNotRegistered { range: source };
            let region: Arc<LocalRegion> = engine.regions.find(source).ok_or_else(missing)?;
            self.pins.push(region.pin().ok_or_else(missing)?);
        }
        self.bytes += len;
        Ok(target)
    }

    fn aim(&mut self, engine: &EngineInner, id: SegmentId, deadline: Instant) -> Result<usize, TransferError> {
        if let Some(index) = self.segments.iter().position(|aim| aim.id == id) {
            return Ok(index);
        }
        let segment = engine.segments.get(id)?;
        let links = segment.links(&engine.connector, deadline)?;
        self.segments.push(Aim { id, segment, links });
        Ok(self.segments.len() - 1)
    }

    fn add_entry(&mut self, engine: &EngineInner, index: usize, target: ByteRange) -> Result<(), TransferError> {
        let internal = TransferError::Internal { reason: "segment of a checked request is gone" };
        let aim = self.segments.get_mut(index).ok_or(internal)?;
        let path = loop {
            match aim.links.paths.iter().position(|path| path.link.accepts(target)) {
                Some(path) => break path,
                None if aim.links.rest.is_empty() => break 0, // It says best why it does not take it.
                None => aim.links = aim.segment.extend(&engine.connector, &aim.links)?,
            }
        };
        let step = aim.links.paths.get(path).map_or(u64::MAX, |path| path.capabilities.max_slice_bytes.max(1));
        self.entries.push(Entry { target, aim: index, path, step });
        self.slices.push(u32::try_from(target.len().div_ceil(step)).unwrap_or(u32::MAX));
        Ok(())
    }

    /// Refuses a submit that would grow a peer's queue beyond its limit.
    fn check_queues(&self, engine: &EngineInner) -> Result<(), TransferError> {
        let limit = engine.config.max_queued_slices as usize;
        for (index, aim) in self.segments.iter().enumerate() {
            let new: usize =
                self.entries.iter().zip(&self.slices).filter(|(e, _)| e.aim == index).map(|(_, n)| *n as usize).sum();
            let queued: usize = aim.links.paths.iter().map(|path| path.link.open_slices()).sum();
            if queued.saturating_add(new) > limit {
                let peer = aim.segment.resolved().address.to_string();
                return Err(TransferError::QueueFull { segment: aim.segment.name().to_owned(), peer, queued, limit });
            }
        }
        Ok(())
    }

    fn queue(
        self,
        engine: &EngineInner,
        flight: &Arc<Flight>,
        requests: &[TransferRequest],
        closing: Option<ClosingStep>,
    ) -> Result<(), TransferError> {
        let mut inner = flight.submitting()?;
        let submit = flight.core.begin(&self.slices, self.pins, closing)?;
        for (index, (request, entry)) in requests.iter().zip(&self.entries).enumerate() {
            let Some((aim, path)) = self.segments.get(entry.aim).and_then(|aim| path_of(aim, entry.path)) else {
                continue;
            };
            let lane = inner.lane(&path.link, &aim.segment);
            let Some(lane) = inner.lanes.get_mut(lane) else { continue };
            lane.waiting.reserve(self.slices.get(index).map_or(0, |n| *n as usize));
            let mut done = 0;
            while done < entry.target.len() {
                let len = entry.step.min(entry.target.len() - done);
                let Some(target) = ByteRange::new(entry.target.addr() + done, len) else { break };
                lane.waiting.push(Slice {
                    opcode: request.opcode,
                    local: request.source + done,
                    target,
                    token: submit.token(index, len),
                });
                done += len;
            }
        }
        for aim in &self.segments {
            aim.segment.count_bytes(self.bytes / self.segments.len() as u64);
        }
        flight.submitted(&mut inner);
        drop(inner);
        drop(submit);
        Counters::add(&engine.counters.requests, requests.len() as u64);
        Counters::add(&engine.counters.bytes, self.bytes);
        if !flight.core.is_settled() {
            engine.ticker.notice();
        }
        Ok(())
    }
}

fn path_of(aim: &Aim, index: usize) -> Option<(&Aim, &Path)> {
    aim.links.paths.get(index).map(|path| (aim, path))
}

/// What delivers `notify` after the last slice. The target is the segment of the first entry.
fn closing_step(
    engine: &EngineInner,
    flight: &Arc<Flight>,
    requests: &[TransferRequest],
    notify: Notify,
) -> Result<ClosingStep, TransferError> {
    let refused = |segment: &str, reason: &str| TransferError::NotifyFailed {
        segment: segment.to_owned(),
        reason: reason.to_owned(),
    };
    let first = requests.first().ok_or_else(|| refused("", "a notification needs at least one request"))?;
    let segment = engine.segments.get(first.target)?;
    if notify.message.is_empty() {
        return Err(refused(segment.name(), "the message is empty"));
    }
    let counters = Arc::clone(&engine.counters);
    if first.target == SegmentId::LOCAL {
        let inbox = Arc::clone(&engine.inbox);
        return Ok(Box::new(move |token: ClosingToken| match inbox.push(notify) {
            Ok(()) => {
                Counters::add(&counters.notifications_sent, 1);
                token.done();
            }
            Err(error) => {
                let reason = error.to_string();
                token.fail(TransferError::NotifyFailed { segment: segment.name().to_owned(), reason });
            }
        }));
    }
    let (ctl, discovery) = (Arc::clone(&engine.ctl), Arc::clone(&engine.discovery));
    let flight: Weak<Flight> = Arc::downgrade(flight);
    Ok(Box::new(move |token: ClosingToken| {
        let delivery = ctl.spawn(async move {
            let address = segment.resolved().address;
            match discovery.notify(segment.name(), &address, &notify).await {
                Ok(()) => {
                    Counters::add(&counters.notifications_sent, 1);
                    token.done();
                }
                Err(error) => token.fail(error),
            }
        });
        if let Some(flight) = flight.upgrade() {
            flight.set_closing(delivery);
        }
    }))
}
