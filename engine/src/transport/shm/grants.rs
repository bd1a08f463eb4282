//! What a link knows about its peer's regions.
//!
//! Invariants:
//! * cached grants never overlap: a newer one replaces what it overlaps;
//! * a cached grant may be revoked already: only the control page decides.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tidewire_core::ByteRange;

use crate::shm::PeerMapping;

/// The right to use one region of the peer, until revoked.
#[derive(Debug)]
pub(super) struct Grant {
    pub(super) region: ByteRange,
    pub(super) slot: u32,
    pub(super) sequence: u64,
    /// The region mapped here; without it the region is reached by address.
    pub(super) mapping: Option<PeerMapping>,
    /// When it was last looked up, in look-ups of the cache.
    used: AtomicU64,
}

impl Grant {
    pub(super) fn new(region: ByteRange, slot: u32, sequence: u64, mapping: Option<PeerMapping>) -> Self {
        Grant { region, slot, sequence, mapping, used: AtomicU64::new(0) }
    }
}

/// Grants by address.
#[derive(Debug, Default)]
pub(super) struct Grants {
    sorted: Vec<Arc<Grant>>,
    clock: u64,
}

impl Grants {
    /// The grant whose region holds `range`.
    pub(super) fn find(&mut self, range: ByteRange) -> Option<Arc<Grant>> {
        let index = self.sorted.partition_point(|g| g.region.addr() <= range.addr()).checked_sub(1)?;
        let grant = self.sorted.get(index).filter(|g| g.region.contains(range))?;
        self.clock += 1;
        grant.used.store(self.clock, Ordering::Relaxed);
        Some(Arc::clone(grant))
    }

    /// The cached grant that is the same as this one of the peer, if any.
    pub(super) fn same(&self, slot: u32, sequence: u64, by_file: bool) -> Option<Arc<Grant>> {
        let same = |g: &&Arc<Grant>| g.slot == slot && g.sequence == sequence && g.mapping.is_some() == by_file;
        self.sorted.iter().find(same).cloned()
    }

    /// Adds a grant. Returns what had to go for it: what it overlaps, and the one longest unused when there are more than
    /// `limit`.
    pub(super) fn insert(&mut self, grant: &Arc<Grant>, limit: usize) -> Vec<Arc<Grant>> {
        let mut gone: Vec<_> = self.sorted.extract_if(.., |g| g.region.overlaps(grant.region)).collect();
        if self.sorted.len() >= limit.max(1) {
            let oldest = self.sorted.iter().enumerate().min_by_key(|(_, g)| g.used.load(Ordering::Relaxed));
            if let Some(index) = oldest.map(|(index, _)| index) {
                gone.push(self.sorted.remove(index));
            }
        }
        self.clock += 1;
        grant.used.store(self.clock, Ordering::Relaxed);
        let index = self.sorted.partition_point(|g| g.region.addr() < grant.region.addr());
        self.sorted.insert(index, Arc::clone(grant));
        gone
    }

    /// Drops a grant by its slot.
    pub(super) fn remove(&mut self, slot: u32, sequence: u64) {
        self.sorted.retain(|g| g.slot != slot || g.sequence != sequence);
    }

    /// Drops all.
    pub(super) fn clear(&mut self) {
        self.sorted.clear();
    }

    /// How many are mapped, and how many are reached by address.
    pub(super) fn counts(&self) -> (usize, usize) {
        let mapped = self.sorted.iter().filter(|g| g.mapping.is_some()).count();
        (mapped, self.sorted.len() - mapped)
    }

    /// All of them.
    pub(super) fn all(&self) -> Vec<Arc<Grant>> {
        self.sorted.clone()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn grant(addr: u64, len: u64, slot: u32) -> Arc<Grant> {
        Arc::new(Grant::new(ByteRange::new(addr, len).unwrap(), slot, 3, None))
    }

    #[test]
    fn newer_grant_replaces_what_it_overlaps_and_the_longest_unused_goes_at_the_limit() {
        let mut grants = Grants::default();
        let range = |addr| ByteRange::new(addr, 4).unwrap();
        for slot in 0..3 {
            assert!(grants.insert(&grant(u64::from(slot) * 100 + 1, 50, slot), 3).is_empty());
        }
        assert_eq!(grants.find(range(1)).map(|g| g.slot), Some(0));
        assert!(grants.find(range(48)).is_none() && grants.find(range(90)).is_none());
        let gone = grants.insert(&grant(120, 10, 7), 3);
        assert_eq!(gone.iter().map(|g| g.slot).collect::<Vec<_>>(), [1]);
        let gone = grants.insert(&grant(1000, 10, 8), 3);
        assert_eq!(gone.iter().map(|g| g.slot).collect::<Vec<_>>(), [2], "slot 0 was used later than slot 2");
        assert_eq!(grants.counts(), (0, 3));
    }
}
