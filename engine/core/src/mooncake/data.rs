//! TCP data protocol: a 24-byte header per request, and in version 2 an 8-byte status frame per request.
//!
//! ```text
//! header := size u64 LE | address u64 LE | opcode u8 | 7 bytes padding
//! status := code u32 LE | magic u32 LE
//! READ   v1  -> header             <- payload
//! WRITE  v1  -> header, payload       (nothing comes back)
//! READ   v2  -> header             <- status, then the payload if it says OK
//! WRITE  v2  -> header, payload    <- status, after the last byte is in the target's memory
//! ```
//!
//! The padding is sent as zeros and not looked at: some official senders leave heap bytes in it.
//!
//! # Source
//! Mooncake 0.3.13.post1 as measured.

use crate::{range::ByteRange, request::Opcode};

/// Bytes of a request header.
pub const HEADER_BYTES: usize = 24;
/// Bytes of a status frame.
pub const STATUS_BYTES: usize = 8;
/// Bit of the opcode byte that asks for a status frame.
const STATUS_WANTED: u8 = 0x80;
/// Upper half of a status frame.
const STATUS_MAGIC: u32 = 0x4d43_5456;

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataHeader {
    /// Direction, seen from the initiator.
    pub opcode: Opcode,
    /// Version 2: a status frame is wanted.
    pub status_wanted: bool,
    /// Address in the target. Not checked by the codec.
    pub addr: u64,
    /// Payload in bytes. Not checked by the codec.
    pub size: u64,
}

/// An opcode byte that is none of 0, 1, 0x80 and 0x81.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown opcode {0:#04x}")]
pub struct UnknownOpcode(pub u8);

impl DataHeader {
    /// Header for a checked range.
    pub fn new(opcode: Opcode, target: ByteRange, status_wanted: bool) -> Self {
        DataHeader { opcode, status_wanted, addr: target.addr(), size: target.len() }
    }

    /// The wire form, padding zeroed.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&self.size.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.addr.to_le_bytes());
        bytes[16] = self.opcode as u8 | if self.status_wanted { STATUS_WANTED } else { 0 };
        bytes
    }

    /// Reads a header; the padding is ignored.
    ///
    /// # Errors
    /// [`UnknownOpcode`]: official servers would serve it as a read, we refuse.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, UnknownOpcode> {
        let word = |at: usize| bytes.iter().skip(at).take(8).rev().fold(0, |word, b| word << 8 | u64::from(*b));
        let opcode = match bytes[16] & !STATUS_WANTED {
            0 => Opcode::Read,
            1 => Opcode::Write,
            _ => return Err(UnknownOpcode(bytes[16])),
        };
        Ok(DataHeader { opcode, status_wanted: bytes[16] & STATUS_WANTED != 0, addr: word(8), size: word(0) })
    }

    /// The range asked for; `None` if it is empty or leaves the address space.
    pub fn range(&self) -> Option<ByteRange> {
        ByteRange::new(self.addr, self.size)
    }
}

/// What a status frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataStatus {
    /// Done, or for a read: the payload follows.
    Ok,
    /// The range is not inside one registered buffer.
    Rejected,
    /// A code that nobody defined; a failure.
    Unknown(u32),
}

/// Eight bytes that are no status frame: the peer does not speak version 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no status frame: {0:#018x}")]
pub struct NoStatus(pub u64);

impl DataStatus {
    /// The wire form.
    pub fn encode(self) -> [u8; STATUS_BYTES] {
        let code = match self {
            DataStatus::Ok => 0,
            DataStatus::Rejected => 1,
            DataStatus::Unknown(code) => code,
        };
        (u64::from(STATUS_MAGIC) << 32 | u64::from(code)).to_le_bytes()
    }

    /// Reads a status frame.
    ///
    /// # Errors
    /// [`NoStatus`] if the magic is missing.
    pub fn decode(bytes: [u8; STATUS_BYTES]) -> Result<Self, NoStatus> {
        let word = u64::from_le_bytes(bytes);
        match (word >> 32 == u64::from(STATUS_MAGIC), word as u32) {
            (false, _) => Err(NoStatus(word)),
            (true, 0) => Ok(DataStatus::Ok),
            (true, 1) => Ok(DataStatus::Rejected),
            (true, code) => Ok(DataStatus::Unknown(code)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn header_bytes_are_mooncakes() {
        let header = DataHeader { opcode: Opcode::Write, status_wanted: true, addr: 0x1122, size: 0x3344 };
        let mut expected = [0u8; HEADER_BYTES];
        (expected[0], expected[1], expected[8], expected[9], expected[16]) = (0x44, 0x33, 0x22, 0x11, 0x81);
        assert_eq!(header.encode(), expected);
    }

    #[test]
    fn status_bytes_are_mooncakes() {
        assert_eq!(DataStatus::Ok.encode(), [0, 0, 0, 0, 0x56, 0x54, 0x43, 0x4d]);
        assert_eq!(DataStatus::Rejected.encode()[0], 1);
        assert_eq!(DataStatus::decode([1, 2, 3, 4, 5, 6, 7, 8]), Err(NoStatus(0x0807_0605_0403_0201)));
    }

    #[test]
    fn only_four_opcodes_exist() {
        for opcode in 0..=255u8 {
            let mut bytes = [7u8; HEADER_BYTES];
            bytes[16] = opcode;
            let known = matches!(opcode, 0 | 1 | 0x80 | 0x81);
            assert_eq!(DataHeader::decode(&bytes).is_ok(), known, "{opcode:#x}");
        }
    }

    #[test]
    fn empty_and_overflowing_ranges_have_no_range() {
        let header = |addr, size| DataHeader { opcode: Opcode::Read, status_wanted: false, addr, size };
        assert_eq!(header(1, 0).range(), None);
        assert_eq!(header(u64::MAX, 2).range(), None);
        assert!(header(1, 1).range().is_some());
    }

    proptest! {
        #[test]
        fn random_headers_never_panic(bytes in any::<[u8; HEADER_BYTES]>()) {
            if let Ok(header) = DataHeader::decode(&bytes) {
                prop_assert_eq!(&header.encode()[..17], &bytes[..17]);
                prop_assert_eq!(&header.encode()[17..], &[0; 7][..]);
            }
        }

        #[test]
        fn random_status_never_panics(bytes in any::<[u8; STATUS_BYTES]>(), code in any::<u32>()) {
            let _ = DataStatus::decode(bytes);
            let mut framed = code.to_le_bytes().to_vec();
            framed.extend(STATUS_MAGIC.to_le_bytes());
            let framed: [u8; 8] = framed.try_into().unwrap();
            prop_assert_eq!(DataStatus::decode(framed).map(DataStatus::encode), Ok(framed));
        }
    }
}
