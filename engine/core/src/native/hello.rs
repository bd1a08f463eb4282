//! Hello of the native protocol: 64 bytes each way.

use super::{FEATURE_CHECKSUM, VERSION, u16_at, u32_at, u64_at};
use crate::{error::RefuseReason, id::Generation};

/// Length of a hello and of its answer.
pub const HELLO_LEN: usize = 64;

const MAGIC: &[u8; 8] = b"TIDEWIRE";

/// What an initiator says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version offered.
    pub oldest: u16,
    /// Newest version offered.
    pub newest: u16,
    /// Features offered.
    pub features: u32,
    /// Access token of the segment.
    pub token: [u8; 16],
    /// Generation read from the descriptor.
    pub generation: Generation,
    /// Random number of the link.
    pub session: u64,
    /// Stream of the link.
    pub stream: u16,
    /// Counts the connections made for this stream.
    pub attempt: u32,
}

/// What a target answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Why not, if refused.
    pub refused: Option<RefuseReason>,
    /// Version in force.
    pub version: u16,
    /// Features in force.
    pub features: u32,
    /// Generation of the target; 0 if refused for version or token.
    pub generation: Generation,
    /// Limits of the target.
    pub limits: Limits,
}

/// What a target accepts on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries in a frame.
    pub entries: u32,
    /// Payload bytes in a frame.
    pub frame_bytes: u32,
    /// Unanswered frames.
    pub open_frames: u32,
    /// Heartbeat interval in milliseconds.
    pub heartbeat_ms: u32,
}

/// Why 64 bytes are no hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HelloError {
    /// Fewer than [`HELLO_LEN`] bytes.
    #[error("hello has {len} bytes instead of 64")]
    Short {
        /// Bytes given.
        len: usize,
    },
    /// Something else is talking.
    #[error("not a tidewire hello")]
    Magic,
    /// Bytes changed on the way.
    #[error("hello checksum differs")]
    Checksum,
    /// A limit no frame could keep.
    #[error("target announces a limit of zero")]
    Limit,
}

fn seal(bytes: &mut [u8; HELLO_LEN]) {
    let crc = crc32c::crc32c(&bytes[..60]);
    bytes[60..].copy_from_slice(&crc.to_le_bytes());
}

fn open(bytes: &[u8]) -> Result<(), HelloError> {
    if bytes.len() != HELLO_LEN {
        return Err(HelloError::Short { len: bytes.len() });
    }
    if bytes.get(..8) != Some(MAGIC.as_slice()) {
        return Err(HelloError::Magic);
    }
    let crc = crc32c::crc32c(bytes.get(..60).unwrap_or_default());
    if crc == u32_at(bytes, 60) { Ok(()) } else { Err(HelloError::Checksum) }
}

impl Hello {
    /// Wire form.
    pub fn encode(&self) -> [u8; HELLO_LEN] {
        let mut out = [0; HELLO_LEN];
        out[..8].copy_from_slice(MAGIC);
        out[8..10].copy_from_slice(&self.oldest.to_le_bytes());
        out[10..12].copy_from_slice(&self.newest.to_le_bytes());
        out[12..16].copy_from_slice(&self.features.to_le_bytes());
        out[16..32].copy_from_slice(&self.token);
        out[32..40].copy_from_slice(&self.generation.0.to_le_bytes());
        out[40..48].copy_from_slice(&self.session.to_le_bytes());
        out[48..50].copy_from_slice(&self.stream.to_le_bytes());
        out[52..56].copy_from_slice(&self.attempt.to_le_bytes());
        seal(&mut out);
        out
    }

    /// Reads the wire form.
    ///
    /// # Errors
    /// [`HelloError`], for which a target closes without an answer.
    pub fn decode(bytes: &[u8]) -> Result<Self, HelloError> {
        open(bytes)?;
        let mut token = [0; 16];
        token.copy_from_slice(&bytes[16..32]);
        Ok(Hello {
            oldest: u16_at(bytes, 8),
            newest: u16_at(bytes, 10),
            features: u32_at(bytes, 12),
            token,
            generation: Generation(u64_at(bytes, 32)),
            session: u64_at(bytes, 40),
            stream: u16_at(bytes, 48),
            attempt: u32_at(bytes, 52),
        })
    }

    /// Decides whether a target admits this peer.
    ///
    /// The token is checked first and in constant time; version and generation tell nothing to a stranger.
    pub fn judge(&self, token: &[u8; 16], generation: Generation, limits: Limits) -> Welcome {
        let refuse = |reason, generation| Welcome {
            refused: Some(reason),
            version: 0,
            features: 0,
            generation,
            limits: Limits { entries: 0, frame_bytes: 0, open_frames: 0, heartbeat_ms: 0 },
        };
        let difference = self.token.iter().zip(token).fold(0, |acc, (a, b)| acc | (a ^ b));
        if self.oldest > VERSION || self.newest == 0 || self.newest < self.oldest {
            refuse(RefuseReason::Version, Generation(0))
        } else if std::hint::black_box(difference) != 0 {
            refuse(RefuseReason::Token, Generation(0))
        } else if self.generation != generation {
            refuse(RefuseReason::Generation, generation)
        } else {
            let features = self.features & FEATURE_CHECKSUM;
            Welcome { refused: None, version: self.newest.min(VERSION), features, generation, limits }
        }
    }
}

impl Welcome {
    /// Wire form.
    pub fn encode(&self) -> [u8; HELLO_LEN] {
        let mut out = [0; HELLO_LEN];
        out[..8].copy_from_slice(MAGIC);
        out[8..10].copy_from_slice(&self.version.to_le_bytes());
        out[10..12].copy_from_slice(&self.refused.map_or(0, RefuseReason::code).to_le_bytes());
        out[12..16].copy_from_slice(&self.features.to_le_bytes());
        out[16..24].copy_from_slice(&self.generation.0.to_le_bytes());
        out[24..28].copy_from_slice(&self.limits.entries.to_le_bytes());
        out[28..32].copy_from_slice(&self.limits.frame_bytes.to_le_bytes());
        out[32..36].copy_from_slice(&self.limits.open_frames.to_le_bytes());
        out[36..40].copy_from_slice(&self.limits.heartbeat_ms.to_le_bytes());
        seal(&mut out);
        out
    }

    /// Reads the wire form.
    ///
    /// # Errors
    /// [`HelloError`]: whatever answered is no target of this protocol.
    pub fn decode(bytes: &[u8]) -> Result<Self, HelloError> {
        open(bytes)?;
        let refusal = u16_at(bytes, 10);
        let limits = Limits {
            entries: u32_at(bytes, 24),
            frame_bytes: u32_at(bytes, 28),
            open_frames: u32_at(bytes, 32),
            heartbeat_ms: u32_at(bytes, 36),
        };
        if refusal == 0 && (limits.entries == 0 || limits.frame_bytes == 0 || limits.open_frames == 0) {
            return Err(HelloError::Limit);
        }
        Ok(Welcome {
            refused: (refusal != 0).then(|| RefuseReason::from_code(refusal)),
            version: u16_at(bytes, 8),
            features: u32_at(bytes, 12),
            generation: Generation(u64_at(bytes, 16)),
            limits,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { entries: 512, frame_bytes: 1 << 20, open_frames: 64, heartbeat_ms: 1000 };

    fn hello() -> Hello {
        Hello {
            oldest: 1,
            newest: 1,
            features: FEATURE_CHECKSUM,
            token: [7; 16],
            generation: Generation(9),
            session: 3,
            stream: 2,
            attempt: 1,
        }
    }

    #[test]
    fn hello_and_welcome_round_trip() {
        assert_eq!(Hello::decode(&hello().encode()), Ok(hello()));
        let welcome = hello().judge(&[7; 16], Generation(9), LIMITS);
        assert_eq!(welcome.refused, None);
        assert_eq!(Welcome::decode(&welcome.encode()), Ok(welcome));
    }

    #[test]
    fn a_stranger_learns_no_generation() {
        let welcome = hello().judge(&[8; 16], Generation(9), LIMITS);
        assert_eq!((welcome.refused, welcome.generation), (Some(RefuseReason::Token), Generation(0)));
        assert_eq!(Welcome::decode(&welcome.encode()), Ok(welcome));
    }

    #[test]
    fn another_generation_or_version_is_refused_by_name() {
        assert_eq!(hello().judge(&[7; 16], Generation(1), LIMITS).refused, Some(RefuseReason::Generation));
        let newer = Hello { oldest: 2, newest: 3, ..hello() };
        assert_eq!(newer.judge(&[7; 16], Generation(9), LIMITS).refused, Some(RefuseReason::Version));
        let wider = Hello { oldest: 1, newest: 3, ..hello() };
        assert_eq!(wider.judge(&[7; 16], Generation(9), LIMITS).version, VERSION);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = hello().encode();
        for bit in 0..HELLO_LEN * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Hello::decode(&bad).is_err(), "bit {bit}");
        }
    }
}
