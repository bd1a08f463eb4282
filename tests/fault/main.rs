//! Faults: bad input, strangers on every port, peers that die, freeze or vanish. Each gives a typed error in bounded time,
//! and nothing hangs, leaks or is touched afterwards.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "tests")]

#[path = "../support/cma.rs"]
mod cma;
#[cfg(feature = "etcd")]
#[path = "../support/common.rs"]
mod common;
mod crowd;
#[cfg(feature = "etcd")]
#[path = "../support/etcd.rs"]
mod etcd;
#[cfg(feature = "etcd")]
mod etcd_lost;
mod flood;
mod input;
mod listening;
mod partition;
mod peer;
#[path = "../support/stopped.rs"]
mod stopped;
mod strangers;
mod target;
mod vanish;
