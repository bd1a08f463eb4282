//! Logs go to stderr; `-v` and the variable `TIDEWIRE_LOG` say how much.

use std::{
    io::IsTerminal,
    sync::atomic::{AtomicU8, Ordering},
};

use tracing_subscriber::EnvFilter;

/// Filter for logs, in `tracing`'s directives; wins over `-v`.
pub const LOG_SETTING: &str = "TIDEWIRE_LOG";

/// What logging was started with, for second processes. Only ever read after it was written, by the same thread.
static VERBOSITY: AtomicU8 = AtomicU8::new(0);

/// Starts logging at `warn`, or more for each `-v`: `info`, `debug`, `trace`.
pub fn start(verbosity: u8) {
    VERBOSITY.store(verbosity, Ordering::Relaxed);
    // What started this process may have asked for more; it tells through the same variable.
    let filter = EnvFilter::try_from_env(LOG_SETTING).unwrap_or_else(|_| EnvFilter::new(level(verbosity)));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // Fails only if logging was started before, which does no harm.
    let _ = logs.try_init();
}

/// What a second process is to be told so that it logs as this one does; `None` if it inherits that anyway.
pub fn for_child() -> Option<(&'static str, &'static str)> {
    let verbosity = VERBOSITY.load(Ordering::Relaxed);
    let level = level(verbosity);
    (verbosity > 0 && std::env::var_os(LOG_SETTING).is_none()).then_some((LOG_SETTING, level))
}

fn level(verbosity: u8) -> &'static str {
    match verbosity {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    }
}
