//! The `rpc_meta/<server>` value: where a server's control port is.

use serde::{Deserialize, Serialize};

use super::{DecodeError, from_json, host::HostPort, to_json};

/// Control address of a server, as stores keep it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RpcMeta {
    /// Host, IPv6 without brackets.
    pub ip_or_host_name: String,
    /// Control port.
    pub rpc_port: u16,
}

impl RpcMeta {
    /// Decodes a stored value; a trailing newline is fine.
    ///
    /// # Errors
    /// [`DecodeError::Json`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        from_json("rpc_meta", bytes)
    }

    /// The compact JSON to store.
    pub fn encode(&self) -> Vec<u8> {
        to_json(self)
    }

    /// The address to connect to. Hosts that were stored with brackets lose them.
    pub fn address(&self) -> HostPort {
        HostPort::new(&self.ip_or_host_name, self.rpc_port)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn official_value_round_trips() {
        let text = r#"{"ip_or_host_name":"192.0.2.2","rpc_port":15501}"#;
        let meta = RpcMeta::decode(format!("{text}\n").as_bytes()).unwrap();
        assert_eq!(meta.encode(), text.as_bytes());
        assert_eq!(meta.address().to_string(), "192.0.2.2:15501");
    }

    #[test]
    fn ipv6_is_bracketed_once() {
        for host in ["fe80::1", "[fe80::1]"] {
            let meta = RpcMeta { ip_or_host_name: host.to_owned(), rpc_port: 1 };
            assert_eq!(meta.address().to_string(), "[fe80::1]:1");
        }
    }

    #[test]
    fn ports_out_of_range_are_refused() {
        assert!(RpcMeta::decode(br#"{"ip_or_host_name":"a","rpc_port":70000}"#).is_err());
    }
}
