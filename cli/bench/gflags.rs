//! Spelling of flags as gflags takes it, rewritten to the tool's own.
//!
//! gflags takes one dash or two, `=` or a blank before the value, `--noX` and `--X=true` for booleans, and `-` for `_` in
//! names. Flags of its logging library are dropped, because scripts pass them along.

use clap::{ArgAction, Command};

/// Flags of glog that change only its log output: name, and whether a value follows.
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
    argument.is_some_and(|a| {
        a.get_action().takes_values() && a.get_num_args().is_none_or(|range| range.min_values() > 0)
    })
}
