//! Interoperation with the official Mooncake release, in both directions, every byte compared: `engine` over the public API and
//! every way of discovery, the others at the level of transport and control RPC.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "tests")]

mod engine;
#[cfg(feature = "etcd")]
#[path = "../support/etcd.rs"]
mod etcd;
mod faults;
mod from_official;
mod node;
mod official;
mod stores;
mod to_official;
