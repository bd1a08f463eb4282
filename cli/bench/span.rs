//! Which bytes a point of the benchmark touches: thread `t` moves, as request `i` of its batch, the block at
//! `block_size x (i x threads + t)` of buffer `t mod buffers`, on both sides.

use serde::{Deserialize, Serialize};

/// Geometry of one point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Bytes per request.
    pub block_size: u64,
    /// Requests per batch.
    pub batch_size: u32,
    /// Threads that submit.
    pub threads: u32,
}

impl Span {
    /// Bytes from the start of a buffer to the end of the last block.
    pub fn bytes(&self) -> u64 {
        self.batch_bytes() * u64::from(self.threads)
    }

    /// Bytes that one batch moves.
    pub fn batch_bytes(&self) -> u64 {
        self.block_size * u64::from(self.batch_size)
    }

    /// Offset of request `request` of thread `thread` in its buffer.
    pub fn offset(&self, thread: u32, request: u32) -> u64 {
        self.block_size * (u64::from(request) * u64::from(self.threads) + u64::from(thread))
    }

    /// Every block: thread, request, offset.
    pub fn blocks(self) -> impl Iterator<Item = (u32, u32, u64)> {
        (0..self.threads).flat_map(move |t| (0..self.batch_size).map(move |r| (t, r, self.offset(t, r))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_tile_the_span_without_overlap() {
        let span = Span { block_size: 100, batch_size: 5, threads: 3 };
        let mut offsets: Vec<u64> = span.blocks().map(|(_, _, offset)| offset).collect();
        offsets.sort_unstable();
        assert_eq!(offsets, (0..15).map(|i| i * 100).collect::<Vec<_>>());
        assert_eq!(span.bytes(), 1500);
    }
}
