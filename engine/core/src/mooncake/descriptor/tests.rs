//! Descriptors as official releases print them, as old and foreign ones do, and as nobody should.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use proptest::prelude::*;

use super::*;

const OFFICIAL_TCP: &str = concat!(
    r#"{"buffers":[{"addr":140582201581584,"length":1048576,"name":"127.0.0.1:15501"}],"name":"127.0.0.1:15501","#,
    r#""protocol":"tcp","rdma_server_name":"","tcp_data_host":"127.0.0.1","tcp_data_port":16918,"#,
    r#""tcp_proto_version":2,"timestamp":"2026-01-01 00:00:00.000000"}"#,
    "\n"
);

const RDMA: &str = r#"{"name":"node1:12345","protocol":"rdma","tcp_data_port":0,"tcp_proto_version":1,"timestamp":"x",
    "devices":[{"name":"mlx5_0","lid":3,"gid":"fe:80"}],
    "buffers":[{"name":"cpu:0","addr":1,"length":2,"lkey":[7],"rkey":[9]}],
    "priority_matrix":{"cpu:0":[["mlx5_0"],["mlx5_1"]]},"rdma_server_name":"10.0.0.1:15501","metadata_version":5}"#;

fn error_of(json: &str) -> String {
    SegmentDescriptor::decode(json.as_bytes()).expect_err("must be refused").to_string()
}

#[test]
fn official_tcp_descriptor_with_newline_decodes() {
    let seen = SegmentDescriptor::decode(OFFICIAL_TCP.as_bytes()).unwrap();
    assert_eq!((seen.tcp_data_host.as_str(), seen.tcp_data_port, seen.tcp_proto_version), ("127.0.0.1", 16918, 2));
    assert_eq!(seen.buffers, [BufferDescriptor::memory("127.0.0.1:15501", 140582201581584, 1048576)]);
    assert_eq!(seen.tidewire, None);
}

#[test]
fn rdma_descriptor_keeps_devices_keys_and_matrix() {
    let seen = SegmentDescriptor::decode(RDMA.as_bytes()).unwrap();
    assert_eq!(seen.devices, [DeviceDescriptor { name: "mlx5_0".into(), lid: 3, gid: "fe:80".into() }]);
    assert_eq!((seen.buffers[0].lkey.as_slice(), seen.buffers[0].rkey.as_slice()), (&[7][..], &[9][..]));
    assert_eq!(seen.priority_matrix["cpu:0"], (vec!["mlx5_0".to_owned()], vec!["mlx5_1".to_owned()]));
    assert_eq!(SegmentDescriptor::decode(&seen.encode()).unwrap(), seen);
}

#[test]
fn missing_version_means_one_and_newer_versions_are_kept() {
    let base = r#"{"name":"a","protocol":"tcp"}"#;
    assert_eq!(SegmentDescriptor::decode(base.as_bytes()).unwrap().tcp_proto_version, 1);
    let newer = r#"{"name":"a","protocol":"tcp","tcp_proto_version":7}"#;
    assert_eq!(SegmentDescriptor::decode(newer.as_bytes()).unwrap().tcp_proto_version, 7);
}

#[test]
fn other_protocols_decode() {
    let nvmeof = r#"{"name":"nvmeof/s0","protocol":"nvmeof","timestamp":"x",
        "buffers":[{"length":1073741824,"file_path":"/mnt/a","local_path_map":{"hostA":"/mnt/nvme0/a"}}]}"#;
    let seen = SegmentDescriptor::decode(nvmeof.as_bytes()).unwrap();
    assert_eq!(seen.buffers[0].local_path_map["hostA"], "/mnt/nvme0/a");
    let many = r#"{"name":"n","protocol":["rdma","hip"],
        "buffers":[{"name":"cuda:0","addr":4096,"length":2,"protocol":"hip","shm_name":"x"}]}"#;
    let seen = SegmentDescriptor::decode(many.as_bytes()).unwrap();
    assert!(seen.speaks("hip") && seen.speaks("rdma") && !seen.speaks("tcp"));
    assert_eq!(SegmentDescriptor::decode(&seen.encode()).unwrap(), seen);
}

#[test]
fn bad_buffers_are_refused_by_name() {
    let with = |buffer: &str| format!(r#"{{"name":"s","protocol":"tcp","buffers":[{buffer}]}}"#);
    let good = r#"{"name":"s","addr":1,"length":1}"#;
    assert!(SegmentDescriptor::decode(with(good).as_bytes()).is_ok());
    for (bad, field) in [
        (r#"{"name":"","addr":1,"length":1}"#, "buffers[1].name"),
        (r#"{"name":"s","addr":0,"length":1}"#, "buffers[1].addr"),
        (r#"{"name":"s","addr":1,"length":0}"#, "buffers[1].length"),
        (r#"{"name":"s","addr":18446744073709551615,"length":2}"#, "buffers[1].length"),
    ] {
        let text = error_of(&with(&format!("{good},{bad}")));
        assert!(text.contains(field) && text.contains("of s "), "{text}");
    }
}

#[test]
fn rdma_keys_must_match_the_devices() {
    assert!(error_of(&RDMA.replace("[7]", "[7,8]")).contains("buffers[0].lkey"));
    assert!(error_of(&RDMA.replace("[9]", "[]")).contains("buffers[0].rkey"));
    assert!(error_of(&RDMA.replace("fe:80", "")).contains("devices[0].gid"));
}

#[test]
fn nameless_and_broken_documents_are_refused() {
    for json in ["", "null", "[]", "{}", r#"{"name":"a"}"#, r#"{"name":"","protocol":"tcp"}"#, "{\"name\":\"a\""] {
        assert!(SegmentDescriptor::decode(json.as_bytes()).is_err(), "{json}");
    }
}

#[test]
fn own_descriptor_looks_like_an_official_one() {
    let mut own = SegmentDescriptor::tcp("127.0.0.1:15501", "127.0.0.1", 16918);
    own.buffers.push(BufferDescriptor::memory("127.0.0.1:15501", 140582201581584, 1048576));
    own.timestamp = "2026-01-01 00:00:00.000000".to_owned();
    let ours: serde_json::Value = serde_json::from_slice(&own.encode()).unwrap();
    let theirs: serde_json::Value = serde_json::from_str(OFFICIAL_TCP).unwrap();
    assert_eq!(ours, theirs);
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
        let _ = SegmentDescriptor::decode(&bytes);
    }

    #[test]
    fn cut_or_damaged_descriptors_never_panic(at in 0usize..OFFICIAL_TCP.len(), byte in any::<u8>()) {
        let _ = SegmentDescriptor::decode(&OFFICIAL_TCP.as_bytes()[..at]);
        let mut damaged = OFFICIAL_TCP.as_bytes().to_vec();
        damaged[at] = byte;
        let _ = SegmentDescriptor::decode(&damaged);
    }

    #[test]
    fn round_trip(name in "[a-z0-9:./]{1,20}", port in any::<u16>(), buffers in proptest::collection::vec((1u64..1 << 47, 1u64..1 << 40), 0..8)) {
        let mut own = SegmentDescriptor::tcp(name.clone(), "::1", port);
        own.buffers = buffers.into_iter().map(|(addr, length)| BufferDescriptor::memory(name.clone(), addr, length)).collect();
        prop_assert_eq!(SegmentDescriptor::decode(&own.encode()), Ok(own));
    }
}
