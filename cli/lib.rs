//! The command-line tool of Tidewire: one module per command, shared by the binaries `tidewire` and
//! `transfer_engine_bench`.
//!
//! Results go to stdout, everything else (logs, progress, errors with a hint) to stderr. The exit status is 0 when the
//! command did what it was asked, 1 when it failed and 2 when it was called wrongly.
//!
//! Invariant: a process that a command starts never outlives it (see [`child`]).
#![forbid(unsafe_code)]

mod app;
pub mod bench;
pub mod child;
pub mod config;
pub mod cpu;
pub mod demo;
pub mod error;
pub mod histogram;
mod logging;
pub mod metadata_server;
pub mod pattern;
pub mod segments;
pub mod stop;
pub mod table;
pub mod units;

pub use app::{run_bench, run_tool};
