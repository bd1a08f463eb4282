//! What a command can fail with: the text, a hint for the user, and the exit status.

use std::process::ExitCode;

use tidewire_core::{ErrorClass, TransferError};
use tidewire_engine::metadata::StoreError;

use crate::pattern::Mismatch;

/// Failure of a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CliError {
    /// The command was called wrongly.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to do instead.
        hint: String,
    },
    /// The engine failed.
    #[error("{doing}: {source}")]
    Transfer {
        /// What was being done.
        doing: String,
        /// Why it failed.
        #[source]
        source: TransferError,
    },
    /// The metadata store failed.
    #[error("{doing}: {source}")]
    Store {
        /// What was being done.
        doing: String,
        /// Why it failed.
        #[source]
        source: StoreError,
    },
    /// The operating system failed a call.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// Bytes arrived wrong.
    #[error("wrong bytes in {place}: {mismatch}")]
    Corrupt {
        /// Which block, on which side.
        place: String,
        /// The first wrong byte.
        mismatch: Mismatch,
    },
    /// Something other than bytes does not match (checksums, notification).
    #[error("{what}: expected {expected}, found {found}")]
    Differs {
        /// What was compared.
        what: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The target segment cannot serve the request.
    #[error("segment {segment}: {reason}")]
    Target {
        /// Segment name.
        segment: String,
        /// Why not.
        reason: String,
    },
    /// A second process of this command failed.
    #[error("{role} process: {message}")]
    Child {
        /// Which one.
        role: String,
        /// What it said.
        message: String,
        /// Its hint, possibly empty.
        hint: String,
    },
    /// Ended by a signal before there was a result.
    #[error("interrupted")]
    Interrupted,
}

impl CliError {
    /// Adds to an engine error what was being done.
    pub fn transfer(doing: impl Into<String>) -> impl FnOnce(TransferError) -> Self {
        let doing = doing.into();
        move |source| CliError::Transfer { doing, source }
    }

    /// Adds to a store error what was being done.
    pub fn store(doing: impl Into<String>) -> impl FnOnce(StoreError) -> Self {
        let doing = doing.into();
        move |source| CliError::Store { doing, source }
    }

    /// Adds to an operating-system error what was being done.
    pub fn io(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let doing = doing.into();
        move |source| CliError::Io { doing, source }
    }

    /// A call that cannot be served, with what to do instead.
    pub fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        CliError::Usage { message: message.into(), hint: hint.into() }
    }

    /// Exit status: 2 for a wrong call, 130 after a signal, else 1.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            CliError::Usage { .. } => ExitCode::from(2),
            CliError::Interrupted => ExitCode::from(130),
            _ => ExitCode::FAILURE,
        }
    }

    /// What the user can do about it; empty when there is nothing to add.
    pub fn hint(&self) -> String {
        match self {
            CliError::Usage { hint, .. } | CliError::Child { hint, .. } => hint.clone(),
            CliError::Transfer { source, .. } => class_hint(source).to_owned(),
            CliError::Store { source, .. } => store_hint(source).to_owned(),
            CliError::Corrupt { .. } | CliError::Differs { .. } => {
                "this is a defect of the engine or of the machine; run again with -vv and report both outputs"
                    .to_owned()
            }
            CliError::Io { .. } | CliError::Target { .. } | CliError::Interrupted => String::new(),
        }
    }
}

fn class_hint(error: &TransferError) -> &'static str {
    match error {
        TransferError::NoTransport { .. } => "let both sides offer one transport in common: --transport auto on each",
        TransferError::Setting { .. } => "`tidewire config` lists every setting with its range",
        TransferError::HandshakeRefused { .. } => {
            "open the segment again: the peer was restarted or is another version"
        }
        _ => match error.class() {
            ErrorClass::Metadata => "check the name, and that the metadata server answers: `tidewire segments`",
            ErrorClass::PeerDown => "check that the peer still runs and that its ports are reachable from here",
            ErrorClass::TimedOut => "the peer is slow or gone; a longer --timeout may help",
            ErrorClass::Corrupt => "bytes changed on the way: suspect a middlebox or memory; -v names the range",
            ErrorClass::Unavailable => "-v tells what was probed; `--transport tcp` needs nothing from the host",
            _ => "",
        },
    }
}

fn store_hint(error: &StoreError) -> &'static str {
    match error {
        StoreError::Uri { .. } => "use P2PHANDSHAKE, http://HOST:PORT/metadata or etcd://HOST:PORT",
        StoreError::Unreachable { .. } => {
            "start one with `tidewire metadata-server`, or use P2PHANDSHAKE, which needs none"
        }
        _ => "",
    }
}
