//! Spelling of flags as gflags takes it, rewritten to the tool's own.
//!
//! gflags takes one dash or two, `=` or a blank before the value, `--noX` and `--X=true` for booleans, and `-` for `_` in
//! names. Flags of its logging library are dropped, because scripts pass them along.

use clap::{ArgAction, Command};

/// Flags of glog that change only its log output.
const IGNORED: [&str; 9] = [
    "logtostderr",
    "alsologtostderr",
    "colorlogtostderr",
    "log_prefix",
    "minloglevel",
    "stderrthreshold",
    "log_dir",
    "vmodule",
    "max_log_size",
];

/// Rewrites `arguments` (without the program name) for `command`, and names what was dropped.
pub fn normalise(command: &Command, arguments: &[String]) -> (Vec<String>, Vec<String>) {
    let (mut kept, mut dropped) = (Vec::new(), Vec::new());
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if argument == "--" {
            kept.push(argument.clone());
            kept.extend(rest.cloned());
            break;
        }
        match rewrite(command, argument) {
            Spelling::Flag { text, takes_value } => {
                kept.push(text);
                // The value as the next word, whatever it looks like.
                kept.extend(takes_value.then(|| rest.next().cloned()).flatten());
            }
            Spelling::Ignored => dropped.push(argument.clone()),
            Spelling::Other => kept.push(argument.clone()),
        }
    }
    (kept, dropped)
}

enum Spelling {
    Flag { text: String, takes_value: bool },
    Ignored,
    Other,
}

fn rewrite(command: &Command, argument: &str) -> Spelling {
    let Some(bare) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
        return Spelling::Other;
    };
    let (name, value) = match bare.split_once('=') {
        Some((name, value)) => (name.replace('-', "_"), Some(value)),
        None => (bare.replace('-', "_"), None),
    };
    if let Some(boolean) = kind_of(command, &name) {
        let text = match (boolean, value) {
            (true, None) => format!("--{name}=true"),
            (_, Some(value)) => format!("--{name}={value}"),
            (false, None) => format!("--{name}"),
        };
        return Spelling::Flag { text, takes_value: !boolean && value.is_none() && requires_value(command, &name) };
    }
    if let Some(positive) = name.strip_prefix("no").filter(|p| value.is_none() && kind_of(command, p) == Some(true)) {
        return Spelling::Flag { text: format!("--{positive}=false"), takes_value: false };
    }
    if IGNORED.iter().any(|i| *i == name || name.strip_prefix("no") == Some(i)) || (name == "v" && value.is_some()) {
        return Spelling::Ignored;
    }
    Spelling::Other
}

/// Whether the flag `name` is boolean; `None` if there is none.
fn kind_of(command: &Command, name: &str) -> Option<bool> {
    let argument = command.get_arguments().find(|a| a.get_long() == Some(name))?;
    let values = argument.get_possible_values();
    Some(matches!(argument.get_action(), ArgAction::Set) && values.iter().any(|v| v.matches("true", false)))
}

fn requires_value(command: &Command, name: &str) -> bool {
    let argument = command.get_arguments().find(|a| a.get_long() == Some(name));
    argument
        .is_some_and(|a| a.get_action().takes_values() && a.get_num_args().is_none_or(|range| range.min_values() > 0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use clap::{Args, FromArgMatches};

    use super::*;
    use crate::bench::flags::{BenchFlags, Operation};

    fn read(arguments: &[&str]) -> (Result<BenchFlags, String>, Vec<String>) {
        let mut command = BenchFlags::augment_args(Command::new("bench").no_binary_name(true).args_override_self(true));
        command.build();
        let words: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
        let (kept, dropped) = normalise(&command, &words);
        let matches = command.try_get_matches_from(kept).and_then(|matches| BenchFlags::from_arg_matches(&matches));
        (matches.map_err(|error| error.to_string()), dropped)
    }

    #[test]
    fn defaults_are_those_of_the_original() {
        let flags = read(&[]).0.unwrap();
        assert_eq!((flags.block_size, flags.batch_size, flags.threads), (65536, 128, 12));
        assert_eq!((flags.duration, flags.buffer_size, flags.operation), (10.0, 1 << 30, Operation::Read));
        assert_eq!((flags.metadata(), flags.target_name()), ("192.168.3.77:2379", "192.168.3.76"));
        assert!(flags.protocol == "rdma" && !flags.auto_discovery && flags.report_precision == 2);
    }

    #[test]
    fn one_dash_two_dashes_equals_and_blank_are_the_same() {
        for spelling in [
            &["-block_size=4096", "-threads", "3", "-auto_discovery"][..],
            &["--block_size", "4096", "--threads=3", "--auto_discovery=true"],
            &["--block-size=4096", "-threads=3", "--auto-discovery=1"],
        ] {
            let (flags, dropped) = read(spelling);
            let flags = flags.map(|flags| (flags.block_size, flags.threads, flags.auto_discovery));
            assert_eq!((flags, dropped.len()), (Ok((4096, 3, true)), 0), "{spelling:?}");
        }
    }

    #[test]
    fn no_turns_a_boolean_off_and_nothing_else() {
        let (flags, _) = read(&["--auto_discovery", "--noauto_discovery", "-nouse_vram"]);
        assert_eq!(flags.map(|flags| (flags.auto_discovery, flags.use_vram)), Ok((false, Some(false))));
        assert!(read(&["--nothreads"]).0.is_err() && read(&["--nosuchflag"]).0.is_err());
    }

    #[test]
    fn log_flags_are_dropped_and_named() {
        let (flags, dropped) = read(&["-logtostderr", "--v=1", "--nolog_prefix", "--minloglevel=2", "--threads=2"]);
        assert_eq!(flags.map(|flags| flags.threads), Ok(2));
        assert_eq!(dropped, ["-logtostderr", "--v=1", "--nolog_prefix", "--minloglevel=2"]);
    }

    #[test]
    fn own_flags_may_stand_without_a_value() {
        let (flags, _) = read(&["--pair", "--check", "--json", "--sweep=4k,64k", "--batch-sweep", "1,16"]);
        let flags = flags.map(|f| (f.pair, f.check, f.json.is_some(), f.block_sizes(), f.batch_sizes()));
        assert_eq!(flags, Ok((true, true, true, vec![4096, 65536], vec![1, 16])));
    }

    #[test]
    fn a_buffer_holds_the_largest_point() {
        let flags = read(&["--sweep=1M,64k", "--batch_sweep=1,512", "--threads=4"]).0;
        assert_eq!(flags.ok().and_then(|flags| flags.buffer_bytes().ok()), Some(2 << 30));
        let flags = read(&["--block_size=0"]).0;
        assert!(flags.is_ok_and(|flags| flags.buffer_bytes().is_err()));
        let flags = read(&["--block_size=9999G", "--threads=1024"]).0;
        assert!(flags.is_ok_and(|flags| flags.buffer_bytes().is_err()));
    }
}
