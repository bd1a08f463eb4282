//! Server names: `host`, `host:port`, `1.2.3.4:port`, `[v6]:port` and bare v6.
//!
//! Parsing is total: a missing or bad port is the default port, as it is for Mooncake.

use std::{fmt, ops::RangeInclusive};

/// Port of a server whose name gives none.
pub const DEFAULT_PORT: u16 = 12001;

/// Ports that control and data listeners are drawn from.
pub const DEFAULT_PORT_RANGE: RangeInclusive<u16> = 15000..=17000;

/// Ports the kernel draws outgoing connections from; a listener there may collide with one.
const EPHEMERAL: RangeInclusive<u16> = 32768..=60999;

/// A host and a port. The host is kept as given, without brackets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl HostPort {
    /// Pairs a host, with or without brackets, and a port.
    pub fn new(host: &str, port: u16) -> Self {
        HostPort { host: unbracket(host).to_owned(), port }
    }

    /// Parses a server name; [`DEFAULT_PORT`] where it gives no usable port.
    pub fn parse(name: &str) -> Self {
        Self::parse_or(name, DEFAULT_PORT)
    }

    /// Parses a server name; `default_port` where it gives no usable port.
    pub fn parse_or(name: &str, default_port: u16) -> Self {
        let (host, port) = split(name);
        let port = port.and_then(parse_port).unwrap_or(default_port);
        HostPort { host: host.to_owned(), port }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Splits a server name into its host, without brackets, and the text after the port's colon.
pub fn split(name: &str) -> (&str, Option<&str>) {
    if let Some(rest) = name.strip_prefix('[') {
        return match rest.split_once(']') {
            Some((host, tail)) => (host, tail.strip_prefix(':')),
            None => (rest, None),
        };
    }
    match name.split_once(':') {
        // More than one colon without brackets: a bare IPv6 address.
        Some((_, tail)) if tail.contains(':') => (name, None),
        Some((host, port)) => (host, Some(port)),
        None => (name, None),
    }
}

/// The host without brackets.
pub fn unbracket(host: &str) -> &str {
    host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host)
}

/// Range to draw listener ports from, given the two ends asked for; the default, with `false`, if they cannot be used.
///
/// Refused are an inverted range and ends below 1024 or among the ports of outgoing connections.
pub fn port_range(min: u16, max: u16) -> (RangeInclusive<u16>, bool) {
    let usable = |port: u16| port >= 1024 && !EPHEMERAL.contains(&port);
    match min <= max && usable(min) && usable(max) {
        true => (min..=max, true),
        false => (DEFAULT_PORT_RANGE, false),
    }
}

fn parse_port(text: &str) -> Option<u16> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_form_parses() {
        for (name, host, port) in [
            ("node1", "node1", 12001),
            ("node1:15501", "node1", 15501),
            ("1.2.3.4:80", "1.2.3.4", 80),
            ("[fe80::1]:99", "fe80::1", 99),
            ("[fe80::1]", "fe80::1", 12001),
            ("fe80::1", "fe80::1", 12001),
            ("::1", "::1", 12001),
            ("host:", "host", 12001),
            ("host:abc", "host", 12001),
            ("host:70000", "host", 12001),
            ("host:+80", "host", 12001),
            ("host:0", "host", 12001),
            ("", "", 12001),
            ("[::1", "::1", 12001),
        ] {
            assert_eq!(HostPort::parse(name), HostPort { host: host.to_owned(), port }, "{name}");
        }
    }

    #[test]
    fn unusable_port_ranges_fall_back() {
        assert_eq!(port_range(20000, 20010), (20000..=20010, true));
        for (min, max) in [(20010, 20000), (80, 20000), (20000, 40000), (33000, 62000)] {
            assert_eq!(port_range(min, max), (DEFAULT_PORT_RANGE, false), "{min}..{max}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses(name in "\\PC{0,40}") {
            let _ = HostPort::parse(&name);
        }

        #[test]
        fn display_parses_back(host in "([a-z0-9.-]{1,20}|::1|fe80::[0-9a-f]{1,4})", port in 1u16..) {
            let address = HostPort::new(&host, port);
            prop_assert_eq!(HostPort::parse(&address.to_string()), address);
        }
    }
}
