//! Metadata connection strings.
//!
//! Mooncake's forms are understood as they are: `etcd://h:p[,h2:p2;h3:p3]`, a bare `h:p` (etcd), `http://h:p/metadata`
//! and the literal `P2PHANDSHAKE`. Ours are `p2p://` and `memory://NAME`. etcd takes its account and its certificates
//! in the string: `etcd://user:password@h:p?ca=FILE&cert=FILE&key=FILE&ttl=SECONDS`.
//!
//! Invariants:
//! * parsing does no IO;
//! * a password shows up in no message and no `Debug` text.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use super::{StoreError, percent};

/// Default port of etcd clients.
const ETCD_PORT: u16 = 2379;
/// Path of Mooncake's HTTP metadata server.
const HTTP_PATH: &str = "/metadata";

/// Where segments are published and found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreUri {
    /// No server: a segment's name is its control address.
    P2p,
    /// A named store inside this process.
    Memory {
        /// Which one.
        name: String,
    },
    /// Mooncake's HTTP metadata server, or ours.
    Http(HttpUri),
    /// An etcd cluster.
    Etcd(EtcdUri),
}

/// Address of an HTTP metadata server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpUri {
    /// Host name or address, without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Path, `/metadata` unless given.
    pub path: String,
}

/// Endpoints and credentials of an etcd cluster.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdUri {
    /// `host:port`, IPv6 hosts in brackets.
    pub endpoints: Vec<String>,
    /// Account, if any.
    pub user: Option<String>,
    /// Its password.
    pub password: Option<String>,
    /// PEM file of the certificate authority; turns TLS on.
    pub tls_ca: Option<PathBuf>,
    /// PEM file of the client certificate.
    pub tls_cert: Option<PathBuf>,
    /// PEM file of its key.
    pub tls_key: Option<PathBuf>,
    /// Time to live of the session lease.
    pub lease_ttl: Option<Duration>,
}

/// Parses a connection string.
///
/// # Errors
/// [`StoreError::Uri`], which names the scheme when that is what is wrong.
pub fn parse(text: &str) -> Result<StoreUri, StoreError> {
    let text = text.trim();
    if text.eq_ignore_ascii_case("P2PHANDSHAKE") {
        return Ok(StoreUri::P2p);
    }
    let bad = |reason: &str| StoreError::Uri { uri: redact(text), reason: reason.to_owned() };
    let Some((scheme, rest)) = text.split_once("://") else {
        return parse_etcd(text).map(StoreUri::Etcd).map_err(|reason| bad(&reason));
    };
    match scheme.to_ascii_lowercase().as_str() {
        "p2p" if rest.is_empty() => Ok(StoreUri::P2p),
        "p2p" => Err(bad("p2p:// takes no address, because a segment's name is its address")),
        "memory" if rest.is_empty() => Err(bad("memory:// needs a name")),
        "memory" => Ok(StoreUri::Memory { name: rest.to_owned() }),
        "http" => parse_http(rest).map(StoreUri::Http).map_err(|reason| bad(&reason)),
        "https" => Err(bad("scheme https is not built in; use http, or etcd with TLS")),
        "etcd" => parse_etcd(rest).map(StoreUri::Etcd).map_err(|reason| bad(&reason)),
        "redis" => Err(bad("scheme redis is not supported; use etcd, http or p2p")),
        other => Err(bad(&format!("unknown scheme {other}; known are etcd, http, p2p and memory"))),
    }
}

impl FromStr for StoreUri {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        parse(text)
    }
}

impl fmt::Display for StoreUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreUri::P2p => f.write_str("P2PHANDSHAKE"),
            StoreUri::Memory { name } => write!(f, "memory://{name}"),
            StoreUri::Http(http) => write!(f, "http://{}{}", http.authority(), http.path),
            StoreUri::Etcd(etcd) => write!(f, "etcd://{}", etcd.endpoints.join(",")),
        }
    }
}

impl HttpUri {
    /// `host:port` as the `Host` header wants it.
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Debug for EtcdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdUri")
            .field("endpoints", &self.endpoints)
            .field("user", &self.user)
            .field("password", &self.password.as_ref().map(|_| "***"))
            .field("tls_ca", &self.tls_ca)
            .field("tls_cert", &self.tls_cert)
            .field("tls_key", &self.tls_key)
            .field("lease_ttl", &self.lease_ttl)
            .finish()
    }
}

fn parse_http(rest: &str) -> Result<HttpUri, String> {
    let (authority, path) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, HTTP_PATH),
    };
    if path.contains(['?', '#', ' ']) {
        return Err("the path takes no query, because the store appends its own".to_owned());
    }
    if authority.contains('@') {
        return Err("http takes no account".to_owned());
    }
    let (host, port) = split_host_port(authority, 80)?;
    let path = if path == "/" { HTTP_PATH } else { path };
    Ok(HttpUri { host, port, path: path.to_owned() })
}

fn parse_etcd(rest: &str) -> Result<EtcdUri, String> {
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (account, hosts) = match rest.rsplit_once('@') {
        Some((account, hosts)) => (Some(account), hosts),
        None => (None, rest),
    };
    let mut uri = EtcdUri {
        endpoints: Vec::new(),
        user: None,
        password: None,
        tls_ca: None,
        tls_cert: None,
        tls_key: None,
        lease_ttl: None,
    };
    if let Some(account) = account {
        let (user, password) = account.split_once(':').ok_or("an account is user:password")?;
        let decode = |text| percent::decode(text).ok_or("a broken percent escape in the account");
        uri.user = Some(decode(user)?);
        uri.password = Some(decode(password)?);
    }
    for host in hosts.trim_end_matches('/').split([',', ';']).map(str::trim).filter(|host| !host.is_empty()) {
        let (host, port) = split_host_port(host, ETCD_PORT)?;
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        uri.endpoints.push(format!("{host}:{port}"));
    }
    if uri.endpoints.is_empty() {
        return Err("no endpoint".to_owned());
    }
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or_else(|| format!("option {pair} has no value"))?;
        let value = percent::decode(value).ok_or_else(|| format!("a broken percent escape in option {name}"))?;
        match name {
            "ca" => uri.tls_ca = Some(value.into()),
            "cert" => uri.tls_cert = Some(value.into()),
            "key" => uri.tls_key = Some(value.into()),
            "ttl" => {
                let seconds = value.parse().ok().filter(|seconds| (1..=86_400).contains(seconds));
                uri.lease_ttl = Some(Duration::from_secs(seconds.ok_or("ttl is 1 to 86400 seconds")?));
            }
            other => return Err(format!("unknown option {other}; known are ca, cert, key and ttl")),
        }
    }
    Ok(uri)
}

/// Splits `host`, `host:port`, `[v6]`, `[v6]:port`; a bare IPv6 address has the default port.
fn split_host_port(text: &str, default_port: u16) -> Result<(String, u16), String> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, tail) = rest.split_once(']').ok_or_else(|| format!("{text} has no closing bracket"))?;
        (host, tail.strip_prefix(':'))
    } else if text.matches(':').count() > 1 {
        (text, None)
    } else {
        match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    let port = match port {
        None => default_port,
        Some(port) => port.parse().ok().filter(|p| *p != 0).ok_or_else(|| format!("{text} has no usable port"))?,
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
    if host.is_empty() || !host.chars().all(plain) {
        return Err(format!("{text:?} has no usable host"));
    }
    Ok((host.to_owned(), port))
}

/// The string without the password of its account.
fn redact(text: &str) -> String {
    let start = text.find("://").map_or(0, |at| at + 3);
    let (head, rest) = text.split_at(start);
    match rest.rsplit_once('@') {
        Some((account, hosts)) => {
            let user = account.split(':').next().unwrap_or_default();
            format!("{head}{user}:***@{hosts}")
        }
        None => text.to_owned(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod tests {
    use super::*;

    fn endpoints(text: &str) -> Vec<String> {
        match parse(text).unwrap() {
            StoreUri::Etcd(etcd) => etcd.endpoints,
            other => panic!("{text} is {other:?}"),
        }
    }

    fn reason(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn mooncake_forms_are_understood() {
        assert_eq!(parse("P2PHANDSHAKE").unwrap(), StoreUri::P2p);
        assert_eq!(parse("p2p://").unwrap(), StoreUri::P2p);
        assert_eq!(parse("memory://m").unwrap(), StoreUri::Memory { name: "m".into() });
        assert_eq!(endpoints("etcd://a:1,b:2;c:3"), ["a:1", "b:2", "c:3"]);
        assert_eq!(endpoints("192.0.2.1:2379"), ["192.0.2.1:2379"]);
        assert_eq!(endpoints("etcd://a"), ["a:2379"]);
        assert_eq!(endpoints("etcd://[::1]:99,fe80::1"), ["[::1]:99", "[fe80::1]:2379"]);
        let http =
            |host: &str, port, path: &str| StoreUri::Http(HttpUri { host: host.into(), port, path: path.into() });
        assert_eq!(parse("http://h:8080/metadata").unwrap(), http("h", 8080, "/metadata"));
        assert_eq!(parse("http://h").unwrap(), http("h", 80, "/metadata"));
        assert_eq!(parse("HTTP://[::1]:1/x/y").unwrap(), http("::1", 1, "/x/y"));
    }

    #[test]
    fn account_tls_and_ttl_are_read() {
        let StoreUri::Etcd(etcd) = parse("etcd://me:p%40ss@h:1?ca=/c.pem&cert=/e.pem&key=/k.pem&ttl=7").unwrap() else {
            panic!("not etcd")
        };
        assert_eq!((etcd.user.as_deref(), etcd.password.as_deref()), (Some("me"), Some("p@ss")));
        assert_eq!(etcd.tls_ca, Some("/c.pem".into()));
        assert_eq!(etcd.tls_cert, Some("/e.pem".into()));
        assert_eq!(etcd.tls_key, Some("/k.pem".into()));
        assert_eq!(etcd.lease_ttl, Some(Duration::from_secs(7)));
        assert!(!format!("{etcd:?}").contains("p@ss"));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        assert!(reason("redis://h:1").contains("scheme redis"));
        assert!(reason("zookeeper://h:1").contains("unknown scheme zookeeper"));
        assert!(reason("https://h/metadata").contains("https is not built in"));
        assert!(reason("").contains("no endpoint"));
        assert!(reason("etcd://,;").contains("no endpoint"));
        assert!(reason("h:0").contains("port"));
        assert!(reason("h:99999").contains("port"));
        assert!(reason("etcd://[::1").contains("bracket"));
        assert!(reason("etcd://h?tls=1").contains("unknown option tls"));
        assert!(reason("etcd://h?ttl=0").contains("ttl"));
        assert!(reason("http://h/m?x=1").contains("query"));
        assert!(reason("p2p://h:1").contains("no address"));
        assert!(reason("memory://").contains("name"));
        let leaked = reason("etcd://me:secret@h:0");
        assert!(!leaked.contains("secret") && leaked.contains("me:***@"), "{leaked}");
    }
}
