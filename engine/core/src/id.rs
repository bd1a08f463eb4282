//! Identifiers that carry a generation, so that a stale one is an error and never a wild access.
//!
//! Invariants:
//! * a [`BatchId`] is never 0 and never `u64::MAX` (both mean "failed" to Mooncake's callers);
//! * a [`Generation`] is drawn at random when a process builds its engine and never reused by it.

use std::fmt;

/// A segment opened by this engine. 0 is the engine's own segment; remote ones count from 1 in order of opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentId(pub u32);

impl SegmentId {
    /// The engine's own segment.
    pub const LOCAL: SegmentId = SegmentId(0);
}

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A batch: slab index and generation, packed so that `1 <= id < 2^63`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BatchId(u64);

impl BatchId {
    /// Packs a slab `index` and a `generation` (31 bits are kept; 0 becomes 1).
    pub fn new(index: u32, generation: u32) -> Self {
        let generation = u64::from(generation & 0x7fff_ffff).max(1);
        BatchId(generation << 32 | u64::from(index))
    }

    /// Reads an id a caller handed back; `None` if no engine can have produced it.
    pub fn from_raw(raw: u64) -> Option<Self> {
        (raw >> 32 != 0 && raw >> 63 == 0).then_some(BatchId(raw))
    }

    /// The integer form handed to callers.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// Slab index.
    pub fn index(self) -> u32 {
        self.0 as u32
    }

    /// Generation of the slab slot.
    pub fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// Random number that tells one life of a segment from the next; published with its descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batch_id_is_never_zero_nor_negative() {
        for (index, generation) in [(0, 0), (u32::MAX, u32::MAX), (7, 1 << 31)] {
            let id = BatchId::new(index, generation);
            assert!(id.raw() >= 1 && id.raw() < 1 << 63);
            assert_eq!(BatchId::from_raw(id.raw()), Some(id));
            assert_eq!(id.index(), index);
        }
        assert_eq!(BatchId::from_raw(0), None);
        assert_eq!(BatchId::from_raw(u64::MAX), None);
    }
}
