//! Metadata keys: `mooncake/[<cluster>/]ram/<segment>` and `mooncake/[<cluster>/]rpc_meta/<server>`.
//!
//! A segment whose name contains `/` (files use that) is stored without the `ram/` part.

/// Prefix that every key starts with.
const ROOT: &str = "mooncake/";

/// Keys of one cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySpace {
    prefix: String,
}

impl Default for KeySpace {
    fn default() -> Self {
        KeySpace::new("")
    }
}

impl KeySpace {
    /// Keys of the cluster `cluster_id`; empty: of no cluster. Slashes around the id do not matter.
    pub fn new(cluster_id: &str) -> Self {
        let prefix = match cluster_id.trim_matches('/') {
            "" => ROOT.to_owned(),
            id => format!("{ROOT}{id}/"),
        };
        KeySpace { prefix }
    }

    /// What every key starts with, with a trailing slash.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Prefix of the descriptors whose names have no `/`.
    pub fn ram_prefix(&self) -> String {
        format!("{}ram/", self.prefix)
    }

    /// Prefix of the control addresses.
    pub fn rpc_meta_prefix(&self) -> String {
        format!("{}rpc_meta/", self.prefix)
    }

    /// Key of a segment's descriptor.
    pub fn ram(&self, segment: &str) -> String {
        let part = if segment.contains('/') { "" } else { "ram/" };
        format!("{}{part}{segment}", self.prefix)
    }

    /// Key of a server's control address.
    pub fn rpc_meta(&self, server: &str) -> String {
        format!("{}rpc_meta/{server}", self.prefix)
    }

    /// The segment name of a descriptor key; `None` for other keys.
    pub fn segment_of<'a>(&self, key: &'a str) -> Option<&'a str> {
        let rest = key.strip_prefix(&self.prefix)?;
        let name = match rest.strip_prefix("ram/") {
            Some(name) if name.contains('/') => return None,
            Some(name) => name,
            None if rest.starts_with("rpc_meta/") || !rest.contains('/') => return None,
            None => rest,
        };
        (!name.is_empty()).then_some(name)
    }

    /// The server name of a control-address key; `None` for other keys.
    pub fn server_of<'a>(&self, key: &'a str) -> Option<&'a str> {
        key.strip_prefix(&self.prefix)?.strip_prefix("rpc_meta/").filter(|name| !name.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_are_mooncakes() {
        let keys = KeySpace::default();
        assert_eq!(keys.ram("127.0.0.1:15501"), "mooncake/ram/127.0.0.1:15501");
        assert_eq!(keys.ram("nvmeof/s0"), "mooncake/nvmeof/s0");
        assert_eq!(keys.rpc_meta("nvmeof/s0"), "mooncake/rpc_meta/nvmeof/s0");
        for id in ["c1", "c1/", "/c1/"] {
            assert_eq!(KeySpace::new(id).ram("a"), "mooncake/c1/ram/a");
        }
    }

    #[test]
    fn foreign_keys_have_no_segment() {
        let keys = KeySpace::default();
        for key in ["", "mooncake/", "mooncake/ram/", "mooncake/rpc_meta/a", "other/ram/a", "mooncake/x"] {
            assert_eq!(keys.segment_of(key), None, "{key}");
        }
        assert_eq!(keys.server_of("mooncake/ram/a"), None);
    }

    proptest! {
        #[test]
        fn names_come_back(cluster in "[a-z0-9]{0,5}", name in "[a-z0-9:.]{1,12}(/[a-z0-9]{1,5})?") {
            let keys = KeySpace::new(&cluster);
            let (ram, rpc_meta) = (keys.ram(&name), keys.rpc_meta(&name));
            prop_assert_eq!(keys.server_of(&rpc_meta), Some(name.as_str()));
            if !name.starts_with("ram/") && !name.starts_with("rpc_meta/") {
                prop_assert_eq!(keys.segment_of(&ram), Some(name.as_str()));
            }
        }
    }
}
