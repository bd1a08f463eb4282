//! Logs go to stderr; `-v` and the variable `TIDEWIRE_LOG` say how much.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Filter for logs, in `tracing`'s directives; wins over `-v`.
pub const LOG_SETTING: &str = "TIDEWIRE_LOG";

/// Starts logging at `warn`, or more for each `-v`: `info`, `debug`, `trace`.
pub fn start(verbosity: u8) {
    let default = match verbosity {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    // What started this process may have asked for more; it tells through the same variable.
    let filter = EnvFilter::try_from_env(LOG_SETTING).unwrap_or_else(|_| EnvFilter::new(default));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // Fails only if logging was started before, which does no harm.
    let _ = logs.try_init();
}

/// The variables that make a second process log as this one does.
pub fn inherited(verbosity: u8) -> Option<(&'static str, &'static str)> {
    let level = match verbosity {
        0 => return None,
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    std::env::var_os(LOG_SETTING).is_none().then_some((LOG_SETTING, level))
}
