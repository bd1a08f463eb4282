//! The command line: what there is to call, and what each call ends with.

use std::{ffi::OsString, process::ExitCode};

use clap::{Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::{
    bench::{self, flags::BenchFlags, gflags},
    config::{self, ConfigFlags},
    demo::{self, DemoFlags},
    error::CliError,
    logging,
    metadata_server::{self, MetadataServerFlags},
    segments::{self, SegmentsFlags},
};

/// Version and the commit it was built from.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("TIDEWIRE_COMMIT"), ")");
/// Name of the benchmark among the commands.
const BENCH: &str = "bench";

/// Moves KV cache between processes.
#[derive(Debug, Parser)]
#[command(name = "tidewire", version = VERSION, arg_required_else_help = true)]
struct Tool {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Call,
}

/// What every command takes.
#[derive(Args, Clone, Debug)]
struct Common {
    /// Log more: info, debug, trace. The variable TIDEWIRE_LOG takes finer filters.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Call {
    /// Move a KV cache from a prefill process to a decode process and compare every byte.
    Demo(DemoFlags),
    /// Measure transfers, with the flags and the report of Mooncake's transfer_engine_bench.
    #[command(args_override_self = true)]
    Bench(Box<BenchFlags>),
    /// Serve metadata over HTTP, for Tidewire and for Mooncake.
    MetadataServer(MetadataServerFlags),
    /// List who is registered, and whether they answer.
    Segments(SegmentsFlags),
    /// Print every setting with its value.
    Config(ConfigFlags),
}

/// The benchmark as a program of its own.
#[derive(Debug, Parser)]
#[command(name = "transfer_engine_bench", version = VERSION, about = "Measures transfers between two processes",
          args_override_self = true)]
struct BenchTool {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    flags: BenchFlags,
}

/// Entry of `tidewire`.
pub fn run_tool() -> ExitCode {
    let arguments = arguments();
    if let Some(status) = run_role(&arguments) {
        return status;
    }
    let rewritten = match arguments.iter().position(|argument| !argument.starts_with('-')) {
        Some(at) if arguments[at] == BENCH => {
            let (before, flags) = arguments.split_at(at + 1);
            [before.to_vec(), gflags_for(Tool::command().find_subcommand_mut(BENCH), flags)].concat()
        }
        _ => arguments,
    };
    let tool: Tool = match parse("tidewire", rewritten) {
        Ok(tool) => tool,
        Err(status) => return status,
    };
    logging::start(tool.common.verbose);
    finish(match &tool.command {
        Call::Demo(flags) => demo::run(flags),
        Call::Bench(flags) => bench::run(flags),
        Call::MetadataServer(flags) => metadata_server::run(flags),
        Call::Segments(flags) => segments::run(flags),
        Call::Config(flags) => config::run(flags),
    })
}

/// Entry of `transfer_engine_bench`.
pub fn run_bench() -> ExitCode {
    let arguments = arguments();
    if let Some(status) = run_role(&arguments) {
        return status;
    }
    let rewritten = gflags_for(Some(&mut BenchTool::command()), &arguments);
    let tool: BenchTool = match parse("transfer_engine_bench", rewritten) {
        Ok(tool) => tool,
        Err(status) => return status,
    };
    logging::start(tool.common.verbose);
    finish(bench::run(&tool.flags))
}

/// Runs this process as a child of another command, if that is what it was started for.
fn run_role(arguments: &[String]) -> Option<ExitCode> {
    let role = arguments.first()?.strip_prefix("__")?;
    logging::start(0);
    match role {
        demo::scene::ROLE => Some(finish(demo::role::serve())),
        bench::pair::ROLE => Some(finish(bench::pair::serve())),
        _ => None,
    }
}

fn arguments() -> Vec<String> {
    std::env::args_os().skip(1).map(|argument: OsString| argument.to_string_lossy().into_owned()).collect()
}

fn gflags_for(command: Option<&mut Command>, flags: &[String]) -> Vec<String> {
    let Some(command) = command else { return flags.to_vec() };
    command.build();
    let (kept, dropped) = gflags::normalise(command, flags);
    if !dropped.is_empty() {
        eprintln!("transfer_engine_bench: ignored log flags: {}", dropped.join(" "));
    }
    kept
}

fn parse<T: CommandFactory + FromArgMatches>(name: &str, arguments: Vec<String>) -> Result<T, ExitCode> {
    let words = std::iter::once(name.to_owned()).chain(arguments);
    let parsed = T::command().try_get_matches_from(words).and_then(|matches| T::from_arg_matches(&matches));
    parsed.map_err(|error| {
        // Printing can fail only when nobody reads.
        let _ = error.print();
        ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
    })
}

fn finish(result: Result<(), CliError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            let hint = error.hint();
            if !hint.is_empty() {
                eprintln!("hint: {hint}");
            }
            error.exit_code()
        }
    }
}
