//! Interoperation with the official Mooncake release, at the level of transport and control RPC: both directions, every
//! byte compared.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "tests")]

mod faults;
mod from_official;
mod node;
mod official;
mod to_official;
