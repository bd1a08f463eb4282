//! `tidewire config`: every setting, with the value it has here.

use clap::Args;
use tidewire_engine::config::{Config, PARAMS, markdown::config_markdown};

use crate::{error::CliError, table::Table};

/// Prints the settings.
#[derive(Args, Clone, Debug)]
pub struct ConfigFlags {
    /// Print the documentation of all settings instead, as Markdown.
    #[arg(long)]
    pub markdown: bool,
}

/// Prints to stdout.
///
/// # Errors
/// None; the type is that of all commands.
pub fn run(flags: &ConfigFlags) -> Result<(), CliError> {
    if flags.markdown {
        print!("{}", config_markdown());
        return Ok(());
    }
    let (current, default) = (Config::from_env(), Config::default());
    let mut table = Table::new(["setting", "value", "", "meaning"]);
    for param in PARAMS {
        let value = param.value(&current);
        let changed = if value == param.value(&default) { "" } else { "changed" };
        let unit = if value.is_empty() { "" } else { param.unit };
        let shown = if param.secret && !value.is_empty() { "(set)".to_owned() } else { format!("{value} {unit}") };
        table.row([param.name.to_owned(), shown.trim().to_owned(), changed.to_owned(), param.help.to_owned()]);
    }
    print!("{}", table.render());
    Ok(())
}
