//! The built binaries, run as a user runs them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "tests")]

mod bench;
mod demo;
mod discovery;
mod support;
mod usage;
