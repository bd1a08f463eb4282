//! Messages of the same-host socket, by which peers attach to each other's memory.
//!
//! Every message is one packet of a `SOCK_SEQPACKET` socket, so there is no framing to get wrong: a packet decodes whole or
//! the connection ends. Numbers are little-endian. Files travel beside the packet (`SCM_RIGHTS`): the control page with
//! [`Message::Welcome`], the memory with a [`Message::Grant`] that says so.
//!
//! | sender | message | answer |
//! | --- | --- | --- |
//! | initiator | `Hello` | `Welcome` or `Refuse` |
//! | initiator | `Ask` | `Grant` or `Deny`, same id |
//! | initiator | `Release` | none |
//! | owner | `Revoke` | none |

use crate::{error::RefuseReason, id::Generation, range::ByteRange};

/// Version of this protocol; both sides must have the same.
pub const VERSION: u16 = 1;
/// Longest packet in bytes; a longer one is not this protocol.
pub const MAX_PACKET_BYTES: usize = 512;
/// Longest name in a hello, in bytes.
pub const MAX_NAME_BYTES: usize = 256;

const MAGIC: [u8; 8] = *b"tidewire";

/// One packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// First packet of an initiator.
    Hello {
        /// Protocol version.
        version: u16,
        /// The life of the segment that the initiator means.
        generation: Generation,
        /// Access token from the descriptor.
        token: [u8; 16],
        /// Segment name of the initiator, for logs.
        name: String,
    },
    /// The initiator is in; the control page travels with it.
    Welcome {
        /// Process id of the owner.
        pid: u32,
        /// Where the owner has the probe word.
        probe_addr: u64,
        /// The probe word.
        probe_word: u64,
    },
    /// The initiator is not let in; the connection ends.
    Refuse {
        /// Why.
        reason: RefuseReason,
    },
    /// Which region holds this range?
    Ask {
        /// Echoed in the answer.
        id: u64,
        /// The range, in addresses of the owner.
        range: ByteRange,
        /// Whether the initiator wants to map the region's file.
        want_file: bool,
    },
    /// The region may be used through this slot of the control page.
    Grant {
        /// Of the question.
        id: u64,
        /// Slot.
        slot: u32,
        /// Sequence under which the slot is good.
        sequence: u64,
        /// The whole region.
        region: ByteRange,
        /// Where in the file the region starts; the file travels with the packet. `None`: no file.
        file_offset: Option<u64>,
    },
    /// The range may not be used.
    Deny {
        /// Of the question.
        id: u64,
        /// Why.
        reason: DenyReason,
    },
    /// A grant is no longer good.
    Revoke {
        /// Slot.
        slot: u32,
        /// Sequence.
        sequence: u64,
    },
    /// The initiator gives a grant back.
    Release {
        /// Slot.
        slot: u32,
        /// Sequence.
        sequence: u64,
    },
}

/// Why a range was denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenyReason {
    /// Not inside one registered region.
    NotRegistered,
    /// This connection holds as many grants as it may.
    Limit,
    /// The owner could not make the grant.
    Failed,
}

/// A packet that is not this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Longer than any message.
    #[error("packet of {len} bytes is too long")]
    TooLong {
        /// Its length.
        len: usize,
    },
    /// Ends inside a field, or goes on after the last one.
    #[error("packet of kind {kind} has a wrong length of {len} bytes")]
    Length {
        /// Kind byte, 0 if there was none.
        kind: u8,
        /// Its length.
        len: usize,
    },
    /// No message has this kind.
    #[error("unknown packet kind {kind}")]
    Kind {
        /// Kind byte.
        kind: u8,
    },
    /// A field holds a value it cannot have.
    #[error("packet of kind {kind} has a bad {field}")]
    Field {
        /// Kind byte.
        kind: u8,
        /// Which field.
        field: &'static str,
    },
}

impl Message {
    /// The packet.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        match self {
            Message::Hello { version, generation, token, name } => {
                out.push(1);
                out.extend(MAGIC);
                out.extend(version.to_le_bytes());
                out.extend(generation.0.to_le_bytes());
                out.extend(token);
                // Cut at a character, so that it stays text.
                let end = (0..=MAX_NAME_BYTES).rev().find(|i| name.is_char_boundary(*i)).unwrap_or(0);
                out.extend(name.get(..end).unwrap_or(name).as_bytes());
            }
            Message::Welcome { pid, probe_addr, probe_word } => {
                out.push(2);
                out.extend(VERSION.to_le_bytes());
                out.extend(pid.to_le_bytes());
                out.extend(probe_addr.to_le_bytes());
                out.extend(probe_word.to_le_bytes());
            }
            Message::Refuse { reason } => {
                out.push(3);
                out.extend(reason.code().to_le_bytes());
            }
            Message::Ask { id, range, want_file } => {
                out.push(4);
                out.extend(id.to_le_bytes());
                out.extend(range.addr().to_le_bytes());
                out.extend(range.len().to_le_bytes());
                out.push(u8::from(*want_file));
            }
            Message::Grant { id, slot, sequence, region, file_offset } => {
                out.push(5);
                out.extend(id.to_le_bytes());
                out.extend(slot.to_le_bytes());
                out.extend(sequence.to_le_bytes());
                out.extend(region.addr().to_le_bytes());
                out.extend(region.len().to_le_bytes());
                out.push(u8::from(file_offset.is_some()));
                out.extend(file_offset.unwrap_or(0).to_le_bytes());
            }
            Message::Deny { id, reason } => {
                out.push(6);
                out.extend(id.to_le_bytes());
                out.push(match reason {
                    DenyReason::NotRegistered => 1,
                    DenyReason::Limit => 2,
                    DenyReason::Failed => 3,
                });
            }
            Message::Revoke { slot, sequence } | Message::Release { slot, sequence } => {
                out.push(if matches!(self, Message::Revoke { .. }) { 7 } else { 8 });
                out.extend(slot.to_le_bytes());
                out.extend(sequence.to_le_bytes());
            }
        }
        out
    }

    /// Reads a packet. Total: any bytes give a message or an error.
    ///
    /// # Errors
    /// [`DecodeError`], after which the connection is of no use.
    pub fn decode(packet: &[u8]) -> Result<Self, DecodeError> {
        let len = packet.len();
        if len > MAX_PACKET_BYTES {
            return Err(DecodeError::TooLong { len });
        }
        let (&kind, rest) = packet.split_first().ok_or(DecodeError::Length { kind: 0, len })?;
        let mut fields = Fields { rest, kind, len };
        let message = match kind {
            1 => fields.hello()?,
            2 => {
                let version = fields.u16()?;
                if version != VERSION {
                    return Err(DecodeError::Field { kind, field: "version" });
                }
                Message::Welcome { pid: fields.u32()?, probe_addr: fields.u64()?, probe_word: fields.u64()? }
            }
            3 => Message::Refuse { reason: RefuseReason::from_code(fields.u16()?) },
            4 => Message::Ask { id: fields.u64()?, range: fields.range()?, want_file: fields.flag()? },
            5 => {
                let (id, slot, sequence, region) = (fields.u64()?, fields.u32()?, fields.u64()?, fields.range()?);
                let (has_file, offset) = (fields.flag()?, fields.u64()?);
                Message::Grant { id, slot, sequence, region, file_offset: has_file.then_some(offset) }
            }
            6 => {
                let id = fields.u64()?;
                let reason = match fields.u8()? {
                    1 => DenyReason::NotRegistered,
                    2 => DenyReason::Limit,
                    3 => DenyReason::Failed,
                    _ => return Err(DecodeError::Field { kind, field: "reason" }),
                };
                Message::Deny { id, reason }
            }
            7 => Message::Revoke { slot: fields.u32()?, sequence: fields.u64()? },
            8 => Message::Release { slot: fields.u32()?, sequence: fields.u64()? },
            kind => return Err(DecodeError::Kind { kind }),
        };
        if fields.rest.is_empty() { Ok(message) } else { Err(DecodeError::Length { kind, len }) }
    }
}

/// What is left of a packet.
struct Fields<'a> {
    rest: &'a [u8],
    kind: u8,
    len: usize,
}

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, rest) =
            self.rest.split_first_chunk::<N>().ok_or(DecodeError::Length { kind: self.kind, len: self.len })?;
        self.rest = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        self.take::<1>().map(|[b]| b)
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        self.take().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError::Field { kind: self.kind, field: "flag" }),
        }
    }

    fn range(&mut self) -> Result<ByteRange, DecodeError> {
        let (addr, len) = (self.u64()?, self.u64()?);
        ByteRange::new(addr, len).ok_or(DecodeError::Field { kind: self.kind, field: "range" })
    }

    fn hello(&mut self) -> Result<Message, DecodeError> {
        let kind = self.kind;
        if self.take::<8>()? != MAGIC {
            return Err(DecodeError::Field { kind, field: "magic" });
        }
        let (version, generation, token) = (self.u16()?, Generation(self.u64()?), self.take::<16>()?);
        let name = std::mem::take(&mut self.rest);
        if name.len() > MAX_NAME_BYTES {
            return Err(DecodeError::Field { kind, field: "name" });
        }
        let name = std::str::from_utf8(name).map_err(|_| DecodeError::Field { kind, field: "name" })?.to_owned();
        Ok(Message::Hello { version, generation, token, name })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn messages() -> Vec<Message> {
        let range = ByteRange::new(0x7f00_1234, 77).unwrap();
        vec![
            Message::Hello { version: VERSION, generation: Generation(9), token: [3; 16], name: "host:12345".into() },
            Message::Welcome { pid: 77, probe_addr: u64::MAX, probe_word: 0 },
            Message::Refuse { reason: RefuseReason::Token },
            Message::Ask { id: 1, range, want_file: true },
            Message::Grant { id: 1, slot: 2, sequence: 3, region: range, file_offset: Some(0) },
            Message::Grant { id: 1, slot: 2, sequence: 3, region: range, file_offset: None },
            Message::Deny { id: u64::MAX, reason: DenyReason::NotRegistered },
            Message::Deny { id: 0, reason: DenyReason::Limit },
            Message::Deny { id: 0, reason: DenyReason::Failed },
            Message::Revoke { slot: 1, sequence: 2 },
            Message::Release { slot: 1, sequence: 2 },
        ]
    }

    #[test]
    fn every_message_survives_the_round_trip_and_no_cut_or_longer_packet_decodes_to_it() {
        for message in messages() {
            let packet = message.encode();
            assert!(packet.len() <= MAX_PACKET_BYTES);
            assert_eq!(Message::decode(&packet), Ok(message.clone()));
            for cut in 0..packet.len() {
                assert_ne!(Message::decode(packet.get(..cut).unwrap()), Ok(message.clone()));
            }
            let longer = [packet.as_slice(), &[0]].concat();
            assert_ne!(Message::decode(&longer), Ok(message));
        }
    }

    #[test]
    fn long_names_are_cut_at_a_character() {
        let name = "ä".repeat(MAX_NAME_BYTES);
        let hello = Message::Hello { version: 1, generation: Generation(1), token: [0; 16], name };
        let short = match Message::decode(&hello.encode()) {
            Ok(Message::Hello { name, .. }) => name,
            other => format!("{other:?}"),
        };
        assert_eq!(short, "ä".repeat(MAX_NAME_BYTES / 2));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), kind in 0u8..10) {
            let _ = Message::decode(&bytes);
            let _ = Message::decode(&[&[kind], bytes.as_slice()].concat());
        }
    }
}
