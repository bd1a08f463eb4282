//! Questions to the owner of memory, and the slices that wait for their answers.
//!
//! Invariants:
//! * at most [`IN_FLIGHT`] questions are with the owner (each answer may carry a file, and the kernel limits those);
//! * a question outlives the slices that waited for it: its answer is worth keeping.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tidewire_core::ByteRange;

use crate::transport::Slice;

/// Questions with the owner at most.
const IN_FLIGHT: usize = 64;

/// One question.
#[derive(Debug)]
pub(super) struct Ask {
    /// What slices are grouped by: the published buffer they seem to be in, or their own range.
    pub(super) group: ByteRange,
    /// The range asked for.
    pub(super) range: ByteRange,
    pub(super) want_file: bool,
    pub(super) slices: Vec<Slice>,
    /// When it was sent and by when it must be answered; `None` while it waits for its turn.
    sent: Option<(Instant, Instant)>,
}

impl Ask {
    /// How long the owner has been silent on this question.
    pub(super) fn silent_ms(&self, now: Instant) -> u64 {
        self.sent.map_or(0, |(at, _)| now.saturating_duration_since(at).as_millis() as u64)
    }
}

/// All open questions of a link.
#[derive(Debug, Default)]
pub(super) struct Asks {
    open: BTreeMap<u64, Ask>,
    next_id: u64,
    in_flight: usize,
}

impl Asks {
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Open questions.
    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    /// Slices that wait.
    pub(super) fn waiting(&self) -> usize {
        self.open.values().map(|a| a.slices.len()).sum()
    }

    /// Lets `slice` wait for the answer about its `group`, asking for `range` if nobody did yet.
    pub(super) fn add(&mut self, group: ByteRange, range: ByteRange, want_file: bool, slice: Option<Slice>) {
        let same = self.open.values_mut().find(|a| a.group == group && a.want_file == want_file);
        match same {
            Some(ask) => ask.slices.extend(slice),
            None => {
                let ask = Ask { group, range, want_file, slices: slice.into_iter().collect(), sent: None };
                self.open.insert(self.next_id, ask);
                self.next_id += 1;
            }
        }
    }

    /// The next question to send, if another may be; it counts as sent.
    pub(super) fn send_next(&mut self, now: Instant, timeout: Duration) -> Option<(u64, ByteRange, bool)> {
        if self.in_flight >= IN_FLIGHT {
            return None;
        }
        let (id, ask) = self.open.iter_mut().find(|(_, a)| a.sent.is_none())?;
        ask.sent = Some((now, now + timeout));
        self.in_flight += 1;
        Some((*id, ask.range, ask.want_file))
    }

    /// Ends a question; `None` if it expired already.
    pub(super) fn take(&mut self, id: u64) -> Option<Ask> {
        let ask = self.open.remove(&id)?;
        self.in_flight -= usize::from(ask.sent.is_some());
        Some(ask)
    }

    /// The range of an open question.
    pub(super) fn range_of(&self, id: u64) -> Option<ByteRange> {
        self.open.get(&id).map(|a| a.range)
    }

    /// The earliest deadline.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.open.values().filter_map(|a| a.sent.map(|(_, deadline)| deadline)).min()
    }

    /// Ends the questions whose deadline passed.
    pub(super) fn take_expired(&mut self, now: Instant) -> Vec<Ask> {
        let late = |a: &Ask| a.sent.is_some_and(|(_, deadline)| deadline <= now);
        let ids: Vec<u64> = self.open.iter().filter(|(_, a)| late(a)).map(|(id, _)| *id).collect();
        ids.into_iter().filter_map(|id| self.take(id)).collect()
    }

    /// Ends all questions.
    pub(super) fn take_all(&mut self) -> Vec<Slice> {
        self.in_flight = 0;
        std::mem::take(&mut self.open).into_values().flat_map(|a| a.slices).collect()
    }

    /// Takes the waiting slices that `of` picks.
    pub(super) fn extract(&mut self, of: impl Fn(&Slice) -> bool) -> Vec<Slice> {
        self.open.values_mut().flat_map(|a| a.slices.extract_if(.., |s| of(s)).collect::<Vec<_>>()).collect()
    }
}
