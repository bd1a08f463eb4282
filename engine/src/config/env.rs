//! Reading of settings from variables: pure, with remarks on what was odd.

use std::collections::BTreeMap;

use tidewire_core::TransportKind;

use super::{
    Config, PARAMS,
    kind::{Alias, Form, Kind, Param},
};

/// Prefixes of variables that belong to tests and tools, not to an engine.
const FOREIGN_PREFIXES: &[&str] = &[
    "TIDEWIRE_LOG",
    "TIDEWIRE_COMMIT",
    "TIDEWIRE_TEST_",
    "TIDEWIRE_CONFORMANCE_",
    "TIDEWIRE_FUZZ_",
    "TIDEWIRE_BENCH_",
    "TIDEWIRE_PEERS_",
];

/// Something worth saying about a variable.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remark {
    /// A Mooncake variable stands in for ours.
    AliasUsed {
        /// Mooncake's variable.
        alias: &'static str,
        /// Ours.
        name: &'static str,
    },
    /// A value that cannot be used; the default stands.
    Ignored {
        /// The variable.
        name: String,
        /// Its value.
        value: String,
        /// What would be accepted.
        expected: String,
    },
    /// A variable in our or Mooncake's namespace that means nothing here.
    Unknown {
        /// The variable.
        name: String,
    },
}

impl Remark {
    /// Logs it: an alias at `info`, the rest at `warn`.
    pub fn log(&self) {
        match self {
            Remark::AliasUsed { alias, name } => tracing::info!(alias, name, "mooncake variable is honoured"),
            Remark::Ignored { name, value, expected } => {
                tracing::warn!(name, value, expected, "setting cannot be used, the default stands");
            }
            Remark::Unknown { name } => tracing::warn!(name, "variable is not known and has no effect"),
        }
    }
}

impl Config {
    /// Settings from variables, and what was odd about them. Variables of other programs are passed over.
    pub fn from_vars(vars: impl IntoIterator<Item = (String, String)>) -> (Self, Vec<Remark>) {
        let ours = |name: &str| name.starts_with("TIDEWIRE_") || name.starts_with("MC_");
        let vars: BTreeMap<String, String> = vars.into_iter().filter(|(name, _)| ours(name)).collect();
        let mut config = Config::default();
        let mut remarks = Vec::new();
        for param in PARAMS {
            read_param(param, &vars, &mut config, &mut remarks);
        }
        if config.port_min > config.port_max {
            let value = format!("{}..{}", config.port_min, config.port_max);
            let (name, expected) = ("TIDEWIRE_PORT_MIN".to_owned(), "not above TIDEWIRE_PORT_MAX".to_owned());
            remarks.push(Remark::Ignored { name, value, expected });
            let default = Config::default();
            (config.port_min, config.port_max) = (default.port_min, default.port_max);
        }
        remarks.extend(vars.keys().filter(|name| !is_known(name)).map(|name| Remark::Unknown { name: name.clone() }));
        (config, remarks)
    }
}

fn is_known(name: &str) -> bool {
    FOREIGN_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        || PARAMS.iter().any(|param| param.name == name || param.aliases.iter().any(|alias| alias.name == name))
}

fn read_param(param: &'static Param, vars: &BTreeMap<String, String>, config: &mut Config, remarks: &mut Vec<Remark>) {
    let ignored = |name: &str, value: &str| Remark::Ignored {
        name: name.to_owned(),
        value: if param.secret { "(secret)".to_owned() } else { value.to_owned() },
        expected: param.expected(),
    };
    if let Some(value) = vars.get(param.name) {
        if !param.set(config, value) {
            remarks.push(ignored(param.name, value));
        }
        return;
    }
    for alias in param.aliases {
        let Some(value) = vars.get(alias.name) else { continue };
        if alias.convert(value).is_some_and(|value| param.set(config, &value)) {
            remarks.push(Remark::AliasUsed { alias: alias.name, name: param.name });
            return;
        }
        remarks.push(ignored(alias.name, value));
    }
}

impl Alias {
    fn convert(&self, value: &str) -> Option<String> {
        match self.form {
            Form::Same => Some(value.to_owned()),
            Form::Times(factor) => value.trim().parse::<u64>().ok()?.checked_mul(factor).map(|n| n.to_string()),
            Form::Presence(meaning) => Some(meaning.to_owned()),
        }
    }
}

impl Param {
    /// Sets the default.
    pub fn set_default(&self, config: &mut Config) {
        match self.kind {
            Kind::Number { default, set, .. } => set(config, default),
            Kind::Flag { default, set, .. } => set(config, default),
            Kind::Text { default, set, .. } => set(config, default),
            Kind::Transports { set, .. } => set(config, Vec::new()),
        }
    }

    /// Sets the field from text; whether the text can be used. The field is unchanged if not.
    pub fn set(&self, config: &mut Config, value: &str) -> bool {
        let trimmed = value.trim();
        match self.kind {
            Kind::Number { min, max, set, .. } => match trimmed.parse::<u64>() {
                Ok(number) if (min..=max).contains(&number) => set(config, number),
                _ => return false,
            },
            Kind::Flag { set, .. } => match trimmed.to_ascii_lowercase().as_str() {
                "1" | "true" | "yes" | "on" => set(config, true),
                "0" | "false" | "no" | "off" => set(config, false),
                _ => return false,
            },
            Kind::Text { set, .. } => set(config, value),
            Kind::Transports { set, .. } => match parse_transports(trimmed) {
                Some(kinds) => set(config, kinds),
                None => return false,
            },
        }
        true
    }

    /// The value in `config` as text, as it would be set.
    pub fn value(&self, config: &Config) -> String {
        match self.kind {
            Kind::Number { get, .. } => get(config).to_string(),
            Kind::Flag { get, .. } => if get(config) { "1" } else { "0" }.to_owned(),
            Kind::Text { get, .. } => get(config).to_owned(),
            Kind::Transports { get, .. } => get(config).iter().map(|kind| kind.name()).collect::<Vec<_>>().join(","),
        }
    }

    /// What is accepted, in words.
    pub fn expected(&self) -> String {
        match self.kind {
            Kind::Number { min, max, .. } => format!("a number from {min} to {max}"),
            Kind::Flag { .. } => "0 or 1".to_owned(),
            Kind::Text { .. } => "text".to_owned(),
            Kind::Transports { .. } => "names out of local, shm, cma, tcp, mooncake-tcp".to_owned(),
        }
    }
}

fn parse_transports(text: &str) -> Option<Vec<TransportKind>> {
    text.split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .map(|name| TransportKind::from_name(name).filter(|kind| *kind != TransportKind::Fake))
        .collect()
}
