//! Control calls to a peer: fetch its descriptor, notify it, probe it.
//!
//! Every call opens a connection of its own, as the protocol asks, and ends within its deadlines.

use std::{io, time::Duration};

use tidewire_core::{
    Notify,
    mooncake::{
        control::{ControlFrame, ControlKind, DEFAULT_MAX_FRAME_BYTES, Handshake, NotifyBody, ProbeBody, encode_frame},
        descriptor::SegmentDescriptor,
        host::HostPort,
    },
};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};

use super::{
    ControlError,
    frame_io::{ReadError, read_body, read_length},
};

/// What is sent when a descriptor is asked for: peers do not look at it, and an own descriptor would hand the own access
/// token to whoever listens there.
const NO_DESCRIPTOR: &[u8] = b"{}";

/// Deadlines of control calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientTimeouts {
    /// Resolving and connecting.
    pub connect: Duration,
    /// From the request to the last byte of the reply.
    pub reply: Duration,
}

impl Default for ClientTimeouts {
    fn default() -> Self {
        ClientTimeouts { connect: Duration::from_secs(5), reply: Duration::from_secs(60) }
    }
}

/// Makes control calls; holds nothing but its limits.
#[derive(Clone, Debug)]
pub struct ControlClient {
    /// Deadlines of each call.
    pub timeouts: ClientTimeouts,
    /// Longest reply; a segment of 100 000 buffers takes about 10 MiB.
    pub max_reply_bytes: u64,
}

impl Default for ControlClient {
    fn default() -> Self {
        ControlClient { timeouts: ClientTimeouts::default(), max_reply_bytes: 64 * DEFAULT_MAX_FRAME_BYTES }
    }
}

impl ControlClient {
    /// Asks for the peer's descriptor: the JSON as sent, which may end with a newline. `None` if the peer publishes
    /// through a store instead.
    ///
    /// # Errors
    /// Any [`ControlError`] of a call.
    pub async fn fetch_descriptor_json(&self, address: &HostPort) -> Result<Option<Vec<u8>>, ControlError> {
        let json = self.call(address, "fetch descriptor", ControlKind::Metadata, NO_DESCRIPTOR).await?;
        Ok((json.trim_ascii() != b"null").then_some(json))
    }

    /// Asks for the peer's descriptor and checks it.
    ///
    /// # Errors
    /// Any [`ControlError`] of a call; [`ControlError::Reply`] if what came is no usable descriptor.
    pub async fn fetch_descriptor(&self, address: &HostPort) -> Result<Option<SegmentDescriptor>, ControlError> {
        let Some(json) = self.fetch_descriptor_json(address).await? else { return Ok(None) };
        SegmentDescriptor::decode(&json).map(Some).map_err(|error| {
            tracing::debug!(peer = %address, %error, "descriptor refused");
            ControlError::Reply { address: address.to_string(), call: "fetch descriptor" }
        })
    }

    /// Delivers a notification; when this returns, the peer has it.
    ///
    /// # Errors
    /// Any [`ControlError`] of a call; [`ControlError::Rejected`] if the peer does not take it.
    pub async fn notify(&self, address: &HostPort, notify: &Notify) -> Result<(), ControlError> {
        let body = NotifyBody { name: notify.name.clone(), notify_msg: notify.message.clone() };
        let answer: NotifyBody = self.call_json(address, "notify", ControlKind::Notify, &body.encode()).await?;
        match answer.notify_msg.is_empty() {
            true => Err(ControlError::Rejected { address: address.to_string(), call: "notify" }),
            false => Ok(()),
        }
    }

    /// Asks whether the peer is well.
    ///
    /// # Errors
    /// Any [`ControlError`] of a call; [`ControlError::Rejected`] if the peer says it is not.
    pub async fn probe(&self, address: &HostPort) -> Result<(), ControlError> {
        let answer: ProbeBody = self.call_json(address, "probe", ControlKind::Probe, b"{}").await?;
        match answer.status.as_str() {
            "success" => Ok(()),
            _ => Err(ControlError::Rejected { address: address.to_string(), call: "probe" }),
        }
    }

    /// One step of an RDMA handshake.
    ///
    /// # Errors
    /// Any [`ControlError`] of a call. A refusal is in the reply's `reply_msg`.
    pub async fn handshake(&self, address: &HostPort, request: &Handshake) -> Result<Handshake, ControlError> {
        self.call_json(address, "handshake", ControlKind::Connection, &request.encode()).await
    }

    async fn call_json<T: serde::de::DeserializeOwned>(
        &self,
        address: &HostPort,
        call: &'static str,
        kind: ControlKind,
        json: &[u8],
    ) -> Result<T, ControlError> {
        let reply = self.call(address, call, kind, json).await?;
        serde_json::from_slice(&reply).map_err(|_| ControlError::Reply { address: address.to_string(), call })
    }

    async fn call(
        &self,
        address: &HostPort,
        call: &'static str,
        kind: ControlKind,
        json: &[u8],
    ) -> Result<Vec<u8>, ControlError> {
        let late = |step, limit: Duration| ControlError::TimedOut {
            address: address.to_string(),
            step,
            timeout_ms: limit.as_millis() as u64,
        };
        let ended = |source| ControlError::Ended { address: address.to_string(), call, source };
        let mut stream = timeout(self.timeouts.connect, connect(address))
            .await
            .map_err(|_| late("accept a connection", self.timeouts.connect))??;
        let exchange = async {
            stream.write_all(&encode_frame(kind, json)).await.map_err(ReadError::Io)?;
            let length = read_length(&mut stream, self.max_reply_bytes).await?;
            read_body(&mut stream, length).await
        };
        let body = match timeout(self.timeouts.reply, exchange).await {
            Err(_) => return Err(late("answer", self.timeouts.reply)),
            Ok(Err(ReadError::Io(source))) => return Err(ended(source)),
            Ok(Err(ReadError::Frame(source))) => {
                return Err(ControlError::Frame { address: address.to_string(), call, source });
            }
            Ok(Ok(body)) => body,
        };
        let frame = ControlFrame::decode(&body).map_err(|source| ControlError::Frame {
            address: address.to_string(),
            call,
            source,
        })?;
        if frame.kind != kind || frame.old {
            return Err(ControlError::Reply { address: address.to_string(), call });
        }
        Ok(frame.json.to_vec())
    }
}

async fn connect(address: &HostPort) -> Result<TcpStream, ControlError> {
    let unresolved = |source| ControlError::Resolve { address: address.to_string(), source };
    let found: Vec<_> =
        tokio::net::lookup_host((address.host.as_str(), address.port)).await.map_err(unresolved)?.collect();
    if found.is_empty() {
        return Err(unresolved(io::ErrorKind::NotFound.into()));
    }
    let stream = TcpStream::connect(found.as_slice())
        .await
        .map_err(|source| ControlError::Connect { address: address.to_string(), source })?;
    let _ = stream.set_nodelay(true);
    Ok(stream)
}
