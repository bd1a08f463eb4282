//! Faults: bad input, strangers on every port, peers that die, freeze or vanish. Each gives a typed error in bounded time,
//! and nothing hangs, leaks or is touched afterwards.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "tests")]

#[path = "../support/cma.rs"]
mod cma;
mod input;
mod partition;
mod peer;
mod strangers;
mod target;
mod vanish;
