//! Segment descriptor: the JSON that Mooncake publishes under `mooncake/ram/<name>`, plus our own `tidewire` key.
//!
//! # Source
//! Mooncake 0.3.13.post1 as measured; unknown fields are ignored by its decoder, which is what makes the extra key safe.

use serde::{Deserialize, Serialize};

/// Descriptor of a segment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SegmentDescriptor {
    /// Segment name.
    pub name: String,
    /// `tcp` or `rdma`.
    pub protocol: String,
    /// Registered buffers.
    #[serde(default)]
    pub buffers: Vec<BufferDescriptor>,
    /// Host of the Mooncake data port; empty: the control host.
    #[serde(default)]
    pub tcp_data_host: String,
    /// Mooncake data port; 0: none.
    #[serde(default)]
    pub tcp_data_port: u16,
    /// 1 or 2; a missing field means 1.
    #[serde(default = "first_version")]
    pub tcp_proto_version: u32,
    /// RDMA-side name.
    #[serde(default)]
    pub rdma_server_name: String,
    /// Local time as text; informational.
    #[serde(default)]
    pub timestamp: String,
    /// What Tidewire adds; Mooncake ignores it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tidewire: Option<NativeExtension>,
}

fn first_version() -> u32 {
    1
}

/// One registered buffer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BufferDescriptor {
    /// Server name (tcp) or location (rdma).
    pub name: String,
    /// Absolute virtual address.
    pub addr: u64,
    /// Length in bytes.
    pub length: u64,
}

/// The `tidewire` key of a descriptor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NativeExtension {
    /// Newest native protocol version this peer speaks.
    pub version: u16,
    /// Generation of the segment, 16 hex digits.
    pub generation: String,
    /// Access token, 32 hex digits.
    pub token: String,
    /// Host of the native data port; empty: the control host.
    #[serde(default)]
    pub data_host: String,
    /// Native data port; 0: none.
    #[serde(default)]
    pub data_port: u16,
    /// Transports on offer, best first: `shm`, `cma`, `tcp`.
    #[serde(default)]
    pub transports: Vec<String>,
    /// Identity of the host (boot id and namespaces); equal means same host.
    #[serde(default)]
    pub host_id: String,
    /// Process id on that host.
    #[serde(default)]
    pub pid: u32,
    /// Name of the abstract Unix socket for same-host peers, without the leading NUL; empty: none.
    #[serde(default)]
    pub local_socket: String,
    /// Location of each buffer, in the order of `buffers`.
    #[serde(default)]
    pub locations: Vec<String>,
}
