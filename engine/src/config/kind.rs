//! What a row of the settings table says.

use tidewire_core::TransportKind;

use super::Config;

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Param {
    /// Environment variable.
    pub name: &'static str,
    /// Mooncake variables that are honoured when `name` is not set, in order.
    pub aliases: &'static [Alias],
    /// Type, default and range.
    pub kind: Kind,
    /// Unit of a number; empty: none.
    pub unit: &'static str,
    /// What it does, one sentence.
    pub help: &'static str,
    /// Whether the value must not be shown.
    pub secret: bool,
}

/// A Mooncake variable with the meaning of one of ours.
#[derive(Clone, Copy, Debug)]
pub struct Alias {
    /// Its name.
    pub name: &'static str,
    /// How its value is turned into ours.
    pub form: Form,
}

/// How the value of an alias is turned into ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The same.
    Same,
    /// A number, multiplied.
    Times(u64),
    /// Being set, with whatever value, means this value.
    Presence(&'static str),
}

/// Type of a setting, with its default and the field it fills.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A whole number in a range.
    Number {
        /// Value when nothing is set.
        default: u64,
        /// Lowest value that is accepted.
        min: u64,
        /// Highest value that is accepted.
        max: u64,
        /// Fills the field.
        set: fn(&mut Config, u64),
        /// Reads the field.
        get: fn(&Config) -> u64,
    },
    /// `0,false,no,off` or `1,true,yes,on`.
    Flag {
        /// Value when nothing is set.
        default: bool,
        /// Fills the field.
        set: fn(&mut Config, bool),
        /// Reads the field.
        get: fn(&Config) -> bool,
    },
    /// Text.
    Text {
        /// Value when nothing is set.
        default: &'static str,
        /// Fills the field.
        set: fn(&mut Config, &str),
        /// Reads the field.
        get: fn(&Config) -> &str,
    },
    /// Transport names, separated by commas; empty when nothing is set.
    Transports {
        /// Fills the field.
        set: fn(&mut Config, Vec<TransportKind>),
        /// Reads the field.
        get: fn(&Config) -> &[TransportKind],
    },
}
