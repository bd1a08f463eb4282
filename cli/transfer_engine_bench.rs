//! `transfer_engine_bench`: `tidewire bench` under the name that scripts written for Mooncake call.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidewire_cli::run_bench()
}
