//! The public API, over real sockets on loopback and over a scripted transport.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "tests")]

mod transfer;
