//! Bytes that are a function of their place: what a transfer should deliver can be told without keeping a copy.
//!
//! The eight bytes at word `n` of a stream are a hash of the stream's seed and `n`, so a block that arrives at the wrong
//! place, or half, is seen.

use std::fmt;

use serde::{Deserialize, Serialize};

const WORD: usize = 8;
const CHUNK: usize = 4096;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// A stream of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pattern {
    seed: u64,
}

/// The first byte that is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// Offset in the stream.
    pub offset: u64,
    /// What belongs there.
    pub expected: u8,
    /// What is there.
    pub found: u8,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { offset, expected, found } = self;
        write!(f, "byte {offset} is {found:#04x} instead of {expected:#04x}")
    }
}

impl Pattern {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Pattern { seed: mix(seed) }
    }

    /// The stream of a part of this one's subject, such as layer, page or buffer number.
    pub fn part(self, index: u64) -> Self {
        Pattern { seed: mix(self.seed ^ mix(index.wrapping_add(STEP))) }
    }

    /// Writes the bytes from `offset` on into `out`.
    pub fn fill(self, offset: u64, out: &mut [u8]) {
        let skip = (offset % WORD as u64) as usize;
        let mut word = offset / WORD as u64;
        let (head, rest) = out.split_at_mut(if skip == 0 { 0 } else { (WORD - skip).min(out.len()) });
        if !head.is_empty() {
            head.copy_from_slice(&self.word(word)[skip..skip + head.len()]);
            word += 1;
        }
        let mut words = rest.chunks_exact_mut(WORD);
        for slot in words.by_ref() {
            slot.copy_from_slice(&self.word(word));
            word += 1;
        }
        let tail = words.into_remainder();
        tail.copy_from_slice(&self.word(word)[..tail.len()]);
    }

    /// Compares `bytes` with the stream from `offset` on.
    pub fn check(self, offset: u64, bytes: &[u8]) -> Option<Mismatch> {
        let mut expected = [0; CHUNK];
        let mut at = offset;
        for chunk in bytes.chunks(CHUNK) {
            let expected = &mut expected[..chunk.len()];
            self.fill(at, expected);
            if let Some(mismatch) = compare(expected, chunk) {
                return Some(Mismatch { offset: at + mismatch.offset, ..mismatch });
            }
            at += chunk.len() as u64;
        }
        None
    }

    fn word(self, index: u64) -> [u8; WORD] {
        mix(self.seed.wrapping_add(index.wrapping_mul(STEP))).to_le_bytes()
    }
}

/// The first difference of two slices of equal length.
pub fn compare(expected: &[u8], found: &[u8]) -> Option<Mismatch> {
    if expected == found {
        return None;
    }
    let at = expected.iter().zip(found).position(|(e, f)| e != f)?;
    Some(Mismatch { offset: at as u64, expected: expected[at], found: found[at] })
}

/// A random order of `0..count`, the same for the same seed.
pub fn permutation(seed: u64, count: u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count).collect();
    let mut state = seed;
    for last in (1..order.len()).rev() {
        state = state.wrapping_add(STEP);
        let pick = mix(state) % (last as u64 + 1);
        order.swap(last, pick as usize);
    }
    order
}

/// Finaliser of SplitMix64: every input bit reaches every output bit.
fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_cut_of_a_stream_is_the_same_bytes() {
        let pattern = Pattern::new(7).part(3);
        let mut whole = vec![0; 9000];
        pattern.fill(0, &mut whole);
        for (from, to) in [(0, 1), (1, 9000), (3, 5), (8, 16), (4095, 8193), (17, 17)] {
            let mut part = vec![0; to - from];
            pattern.fill(from as u64, &mut part);
            assert_eq!(part, whole[from..to], "{from}..{to}");
            assert_eq!(pattern.check(from as u64, &part), None);
        }
    }

    #[test]
    fn a_wrong_byte_is_found_where_it_is() {
        let pattern = Pattern::new(1);
        let mut bytes = vec![0; 10_000];
        pattern.fill(5, &mut bytes);
        bytes[9_001] ^= 0x10;
        let mismatch = pattern.check(5, &bytes);
        assert_eq!(mismatch.map(|m| (m.offset, m.expected ^ m.found)), Some((9_006, 0x10)));
    }

    #[test]
    fn parts_differ_and_a_shifted_block_is_seen() {
        let pattern = Pattern::new(1);
        let mut bytes = vec![0; 64];
        pattern.part(0).fill(0, &mut bytes);
        assert!(pattern.part(1).check(0, &bytes).is_some());
        assert!(pattern.part(0).check(8, &bytes).is_some());
    }

    #[test]
    fn a_permutation_has_every_number_once_and_is_not_the_identity() {
        let mut order = permutation(3, 100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
        assert!(permutation(3, 0).is_empty());
    }
}
