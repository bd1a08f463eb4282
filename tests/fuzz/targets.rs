//! What is fuzzed: each function takes any bytes and must neither panic nor break the property it asserts.
//!
//! The properties: what a decoder accepts, it encodes again to the same value; a length it accepts is within its limit.

use tidewire_core::{
    ByteRange, Opcode,
    local::{self, DenyReason, Message},
    mooncake::{
        control::{self, ControlFrame, ControlKind},
        data::{DataHeader, DataStatus, HEADER_BYTES, STATUS_BYTES},
        descriptor::{BufferDescriptor, SegmentDescriptor},
        host::{self, HostPort},
        keys::KeySpace,
        rpc_meta::RpcMeta,
    },
    native::{
        frame::{self, FrameHeader, FrameKind, FrameStatus},
        hello::{Hello, Welcome},
    },
};

const FRAME_LIMIT_BYTES: u64 = control::DEFAULT_MAX_FRAME_BYTES;

/// Control frames: length, type byte, JSON document.
pub fn mooncake_control(data: &[u8]) {
    let Some((length, body)) = data.split_first_chunk::<{ control::LENGTH_BYTES }>() else { return };
    if let Ok(accepted) = control::decode_length(*length, FRAME_LIMIT_BYTES) {
        assert!((1..=FRAME_LIMIT_BYTES).contains(&accepted));
    }
    let Ok(frame) = ControlFrame::decode(body) else { return };
    let again =
        if frame.old { control::encode_old_frame(frame.json) } else { control::encode_frame(frame.kind, frame.json) };
    assert_eq!(ControlFrame::decode(&again[control::LENGTH_BYTES..]), Ok(frame));
}

/// Header and status of Mooncake's data port.
pub fn mooncake_data(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<HEADER_BYTES>()
        && let Ok(header) = DataHeader::decode(bytes)
    {
        assert_eq!(DataHeader::decode(&header.encode()), Ok(header));
        assert_eq!(header.range().is_some(), header.size != 0 && header.addr.checked_add(header.size).is_some());
    }
    if let Some(bytes) = data.first_chunk::<STATUS_BYTES>()
        && let Ok(status) = DataStatus::decode(*bytes)
    {
        assert_eq!(DataStatus::decode(status.encode()), Ok(status));
    }
}

/// Segment descriptors, ours and those of other releases.
pub fn mooncake_descriptor(data: &[u8]) {
    let Ok(descriptor) = SegmentDescriptor::decode(data) else { return };
    let again = SegmentDescriptor::decode(&descriptor.encode()).expect("what was accepted is accepted again");
    assert_eq!(again.encode(), descriptor.encode());
}

/// Host names with ports, and metadata keys.
pub fn mooncake_names(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let parsed = HostPort::parse(&text);
    if !parsed.host.contains(['[', ']']) {
        assert_eq!(HostPort::parse(&parsed.to_string()).port, parsed.port);
    }
    let _ = host::split(&text);
    let _ = host::unbracket(&text);
    let keys = KeySpace::new(&text);
    for key in [keys.ram(&text), keys.rpc_meta(&text), text.to_string()] {
        let _ = keys.segment_of(&key);
        let _ = keys.server_of(&key);
    }
    assert_eq!(keys.server_of(&keys.rpc_meta("server")), Some("server"));
}

/// Control address as stores keep it.
pub fn mooncake_rpc_meta(data: &[u8]) {
    let Ok(meta) = RpcMeta::decode(data) else { return };
    assert_eq!(RpcMeta::decode(&meta.encode()), Ok(meta.clone()));
    let _ = meta.address();
}

/// Hello and welcome of the native protocol.
pub fn native_hello(data: &[u8]) {
    if let Ok(hello) = Hello::decode(data) {
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    }
    if let Ok(welcome) = Welcome::decode(data) {
        assert_eq!(Welcome::decode(&welcome.encode()), Ok(welcome));
    }
}

/// Frames of the native protocol. The second half seals a header around whatever the input holds, since a random header
/// hardly ever carries its checksum.
pub fn native_frame(data: &[u8]) {
    const MAX_ENTRIES: u32 = 64;
    const MAX_PAYLOAD_BYTES: u64 = 1 << 20;
    if let Ok(header) = FrameHeader::decode(data) {
        assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
    }
    let Some((head, table)) = data.split_first_chunk::<16>() else { return };
    let kinds = [FrameKind::Write, FrameKind::Read, FrameKind::Ping, FrameKind::WriteDone, FrameKind::Goodbye];
    let header = FrameHeader {
        kind: kinds[usize::from(head[0]) % kinds.len()],
        checksum: head[1] & 1 != 0,
        entries_or_status: u16::from_le_bytes([head[2], head[3]]),
        id: 1,
        payload_len: u64::from_le_bytes([head[4], head[5], head[6], head[7], head[8], head[9], head[10], head[11]]),
        table_crc_or_entry: u32::from_le_bytes([head[12], head[13], head[14], head[15]]),
    };
    assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
    if let Ok(table_len) = header.check_request(MAX_ENTRIES, MAX_PAYLOAD_BYTES) {
        assert!(table_len <= MAX_ENTRIES as usize * frame::ENTRY_LEN);
        assert!(header.kind == FrameKind::Ping || header.payload_len <= MAX_PAYLOAD_BYTES);
    }
    if header.check_table(table).is_ok() {
        let sum = frame::entries(table).map(|(_, len)| u128::from(len)).sum::<u128>();
        assert!(sum == u128::from(header.payload_len) || header.payload_len == u64::MAX);
    }
}

/// Packets of the same-host socket.
pub fn local_message(data: &[u8]) {
    let Ok(message) = Message::decode(data) else { return };
    assert!(data.len() <= local::MAX_PACKET_BYTES);
    assert_eq!(Message::decode(&message.encode()), Ok(message));
}

/// Valid inputs to start from.
#[allow(dead_code, reason = "libFuzzer brings its own corpus")]
pub mod seeds {
    use super::*;

    fn range() -> ByteRange {
        ByteRange::new(0x7f00_0000_1000, 65536).expect("a range")
    }

    pub fn mooncake_control() -> Vec<Vec<u8>> {
        vec![
            control::encode_frame(ControlKind::Connection, &control::Handshake::default().encode()),
            control::encode_frame(ControlKind::Metadata, b"{}\n"),
            control::encode_frame(ControlKind::Notify, br#"{"name":"n","notify_msg":"m"}"#),
            control::encode_frame(ControlKind::Probe, br#"{"status":"success"}"#),
            control::encode_old_frame(br#"{"local_nic_path":"a@b","qp_num":[1,2]}"#),
        ]
    }

    pub fn mooncake_data() -> Vec<Vec<u8>> {
        let mut seeds = vec![DataStatus::Ok.encode().to_vec(), DataStatus::Rejected.encode().to_vec()];
        for opcode in [Opcode::Read, Opcode::Write] {
            seeds.push(DataHeader::new(opcode, range(), true).encode().to_vec());
            seeds.push(DataHeader::new(opcode, range(), false).encode().to_vec());
        }
        seeds
    }

    pub fn mooncake_descriptor() -> Vec<Vec<u8>> {
        let mut own = SegmentDescriptor::tcp("127.0.0.1:15501", "127.0.0.1", 16918);
        own.buffers.push(BufferDescriptor::memory("127.0.0.1:15501", 0x7fdb_2a00_0010, 1 << 20));
        let documents: [&[u8]; 4] = [
            br#"{"buffers":[{"addr":140582201581584,"length":1048576,"name":"a:1"}],"name":"a:1","protocol":"tcp","rdma_server_name":"","tcp_data_host":"127.0.0.1","tcp_data_port":16918,"tcp_proto_version":2,"timestamp":"2026-01-01 00:00:00.000000"}"#,
            br#"{"name":"node1:12345","protocol":"rdma","tcp_data_port":0,"devices":[{"name":"mlx5_0","lid":0,"gid":"fe:80"}],"buffers":[{"name":"cpu:0","addr":1,"length":2,"lkey":[1],"rkey":[2]}],"priority_matrix":{"cpu:0":[["mlx5_0"],[]]}}"#,
            br#"{"name":"nvmeof/s0","protocol":"nvmeof","buffers":[{"length":1073741824,"file_path":"/mnt/a","local_path_map":{"hostA":"/mnt/b"}}]}"#,
            br#"{"name":"x","protocol":["rdma","hip"],"buffers":[]}"#,
        ];
        documents.iter().map(|document| document.to_vec()).chain([own.encode()]).collect()
    }

    pub fn mooncake_names() -> Vec<Vec<u8>> {
        [
            "node",
            "node:12345",
            "192.0.2.2:15501",
            "[fe80::1]:15501",
            "fe80::1",
            "nvmeof/s0",
            "mooncake/ram/a:1",
            "mooncake/rpc_meta/a",
        ]
        .iter()
        .map(|name| name.as_bytes().to_vec())
        .collect()
    }

    pub fn mooncake_rpc_meta() -> Vec<Vec<u8>> {
        vec![RpcMeta { ip_or_host_name: "192.0.2.2".to_owned(), rpc_port: 15501 }.encode()]
    }

    pub fn native_hello() -> Vec<Vec<u8>> {
        let limits = tidewire_core::native::hello::Limits {
            entries: 512,
            frame_bytes: 1 << 20,
            open_frames: 64,
            heartbeat_ms: 1000,
        };
        let generation = tidewire_core::Generation(9);
        let hello =
            Hello { oldest: 1, newest: 1, features: 1, token: [7; 16], generation, session: 3, stream: 2, attempt: 1 };
        let (taken, refused) = (hello.judge(&[7; 16], generation, limits), hello.judge(&[8; 16], generation, limits));
        vec![hello.encode().to_vec(), taken.encode().to_vec(), refused.encode().to_vec()]
    }

    pub fn native_frame() -> Vec<Vec<u8>> {
        let mut table = Vec::new();
        frame::push_entry(&mut table, range());
        let header = FrameHeader {
            kind: FrameKind::Write,
            checksum: true,
            entries_or_status: 1,
            id: 1,
            payload_len: range().len(),
            table_crc_or_entry: 0,
        };
        let mut sealed = vec![0u8, 1, 1, 0];
        sealed.extend_from_slice(&range().len().to_le_bytes());
        sealed.extend_from_slice(&[0; 4]);
        sealed.extend_from_slice(&table);
        vec![
            header.encode().to_vec(),
            FrameHeader::bare(FrameKind::Ping, FrameStatus::Done, 7).encode().to_vec(),
            sealed,
        ]
    }

    pub fn local_message() -> Vec<Vec<u8>> {
        let generation = tidewire_core::Generation(9);
        [
            Message::Hello { version: local::VERSION, generation, token: [7; 16], name: "127.0.0.1:15501".to_owned() },
            Message::Welcome { pid: 1, probe_addr: 2, probe_word: 3 },
            Message::Refuse { reason: tidewire_core::error::RefuseReason::Token },
            Message::Ask { id: 1, range: range(), want_file: true },
            Message::Grant { id: 1, slot: 2, sequence: 3, region: range(), file_offset: Some(0) },
            Message::Grant { id: 1, slot: 2, sequence: 3, region: range(), file_offset: None },
            Message::Deny { id: 1, reason: DenyReason::Limit },
            Message::Revoke { slot: 1, sequence: 2 },
            Message::Release { slot: 1, sequence: 2 },
        ]
        .iter()
        .map(Message::encode)
        .collect()
    }
}
