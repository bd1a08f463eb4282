//! Where registered memory lives: `cpu:0`, `cuda:1`, or `*` for "find out".
//!
//! # Source
//! Mooncake's location strings (`registerLocalMemory`).

use std::{fmt, str::FromStr};

/// Place of a registered buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Location {
    /// `*`: not said.
    #[default]
    Any,
    /// `cpu:N`: host memory on NUMA node N.
    Cpu(u32),
    /// `cuda:N`: memory of GPU N.
    Cuda(u32),
    /// Any other text, kept as written (vendor names, `segments:…`).
    Other(String),
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Any => f.write_str("*"),
            Location::Cpu(n) => write!(f, "cpu:{n}"),
            Location::Cuda(n) => write!(f, "cuda:{n}"),
            Location::Other(text) => f.write_str(text),
        }
    }
}

impl FromStr for Location {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbered = |prefix: &str| text.strip_prefix(prefix).and_then(|n| n.parse().ok());
        Ok(match text {
            "" | "*" => Location::Any,
            _ => match (numbered("cpu:"), numbered("cuda:")) {
                (Some(n), _) => Location::Cpu(n),
                (_, Some(n)) => Location::Cuda(n),
                _ => Location::Other(text.to_owned()),
            },
        })
    }
}
