//! Mooncake control RPC: the server every engine runs, and the calls it makes to its peers.
//!
//! One request per TCP connection (see `docs/mooncake-wire.md`). The server is concurrent and gives every connection its
//! own deadline, so that a silent peer delays nobody. Everything here runs on the control runtime (`tw-ctl`), off the data
//! path.

mod client;
mod frame_io;
pub mod listen;
mod server;

use std::fmt::Debug;

pub use client::{ClientTimeouts, ControlClient};
pub use server::{ControlServer, ServerConfig};
use tidewire_core::mooncake::control::FrameError;
pub use tidewire_core::mooncake::control::Handshake;

/// What answers the requests of a [`ControlServer`].
///
/// Called on the control runtime, so no method may block; each call is answered before its connection goes on.
pub trait ControlHandler: Send + Sync + Debug {
    /// The segment descriptor as JSON; `null` where peers find it in a store. `request` is the caller's own descriptor,
    /// which no one needs.
    fn metadata(&self, request: &[u8]) -> Vec<u8>;
    /// Takes a notification.
    ///
    /// # Errors
    /// [`NotifyRefused`] makes the sender's call fail.
    fn notify(&self, name: String, message: String) -> Result<(), NotifyRefused>;
    /// Answers an RDMA handshake. An engine without RDMA answers with empty fields.
    fn handshake(&self, _request: Handshake) -> Handshake {
        Handshake::default()
    }
    /// Whether the engine is well.
    fn probe(&self) -> bool {
        true
    }
}

/// Why a notification was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotifyRefused {
    /// Too many wait to be read.
    #[error("{queued} notifications wait to be read")]
    Full {
        /// How many.
        queued: usize,
    },
    /// The engine is shutting down.
    #[error("shutting down")]
    ShuttingDown,
}

/// Failure of a control call or of the server's start. Every variant names the address.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The address has no host, or its host is unknown.
    #[error("cannot resolve {address}")]
    Resolve {
        /// As given.
        address: String,
        /// What the resolver said.
        #[source]
        source: std::io::Error,
    },
    /// No connection.
    #[error("cannot connect to {address}")]
    Connect {
        /// Peer.
        address: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A step took too long.
    #[error("{address} did not {step} within {timeout_ms} ms")]
    TimedOut {
        /// Peer.
        address: String,
        /// Which step.
        step: &'static str,
        /// The limit.
        timeout_ms: u64,
    },
    /// The connection broke, or was closed before the reply: the peer refused the request.
    #[error("connection to {address} ended during {call}")]
    Ended {
        /// Peer.
        address: String,
        /// Which call.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The reply is no control frame.
    #[error("{address} answered {call} with something else")]
    Frame {
        /// Peer.
        address: String,
        /// Which call.
        call: &'static str,
        /// What is wrong.
        #[source]
        source: FrameError,
    },
    /// The reply has the wrong type or the wrong fields.
    #[error("{address} answered {call} with an unexpected reply")]
    Reply {
        /// Peer.
        address: String,
        /// Which call.
        call: &'static str,
    },
    /// The peer said no.
    #[error("{address} rejected {call}")]
    Rejected {
        /// Peer.
        address: String,
        /// Which call.
        call: &'static str,
    },
    /// No listener on the address asked for.
    #[error("cannot listen on {address}")]
    Listen {
        /// Address and port, or range of ports.
        address: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

impl ControlError {
    /// The error with its causes, in one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(source) = cause {
            text.push_str(": ");
            text.push_str(&source.to_string());
            cause = source.source();
        }
        text
    }
}

#[cfg(test)]
mod tests;
