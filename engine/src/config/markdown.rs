//! Prints the settings as `docs/CONFIG.md`.

use std::fmt::Write as _;

use super::{
    Config, PARAMS,
    kind::{Form, Kind, Param},
};

/// Text of `docs/CONFIG.md`.
pub fn config_markdown() -> String {
    let mut text = String::from(
        "# Settings\n\n\
        Printed by `tidewire config --markdown` from `engine/src/config/params.rs`; a test compares the two.\n\n\
        A value set in code (`Config`, builder) comes before a `TIDEWIRE_*` variable, which comes before a Mooncake alias, \
        which comes before the default. An alias that is used is logged once at `info`. A value that cannot be used, and \
        an unknown `TIDEWIRE_*` or `MC_*` variable, is logged once at `warn` and has no effect.\n\n\
        | variable | default | accepted | Mooncake aliases | meaning |\n\
        | --- | --- | --- | --- | --- |\n",
    );
    let defaults = Config::default();
    for param in PARAMS {
        // Writing to a `String` cannot fail.
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} | {} |",
            param.name,
            default_cell(param, &defaults),
            accepted_cell(param),
            alias_cell(param),
            param.help
        );
    }
    text
}

fn default_cell(param: &Param, defaults: &Config) -> String {
    let value = param.value(defaults);
    match (value.is_empty(), param.unit.is_empty()) {
        (true, _) => "empty".to_owned(),
        (false, true) => format!("`{value}`"),
        (false, false) => format!("`{value}` {}", param.unit),
    }
}

fn accepted_cell(param: &Param) -> String {
    match param.kind {
        Kind::Number { min, max, .. } => format!("{min} to {max}"),
        Kind::Flag { .. } => "0, 1".to_owned(),
        Kind::Text { .. } => "text".to_owned(),
        Kind::Transports { .. } => "list".to_owned(),
    }
}

fn alias_cell(param: &Param) -> String {
    let cell = |alias: &super::kind::Alias| match alias.form {
        Form::Same => format!("`{}`", alias.name),
        Form::Times(factor) => format!("`{}` × {factor}", alias.name),
        Form::Presence(meaning) => format!("`{}` set: `{meaning}`", alias.name),
    };
    if param.aliases.is_empty() {
        return "–".to_owned();
    }
    param.aliases.iter().map(cell).collect::<Vec<_>>().join(", ")
}
