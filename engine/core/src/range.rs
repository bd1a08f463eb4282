//! Checked byte ranges: an address and a length whose end never overflows.

use std::fmt;

/// `len` bytes from `addr`; `addr + len` is known not to overflow and `len` is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    addr: u64,
    len: u64,
}

impl ByteRange {
    /// All addresses; stands for "no range in particular" in errors.
    pub const MAX: ByteRange = ByteRange { addr: 0, len: u64::MAX };

    /// Checks a range; `None` if it is empty or its end leaves the address space.
    pub fn new(addr: u64, len: u64) -> Option<Self> {
        (len != 0 && addr.checked_add(len).is_some()).then_some(ByteRange { addr, len })
    }

    /// First byte.
    pub fn addr(self) -> u64 {
        self.addr
    }

    /// Length in bytes, at least 1.
    #[allow(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub fn len(self) -> u64 {
        self.len
    }

    /// One past the last byte.
    pub fn end(self) -> u64 {
        self.addr + self.len
    }

    /// Whether `other` lies wholly inside.
    pub fn contains(self, other: ByteRange) -> bool {
        self.addr <= other.addr && other.end() <= self.end()
    }

    /// Whether at least one byte is shared.
    pub fn overlaps(self, other: ByteRange) -> bool {
        self.addr < other.end() && other.addr < self.end()
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x}) ({} bytes)", self.addr, self.end(), self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_and_overflowing_ranges_are_refused() {
        assert!(ByteRange::new(1, 0).is_none());
        assert!(ByteRange::new(u64::MAX, 2).is_none());
        assert!(ByteRange::new(u64::MAX, 1).is_none());
        assert!(ByteRange::new(u64::MAX - 1, 1).is_some());
    }

    #[test]
    fn neighbours_do_not_overlap() {
        let pair = ByteRange::new(0, 10).zip(ByteRange::new(10, 10));
        let seen = pair.map(|(a, b)| (a.overlaps(b), b.overlaps(a), a.contains(a), a.contains(b)));
        assert_eq!(seen, Some((false, false, true, false)));
    }
}
