//! Mutations of valid inputs: bits, numbers at their edges, pieces cut, doubled and mixed.

/// Longest input made.
const MAX_LEN_BYTES: usize = 4096;

/// Numbers that decoders trip over, written as 1, 2, 4 or 8 bytes of either order.
const EDGES: [u64; 16] = [
    0,
    1,
    7,
    8,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x0010_0000,
    0x0010_0001,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 32,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

/// Pieces of the formats' own language.
const WORDS: [&str; 14] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    ":",
    ",",
    "null",
    "-1",
    "1e999",
    "18446744073709551616",
    "\\u0000",
    "\"buffers\":",
    "\u{fffd}",
];

/// Makes inputs from seeds, in an order that its own seed decides.
pub struct Mutator {
    state: u64,
    seeds: Vec<Vec<u8>>,
    input: Vec<u8>,
}

impl Mutator {
    pub fn new(seed: u64, seeds: Vec<Vec<u8>>) -> Self {
        assert!(!seeds.is_empty(), "a target needs at least one seed");
        Mutator { state: seed, seeds, input: Vec::new() }
    }

    /// The next input: a seed, or the last input again, with one to eight changes.
    pub fn next_input(&mut self) -> &[u8] {
        if self.input.is_empty() || self.below(4) != 0 {
            let pick = self.below(self.seeds.len());
            self.input.clone_from(&self.seeds[pick]);
        }
        for _ in 0..=self.below(8) {
            self.change();
        }
        self.input.truncate(MAX_LEN_BYTES);
        &self.input
    }

    fn change(&mut self) {
        let len = self.input.len();
        let at = self.below(len + 1);
        match self.below(10) {
            0 if at < len => self.input[at] ^= 1 << self.below(8),
            1 if at < len => self.input[at] = self.random() as u8,
            2 => self.input.truncate(at),
            3 => {
                let end = (at + self.below(17)).min(len);
                self.input.drain(at..end);
            }
            4 => {
                let end = (at + self.below(33)).min(len);
                let piece = self.input[at..end].to_vec();
                self.insert(at, &piece);
            }
            5 => {
                let other = self.below(self.seeds.len());
                let from = self.below(self.seeds[other].len() + 1);
                let piece = self.seeds[other][from..].to_vec();
                self.input.truncate(at);
                self.input.extend_from_slice(&piece);
            }
            6 => {
                let word = WORDS[self.below(WORDS.len())];
                self.insert(at, word.as_bytes());
            }
            7 => {
                let noise = self.random().to_le_bytes();
                self.insert(at, &noise);
            }
            _ => self.put_edge(at),
        }
    }

    /// Overwrites the bytes at `at` with a number from the edges.
    fn put_edge(&mut self, at: usize) {
        let value = EDGES[self.below(EDGES.len())];
        let width = 1 << self.below(4);
        let mut bytes = value.to_le_bytes();
        if self.below(4) == 0 {
            bytes[..width].reverse();
        }
        let end = (at + width).min(self.input.len());
        self.input[at..end].copy_from_slice(&bytes[..end - at]);
    }

    fn insert(&mut self, at: usize, piece: &[u8]) {
        self.input.splice(at..at, piece.iter().copied());
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.random() % limit.max(1) as u64) as usize
    }

    /// SplitMix64.
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
