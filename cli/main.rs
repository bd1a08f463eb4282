//! `tidewire`: the command-line tool.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidewire_cli::run_tool()
}
