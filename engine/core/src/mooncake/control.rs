//! Control RPC: one request and one reply per TCP connection, each a length, a type byte and a JSON document.
//!
//! ```text
//! frame := length u64 LE | type u8 | JSON        length counts the type byte
//! old   := length u64 LE | JSON                  first release; means a connection request, answered in kind
//! ```
//!
//! The first body byte tells the two apart: JSON never starts with a byte below 4.
//!
//! # Source
//! Mooncake 0.3.13.post1 as measured; the old form is v0.1.

use serde::{Deserialize, Serialize};

use super::to_json;

/// Bytes of the length.
pub const LENGTH_BYTES: usize = 8;
/// Frame limit of an official peer, unless it was set higher: length field, so type byte and JSON.
pub const DEFAULT_MAX_FRAME_BYTES: u64 = 1 << 20;

/// What a frame is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ControlKind {
    /// RDMA handshake.
    Connection = 0,
    /// Asks for the segment descriptor.
    Metadata = 1,
    /// Delivers a notification.
    Notify = 2,
    /// Asks whether the peer lives.
    Probe = 3,
}

/// Why bytes are no control frame. The connection is closed without a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A frame of no bytes, or one beyond the limit.
    #[error("frame of {length} bytes, allowed are 1 to {limit}")]
    Length {
        /// As read.
        length: u64,
        /// Limit in force.
        limit: u64,
    },
    /// A type that nobody defined.
    #[error("frame of unknown type {0:#04x}")]
    UnknownType(u8),
    /// No JSON behind the type.
    #[error("frame without a JSON document")]
    NotJson,
}

/// A request or reply as it came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlFrame<'a> {
    /// What it is about.
    pub kind: ControlKind,
    /// Whether it came without a type byte; the reply then goes without one.
    pub old: bool,
    /// The document; known to be JSON, maybe with white space around.
    pub json: &'a [u8],
}

impl<'a> ControlFrame<'a> {
    /// Decodes the bytes behind the length.
    ///
    /// # Errors
    /// [`FrameError::UnknownType`], [`FrameError::NotJson`]; [`FrameError::Length`] for no bytes.
    pub fn decode(body: &'a [u8]) -> Result<Self, FrameError> {
        let (&first, rest) = body.split_first().ok_or(FrameError::Length { length: 0, limit: u64::MAX })?;
        let (kind, old, json) = match first {
            0 => (ControlKind::Connection, false, rest),
            1 => (ControlKind::Metadata, false, rest),
            2 => (ControlKind::Notify, false, rest),
            3 => (ControlKind::Probe, false, rest),
            b'{' | b'[' | b'"' | b' ' | b'\t' | b'\r' | b'\n' => (ControlKind::Connection, true, body),
            other => return Err(FrameError::UnknownType(other)),
        };
        match serde_json::from_slice::<serde::de::IgnoredAny>(json) {
            Ok(_) => Ok(ControlFrame { kind, old, json }),
            Err(_) => Err(FrameError::NotJson),
        }
    }
}

/// Reads the length and checks it against `limit`.
///
/// # Errors
/// [`FrameError::Length`].
pub fn decode_length(bytes: [u8; LENGTH_BYTES], limit: u64) -> Result<u64, FrameError> {
    let length = u64::from_le_bytes(bytes);
    if length == 0 || length > limit { Err(FrameError::Length { length, limit }) } else { Ok(length) }
}

/// A whole frame, length first.
pub fn encode_frame(kind: ControlKind, json: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(LENGTH_BYTES + 1 + json.len());
    frame.extend_from_slice(&(json.len() as u64 + 1).to_le_bytes());
    frame.push(kind as u8);
    frame.extend_from_slice(json);
    frame
}

/// A whole frame of the old form.
pub fn encode_old_frame(json: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(LENGTH_BYTES + json.len());
    frame.extend_from_slice(&(json.len() as u64).to_le_bytes());
    frame.extend_from_slice(json);
    frame
}

/// RDMA handshake, both directions. All fields empty is the answer of an engine without RDMA.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Handshake {
    /// Address of the sender's port.
    pub local_gid: String,
    /// Local identifier of the sender's port.
    pub local_lid: u16,
    /// `<server>@<device>` of the sender.
    pub local_nic_path: String,
    /// Free for transports.
    pub payload: String,
    /// `<server>@<device>` of the receiver.
    pub peer_nic_path: String,
    /// Queue pairs, in order.
    pub qp_num: Vec<u32>,
    /// Why the sender refuses; empty: it does not.
    pub reply_msg: String,
    /// Present: the sender knows the second step; true: this is it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_ack: Option<bool>,
}

/// Notification, and its answer: an empty message is a refusal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NotifyBody {
    /// Name, free text.
    pub name: String,
    /// Text of the notification.
    pub notify_msg: String,
}

impl NotifyBody {
    /// The answer that says whether a notification was taken.
    pub fn answer(accepted: bool) -> Self {
        NotifyBody { name: String::new(), notify_msg: if accepted { "success" } else { "" }.to_owned() }
    }

    /// Compact JSON.
    pub fn encode(&self) -> Vec<u8> {
        to_json(self)
    }
}

/// Answer to a probe.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProbeBody {
    /// `success` when all is well.
    pub status: String,
}

impl ProbeBody {
    /// The answer that says whether all is well.
    pub fn answer(healthy: bool) -> Self {
        ProbeBody { status: if healthy { "success" } else { "shutting down" }.to_owned() }
    }

    /// Compact JSON.
    pub fn encode(&self) -> Vec<u8> {
        to_json(self)
    }
}

impl Handshake {
    /// Compact JSON.
    pub fn encode(&self) -> Vec<u8> {
        to_json(self)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn kinds_are_told_apart_by_the_first_byte() {
        for (body, kind, old) in [
            (&b"\x00{}"[..], ControlKind::Connection, false),
            (b"\x01{}\n", ControlKind::Metadata, false),
            (b"\x02{}", ControlKind::Notify, false),
            (b"\x03{}", ControlKind::Probe, false),
            (b"{}", ControlKind::Connection, true),
        ] {
            let frame = ControlFrame::decode(body).unwrap();
            assert_eq!((frame.kind, frame.old), (kind, old));
        }
    }

    #[test]
    fn unknown_types_and_broken_json_are_refused() {
        assert_eq!(ControlFrame::decode(b"\x04{}"), Err(FrameError::UnknownType(4)));
        assert_eq!(ControlFrame::decode(b"\xfe{}"), Err(FrameError::UnknownType(0xfe)));
        assert_eq!(ControlFrame::decode(b"\x01{"), Err(FrameError::NotJson));
        assert_eq!(ControlFrame::decode(b"\x01"), Err(FrameError::NotJson));
        assert!(matches!(ControlFrame::decode(b""), Err(FrameError::Length { length: 0, .. })));
    }

    #[test]
    fn lengths_are_limited() {
        assert_eq!(decode_length(5u64.to_le_bytes(), 5), Ok(5));
        for bad in [0, 6, u64::MAX] {
            assert_eq!(decode_length(bad.to_le_bytes(), 5), Err(FrameError::Length { length: bad, limit: 5 }));
        }
    }

    #[test]
    fn answers_are_mooncakes() {
        assert_eq!(ProbeBody::answer(true).encode(), br#"{"status":"success"}"#);
        assert_eq!(NotifyBody::answer(true).encode(), br#"{"name":"","notify_msg":"success"}"#);
        let empty = r#"{"local_gid":"","local_lid":0,"local_nic_path":"","payload":"","peer_nic_path":"","qp_num":[],"reply_msg":""}"#;
        assert_eq!(Handshake::default().encode(), empty.as_bytes());
    }

    proptest! {
        #[test]
        fn random_bodies_never_panic(body in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = ControlFrame::decode(&body);
        }

        #[test]
        fn frames_round_trip(kind in 0u8..4, name in "\\PC{0,20}", notify_msg in "\\PC{0,40}") {
            let json = NotifyBody { name, notify_msg }.encode();
            let kind = [ControlKind::Connection, ControlKind::Metadata, ControlKind::Notify, ControlKind::Probe][kind as usize];
            for (frame, old) in [(encode_frame(kind, &json), false), (encode_old_frame(&json), true)] {
                let (length, body) = frame.split_first_chunk::<LENGTH_BYTES>().unwrap();
                prop_assert_eq!(decode_length(*length, 1 << 20), Ok(body.len() as u64));
                let seen = ControlFrame::decode(body).unwrap();
                prop_assert_eq!((seen.old, seen.json), (old, json.as_slice()));
                prop_assert_eq!(seen.kind, if old { ControlKind::Connection } else { kind });
            }
        }
    }
}
