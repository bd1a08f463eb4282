//! Native TCP protocol: the hello and the frames, as `docs/PROTOCOL.md` states them.
//!
//! Decoders are total: any bytes give a value or a typed error.

pub mod frame;
pub mod hello;

/// Newest version this code speaks.
pub const VERSION: u16 = 1;

/// Feature bit: payload checksums.
pub const FEATURE_CHECKSUM: u32 = 1;

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}
