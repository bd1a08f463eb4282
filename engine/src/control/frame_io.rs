//! Reading one control frame from a stream without trusting its length.
//!
//! Memory grows with the bytes that arrive, never with the length a peer claims.

use std::io;

use tidewire_core::mooncake::control::{FrameError, LENGTH_BYTES, decode_length};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Why no frame could be read.
#[derive(Debug)]
pub(super) enum ReadError {
    /// The stream ended or broke.
    Io(io::Error),
    /// The length is out of bounds.
    Frame(FrameError),
}

/// Reads the length, checked against `limit_bytes`.
pub(super) async fn read_length<S: AsyncRead + Unpin>(stream: &mut S, limit_bytes: u64) -> Result<u64, ReadError> {
    let mut length = [0; LENGTH_BYTES];
    stream.read_exact(&mut length).await.map_err(ReadError::Io)?;
    decode_length(length, limit_bytes).map_err(ReadError::Frame)
}

/// Reads the `length` bytes behind the length.
pub(super) async fn read_body<S: AsyncRead + Unpin>(stream: &mut S, length: u64) -> Result<Vec<u8>, ReadError> {
    let mut body = Vec::new();
    read_more(stream, &mut body, length).await?;
    Ok(body)
}

/// Reads the next `length` bytes onto the end of `body`.
pub(super) async fn read_more<S: AsyncRead + Unpin>(
    stream: &mut S,
    body: &mut Vec<u8>,
    length: u64,
) -> Result<(), ReadError> {
    let read = stream.take(length).read_to_end(body).await.map_err(ReadError::Io)?;
    if (read as u64) < length {
        return Err(ReadError::Io(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(())
}
