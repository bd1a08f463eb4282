//! Conformance: the rules of a trait, run over every implementation of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "tests")]

#[path = "../support/cma.rs"]
mod cma;
#[path = "../support/common.rs"]
mod common;
#[cfg(feature = "etcd")]
#[path = "../support/etcd.rs"]
mod etcd;
mod metadata;
#[cfg(feature = "etcd")]
#[path = "../support/stopped.rs"]
mod stopped;
mod transport;
