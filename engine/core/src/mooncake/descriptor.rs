//! Segment descriptor: the JSON that Mooncake publishes under `mooncake/ram/<name>`, plus our own `tidewire` key.
//!
//! [`SegmentDescriptor::decode`] takes what any Mooncake release writes: unknown fields are skipped, a trailing newline
//! is fine, a missing `tcp_proto_version` means 1, and protocols we do not speak still decode.
//!
//! Invariants of a decoded descriptor:
//! * every buffer of a `tcp` or `rdma` segment has a name, an address and a length, and ends inside the address space;
//! * an `rdma` buffer has as many `lkey`s and `rkey`s as the segment has devices, in device order.
//!
//! # Source
//! Mooncake 0.3.13.post1 as measured; unknown fields are ignored by its decoder, which is what makes the extra key safe.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{DecodeError, FieldPath, from_json, to_json};

/// Preferred and other devices of one location.
pub type DevicePriority = (Vec<String>, Vec<String>);

/// Data protocol version that is published; anything above 2 would mean the same to an official peer today.
pub const TCP_PROTO_VERSION: u32 = 2;

/// Descriptor of a segment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SegmentDescriptor {
    /// Segment name.
    pub name: String,
    /// `tcp` or `rdma`; releases built for several publish a list, which reads as `rdma,hip`.
    #[serde(serialize_with = "write_protocol", deserialize_with = "read_protocol")]
    pub protocol: String,
    /// Registered buffers.
    #[serde(default)]
    pub buffers: Vec<BufferDescriptor>,
    /// RDMA devices, in the order of the keys of each buffer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceDescriptor>,
    /// Which device serves which location best.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub priority_matrix: BTreeMap<String, DevicePriority>,
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

/// One registered buffer, or one file of an `nvmeof` segment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BufferDescriptor {
    /// Server name (tcp) or location (rdma).
    #[serde(default)]
    pub name: String,
    /// Absolute virtual address.
    #[serde(default)]
    pub addr: u64,
    /// Length in bytes.
    #[serde(default)]
    pub length: u64,
    /// Local RDMA keys, one per device.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lkey: Vec<u32>,
    /// Remote RDMA keys, one per device.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rkey: Vec<u32>,
    /// File of an `nvmeof` segment.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub file_path: String,
    /// Where each host mounts that file.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub local_path_map: BTreeMap<String, String>,
}

impl BufferDescriptor {
    /// A buffer of memory.
    pub fn memory(name: impl Into<String>, addr: u64, length: u64) -> Self {
        BufferDescriptor { name: name.into(), addr, length, ..Self::default() }
    }
}

/// One RDMA device of a segment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceDescriptor {
    /// Device name, like `mlx5_0`.
    pub name: String,
    /// Local identifier; 0 on Ethernet.
    #[serde(default)]
    pub lid: u16,
    /// 16 bytes in hex, colon-separated.
    #[serde(default)]
    pub gid: String,
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

impl SegmentDescriptor {
    /// A TCP segment without buffers. `data_port` 0 means that no Mooncake data port is open.
    pub fn tcp(name: impl Into<String>, data_host: impl Into<String>, data_port: u16) -> Self {
        SegmentDescriptor {
            name: name.into(),
            protocol: "tcp".to_owned(),
            tcp_data_host: data_host.into(),
            tcp_data_port: data_port,
            tcp_proto_version: TCP_PROTO_VERSION,
            ..Self::default()
        }
    }

    /// Decodes and checks what a peer published.
    ///
    /// # Errors
    /// [`DecodeError`], naming the field. One bad buffer spoils the descriptor, as it does for an official peer.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let descriptor: SegmentDescriptor = from_json("segment descriptor", bytes)?;
        descriptor.check()?;
        Ok(descriptor)
    }

    /// The compact JSON to publish, without newline.
    pub fn encode(&self) -> Vec<u8> {
        to_json(self)
    }

    /// Whether the segment lists `protocol`.
    pub fn speaks(&self, protocol: &str) -> bool {
        self.protocol.split(',').any(|p| p == protocol)
    }

    fn check(&self) -> Result<(), DecodeError> {
        if self.name.is_empty() {
            return Err(self.error(FieldPath::top("name"), "must not be empty"));
        }
        if self.protocol.is_empty() {
            return Err(self.error(FieldPath::top("protocol"), "must not be empty"));
        }
        if self.protocol == "rdma" {
            self.check_devices()?;
        }
        if self.speaks("tcp") || self.speaks("rdma") {
            for (index, buffer) in self.buffers.iter().enumerate() {
                self.check_buffer(index, buffer)?;
            }
        }
        Ok(())
    }

    fn check_devices(&self) -> Result<(), DecodeError> {
        for (index, device) in self.devices.iter().enumerate() {
            let at = |field| FieldPath { list: "devices", index, field };
            if device.name.is_empty() {
                return Err(self.error(at("name"), "must not be empty"));
            }
            if device.gid.is_empty() {
                return Err(self.error(at("gid"), "must not be empty"));
            }
        }
        Ok(())
    }

    fn check_buffer(&self, index: usize, buffer: &BufferDescriptor) -> Result<(), DecodeError> {
        let at = |field| FieldPath { list: "buffers", index, field };
        if buffer.name.is_empty() {
            return Err(self.error(at("name"), "must not be empty"));
        }
        if buffer.addr == 0 {
            return Err(self.error(at("addr"), "must not be 0"));
        }
        if buffer.length == 0 {
            return Err(self.error(at("length"), "must not be 0"));
        }
        if buffer.addr.checked_add(buffer.length).is_none() {
            return Err(self.error(at("length"), "leaves the address space"));
        }
        if self.protocol == "rdma" {
            if buffer.lkey.len() != self.devices.len() {
                return Err(self.error(at("lkey"), "must have one key per device"));
            }
            if buffer.rkey.len() != self.devices.len() {
                return Err(self.error(at("rkey"), "must have one key per device"));
            }
        }
        Ok(())
    }

    fn error(&self, field: FieldPath, rule: &'static str) -> DecodeError {
        DecodeError::Field { segment: self.name.clone(), field, rule }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

fn read_protocol<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(protocol) => protocol,
        OneOrMany::Many(protocols) => protocols.join(","),
    })
}

fn write_protocol<S: Serializer>(protocol: &str, serializer: S) -> Result<S::Ok, S::Error> {
    if protocol.contains(',') {
        serializer.collect_seq(protocol.split(','))
    } else {
        serializer.serialize_str(protocol)
    }
}

#[cfg(test)]
mod tests;
