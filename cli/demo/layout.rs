//! Where the KV cache of a model lies in memory: per layer one buffer, in it a plane of K pages and one of V pages.
//!
//! A page holds the keys (or values) of some consecutive tokens of one sequence, for all KV heads. A sequence's pages lie
//! anywhere in the pool; its page table says where.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::error::CliError;

/// Models whose KV geometry is known.
///
/// # Source
/// `config.json` of the models: `num_hidden_layers`, `num_key_value_heads`, `head_dim` (hidden size / heads), `torch_dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Model {
    /// 32 layers, 8 KV heads of 128, bf16.
    #[value(name = "llama3-8b")]
    Llama3_8b,
    /// 80 layers, 8 KV heads of 128, bf16.
    #[value(name = "llama3-70b")]
    Llama3_70b,
}

impl Model {
    /// Number of layers.
    pub fn layers(self) -> u32 {
        match self {
            Model::Llama3_8b => 32,
            Model::Llama3_70b => 80,
        }
    }

    /// Bytes of K (or V) of one token in one layer: heads x head size x bytes per number.
    pub fn token_bytes(self) -> u64 {
        match self {
            Model::Llama3_8b | Model::Llama3_70b => 8 * 128 * 2,
        }
    }
}

/// Geometry of a pool and of the sequence in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Layers; each has a buffer of its own.
    pub layers: u32,
    /// Planes per layer: K and V, or one for a file.
    pub planes: u32,
    /// Pages of the sequence.
    pub pages: u32,
    /// Pages that the pool has room for, more than the sequence needs.
    pub pool_pages: u32,
    /// Bytes of one page in one plane.
    pub block_bytes: u64,
    /// Bytes of the last page of the sequence.
    pub last_block_bytes: u64,
}

impl Layout {
    /// The KV cache of `tokens` tokens.
    ///
    /// # Errors
    /// [`CliError::Usage`] when that is nothing, or more than a process can address.
    pub fn of_model(model: Model, tokens: u64, page_tokens: u64) -> Result<Self, CliError> {
        if tokens == 0 || page_tokens == 0 {
            return Err(CliError::usage("there is nothing to move", "use at least one token, and one token per page"));
        }
        let block_bytes = page_tokens.saturating_mul(model.token_bytes());
        let last = tokens - (tokens.div_ceil(page_tokens) - 1) * page_tokens;
        Layout::new(model.layers(), 2, tokens.div_ceil(page_tokens), block_bytes, last * model.token_bytes())
    }

    /// `len` bytes of a file, in pages of `block_bytes`.
    ///
    /// # Errors
    /// [`CliError::Usage`] when the file is empty or too large.
    pub fn of_file(len: u64, block_bytes: u64) -> Result<Self, CliError> {
        if len == 0 {
            return Err(CliError::usage("the file is empty", "name a file that holds at least one byte"));
        }
        let pages = len.div_ceil(block_bytes);
        Layout::new(1, 1, pages, block_bytes, len - (pages - 1) * block_bytes)
    }

    fn new(layers: u32, planes: u32, pages: u64, block_bytes: u64, last: u64) -> Result<Self, CliError> {
        let pool_pages = pages + pages / 8 + 1;
        let bytes = pool_pages.checked_mul(block_bytes).and_then(|b| b.checked_mul(u64::from(layers * planes)));
        match (u32::try_from(pool_pages), bytes.filter(|bytes| *bytes < 1 << 46)) {
            (Ok(pool_pages), Some(_)) => {
                Ok(Layout { layers, planes, pages: pages as u32, pool_pages, block_bytes, last_block_bytes: last })
            }
            _ => Err(CliError::usage("that is more than a process can hold", "move less: --tokens, --page-tokens")),
        }
    }

    /// Bytes of a layer's buffer.
    pub fn layer_bytes(&self) -> u64 {
        u64::from(self.planes) * u64::from(self.pool_pages) * self.block_bytes
    }

    /// Bytes of page `page` of the sequence, in one plane.
    pub fn block_len(&self, page: u32) -> u64 {
        if page + 1 == self.pages { self.last_block_bytes } else { self.block_bytes }
    }

    /// Offset in a layer's buffer of the pool's page `slot` in `plane`.
    pub fn block_offset(&self, plane: u32, slot: u32) -> u64 {
        (u64::from(plane) * u64::from(self.pool_pages) + u64::from(slot)) * self.block_bytes
    }

    /// Blocks of the sequence: layers x planes x pages.
    pub fn blocks(&self) -> u64 {
        u64::from(self.layers) * u64::from(self.planes) * u64::from(self.pages)
    }

    /// Bytes of the sequence.
    pub fn bytes(&self) -> u64 {
        let plane = u64::from(self.pages - 1) * self.block_bytes + self.last_block_bytes;
        u64::from(self.layers) * u64::from(self.planes) * plane
    }

    /// What a block is, in words.
    pub fn name_of(&self, layer: u32, plane: u32, page: u32) -> String {
        match (self.planes, plane) {
            (1, _) => format!("page {page} of the file"),
            (_, 0) => format!("layer {layer}, page {page}, K"),
            (_, _) => format!("layer {layer}, page {page}, V"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_llama_page_of_16_tokens_is_32_kib_per_plane() {
        let layout = Layout::of_model(Model::Llama3_8b, 4096, 16).ok();
        let layout = layout.map(|l| (l.block_bytes, l.pages, l.blocks(), l.bytes()));
        assert_eq!(layout, Some((32 << 10, 256, 16_384, 512 << 20)));
    }

    #[test]
    fn the_last_page_may_be_short() {
        let layout = Layout::of_model(Model::Llama3_70b, 17, 16).ok();
        assert_eq!(
            layout.map(|l| (l.pages, l.block_len(0), l.block_len(1), l.bytes())),
            Some((2, 32768, 2048, 80 * 2 * 34816))
        );
        let layout = Layout::of_file(100, 32).ok();
        assert_eq!(layout.map(|l| (l.pages, l.last_block_bytes, l.bytes())), Some((4, 4, 100)));
        assert_eq!(Layout::of_file(64, 32).ok().map(|l| (l.pages, l.last_block_bytes)), Some((2, 32)));
    }

    #[test]
    fn nothing_and_too_much_are_refused() {
        assert!(Layout::of_file(0, 32).is_err() && Layout::of_file(u64::MAX, 32).is_err());
        assert!(Layout::of_model(Model::Llama3_8b, 0, 16).is_err());
        assert!(Layout::of_model(Model::Llama3_8b, 1, u64::MAX).is_err());
    }

    #[test]
    fn blocks_of_a_layer_do_not_overlap() {
        let layout = Layout { planes: 2, ..Layout::of_file(100, 32).unwrap() };
        let mut offsets: Vec<u64> =
            (0..2).flat_map(|p| (0..layout.pool_pages).map(move |s| layout.block_offset(p, s))).collect();
        offsets.dedup();
        assert!(offsets.windows(2).all(|w| w[1] - w[0] == 32) && offsets.last() == Some(&(layout.layer_bytes() - 32)));
    }
}
