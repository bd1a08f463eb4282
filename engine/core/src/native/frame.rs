//! Frames of the native protocol: a 32-byte header and, on requests, a table of entries.

use super::{u16_at, u32_at, u64_at};
use crate::range::ByteRange;

/// Length of a frame header.
pub const HEADER_LEN: usize = 32;
/// Length of one entry of a table.
pub const ENTRY_LEN: usize = 16;
/// Length of the checksum after a payload.
pub const CHECKSUM_LEN: usize = 4;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Request: place the payload.
    Write = 1,
    /// Request: send the bytes of the entries.
    Read = 2,
    /// Request: say something.
    Ping = 3,
    /// Answer to a write.
    WriteDone = 0x81,
    /// Answer to a read.
    ReadData = 0x82,
    /// Sign of life.
    Alive = 0x83,
    /// The target closes.
    Goodbye = 0x84,
}

/// How a request ended. The numbers are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameStatus {
    /// Done.
    Done,
    /// An entry is not inside one registered buffer.
    OutOfBounds,
    /// The payload differs from its checksum.
    Checksum,
    /// The frame makes no sense.
    Malformed,
    /// The target is shutting down.
    ShuttingDown,
    /// The buffer was unregistered during the operation.
    Revoked,
    /// A code this version does not know.
    Unknown(u16),
}

impl FrameStatus {
    /// Wire code.
    pub fn code(self) -> u16 {
        match self {
            FrameStatus::Done => 0,
            FrameStatus::OutOfBounds => 1,
            FrameStatus::Checksum => 2,
            FrameStatus::Malformed => 3,
            FrameStatus::ShuttingDown => 4,
            FrameStatus::Revoked => 5,
            FrameStatus::Unknown(code) => code,
        }
    }

    /// From the wire code.
    pub fn from_code(code: u16) -> Self {
        match code {
            0 => FrameStatus::Done,
            1 => FrameStatus::OutOfBounds,
            2 => FrameStatus::Checksum,
            3 => FrameStatus::Malformed,
            4 => FrameStatus::ShuttingDown,
            5 => FrameStatus::Revoked,
            other => FrameStatus::Unknown(other),
        }
    }
}

/// Header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What it is.
    pub kind: FrameKind,
    /// Whether a checksum follows the payload (or is asked for, in a read).
    pub checksum: bool,
    /// Request: entries in the table. Answer: status code.
    pub entries_or_status: u16,
    /// Chosen by the initiator, echoed in the answer.
    pub id: u64,
    /// Payload bytes that follow or are asked for.
    pub payload_len: u64,
    /// Request: CRC32C of the table. Answer: index of the refused entry.
    pub table_crc_or_entry: u32,
}

/// Why bytes are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Fewer bytes than a header.
    #[error("header has {len} bytes instead of 32")]
    Short {
        /// Bytes given.
        len: usize,
    },
    /// Bytes changed on the way, or something else is talking.
    #[error("header checksum differs")]
    HeaderChecksum,
    /// A kind this version does not know.
    #[error("unknown frame kind {kind:#x}")]
    Kind {
        /// The byte.
        kind: u8,
    },
    /// More entries than announced as the limit.
    #[error("{entries} entries, limit {limit}")]
    Entries {
        /// Entries in the header.
        entries: u32,
        /// The limit.
        limit: u32,
    },
    /// More payload than announced as the limit.
    #[error("{len} payload bytes, limit {limit}")]
    Oversize {
        /// Bytes in the header.
        len: u64,
        /// The limit.
        limit: u64,
    },
    /// Table and checksum differ.
    #[error("entry table checksum differs")]
    TableChecksum,
    /// The lengths of the entries do not add up to the payload.
    #[error("entries of {sum} bytes, payload of {payload}")]
    Sum {
        /// Sum of the entries.
        sum: u64,
        /// Payload in the header.
        payload: u64,
    },
    /// A frame that this side never gets.
    #[error("{kind:?} frame from the wrong side")]
    Direction {
        /// The frame.
        kind: FrameKind,
    },
}

impl FrameHeader {
    /// A frame without table and payload.
    pub fn bare(kind: FrameKind, status: FrameStatus, id: u64) -> Self {
        FrameHeader {
            kind,
            checksum: false,
            entries_or_status: status.code(),
            id,
            payload_len: 0,
            table_crc_or_entry: 0,
        }
    }

    /// Wire form.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[0] = self.kind as u8;
        out[1] = u8::from(self.checksum);
        out[2..4].copy_from_slice(&self.entries_or_status.to_le_bytes());
        out[8..16].copy_from_slice(&self.id.to_le_bytes());
        out[16..24].copy_from_slice(&self.payload_len.to_le_bytes());
        out[24..28].copy_from_slice(&self.table_crc_or_entry.to_le_bytes());
        let crc = crc32c::crc32c(&out[..28]);
        out[28..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads the wire form.
    ///
    /// # Errors
    /// [`FrameError`]; the connection cannot be used any more.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let Some(head) = bytes.get(..HEADER_LEN) else { return Err(FrameError::Short { len: bytes.len() }) };
        if crc32c::crc32c(&head[..28]) != u32_at(head, 28) {
            return Err(FrameError::HeaderChecksum);
        }
        let kind = match head[0] {
            1 => FrameKind::Write,
            2 => FrameKind::Read,
            3 => FrameKind::Ping,
            0x81 => FrameKind::WriteDone,
            0x82 => FrameKind::ReadData,
            0x83 => FrameKind::Alive,
            0x84 => FrameKind::Goodbye,
            kind => return Err(FrameError::Kind { kind }),
        };
        Ok(FrameHeader {
            kind,
            checksum: head[1] & 1 != 0,
            entries_or_status: u16_at(head, 2),
            id: u64_at(head, 8),
            payload_len: u64_at(head, 16),
            table_crc_or_entry: u32_at(head, 24),
        })
    }

    /// Status of an answer.
    pub fn status(&self) -> FrameStatus {
        FrameStatus::from_code(self.entries_or_status)
    }

    /// Checks a request header against the target's limits; the length of its table in bytes.
    ///
    /// # Errors
    /// [`FrameError::Entries`], [`FrameError::Oversize`], [`FrameError::Direction`].
    pub fn check_request(&self, max_entries: u32, max_bytes: u64) -> Result<usize, FrameError> {
        let entries = u32::from(self.entries_or_status);
        match self.kind {
            FrameKind::Ping => Ok(0),
            FrameKind::Write | FrameKind::Read if entries == 0 || entries > max_entries => {
                Err(FrameError::Entries { entries, limit: max_entries })
            }
            FrameKind::Write | FrameKind::Read if self.payload_len > max_bytes => {
                Err(FrameError::Oversize { len: self.payload_len, limit: max_bytes })
            }
            FrameKind::Write | FrameKind::Read => Ok(entries as usize * ENTRY_LEN),
            kind => Err(FrameError::Direction { kind }),
        }
    }

    /// Checks a table against its header: checksum and sum of lengths.
    ///
    /// # Errors
    /// [`FrameError::TableChecksum`], [`FrameError::Sum`].
    pub fn check_table(&self, table: &[u8]) -> Result<(), FrameError> {
        if crc32c::crc32c(table) != self.table_crc_or_entry {
            return Err(FrameError::TableChecksum);
        }
        let sum = entries(table).fold(0u64, |sum, (_, len)| sum.saturating_add(len));
        if sum == self.payload_len { Ok(()) } else { Err(FrameError::Sum { sum, payload: self.payload_len }) }
    }
}

/// Appends one entry to a table.
pub fn push_entry(table: &mut Vec<u8>, range: ByteRange) {
    table.extend_from_slice(&range.addr().to_le_bytes());
    table.extend_from_slice(&range.len().to_le_bytes());
}

/// The entries of a table as (address, length); unchecked numbers from the wire.
pub fn entries(table: &[u8]) -> impl Iterator<Item = (u64, u64)> + '_ {
    table.chunks_exact(ENTRY_LEN).map(|entry| (u64_at(entry, 0), u64_at(entry, 8)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_typed(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = FrameHeader::decode(&bytes);
            let _ = super::super::hello::Hello::decode(&bytes);
            let _ = super::super::hello::Welcome::decode(&bytes);
        }

        #[test]
        fn header_round_trips(id: u64, payload_len: u64, n: u16, crc: u32, checksum: bool) {
            let header = FrameHeader {
                kind: FrameKind::Write, checksum, entries_or_status: n, id, payload_len, table_crc_or_entry: crc,
            };
            prop_assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn table_lengths_never_overflow(lens in prop::collection::vec(any::<u64>(), 1..8)) {
            let mut table = Vec::new();
            for len in &lens {
                table.extend_from_slice(&0u64.to_le_bytes());
                table.extend_from_slice(&len.to_le_bytes());
            }
            let header = FrameHeader {
                kind: FrameKind::Write, checksum: false, entries_or_status: lens.len() as u16, id: 1, payload_len: 7,
                table_crc_or_entry: crc32c::crc32c(&table),
            };
            let sum = lens.iter().fold(0u64, |s, l| s.saturating_add(*l));
            prop_assert_eq!(header.check_table(&table).is_ok(), sum == 7);
        }
    }

    #[test]
    fn limits_are_kept() {
        let mut header = FrameHeader::bare(FrameKind::Write, FrameStatus::Done, 1);
        assert_eq!(header.check_request(8, 100), Err(FrameError::Entries { entries: 0, limit: 8 }));
        header.entries_or_status = 9;
        assert_eq!(header.check_request(8, 100), Err(FrameError::Entries { entries: 9, limit: 8 }));
        header.entries_or_status = 8;
        header.payload_len = 101;
        assert_eq!(header.check_request(8, 100), Err(FrameError::Oversize { len: 101, limit: 100 }));
        header.payload_len = 100;
        assert_eq!(header.check_request(8, 100), Ok(128));
        header.kind = FrameKind::WriteDone;
        assert_eq!(header.check_request(8, 100), Err(FrameError::Direction { kind: FrameKind::WriteDone }));
    }
}
