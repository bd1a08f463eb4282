//! The public API, over real transports on loopback and over a scripted one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "tests")]

mod claim;
#[path = "../../../tests/support/cma.rs"]
mod cma;
mod deadlines;
mod discovery;
mod examples;
mod processes;
mod registration;
mod requests;
mod support;
mod transfer;
