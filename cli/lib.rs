//! The command-line tool of Tidewire: one module per command, shared by the binaries `tidewire` and
//! `transfer_engine_bench`.
//!
//! Results go to stdout, everything else (logs, progress, errors with a hint) to stderr. The exit status is 0 when the
//! command did what it was asked, 1 when it failed and 2 when it was called wrongly.
//!
//! Invariant: a process that a command starts never outlives it (see `child`).
#![forbid(unsafe_code)]

mod app;
mod bench;
mod child;
mod config;
mod cpu;
mod demo;
mod error;
mod histogram;
mod logging;
mod metadata_server;
mod pattern;
mod segments;
mod stop;
mod table;
mod units;

pub use app::{run_bench, run_tool};
