//! Official initiator, our target.

use std::time::{Duration, Instant};

use serde_json::json;
use tidewire_engine::transport::mooncake_tcp::MooncakeTcpOptions;

use crate::{
    node::{Node, PATIENCE, random_bytes},
    official::Official,
};

const LEN: usize = 4 << 20;

/// Offsets in both memories and lengths of a batch.
const BLOCKS: [(usize, usize, usize); 6] = [
    (0, 3_000_000, 1),
    (10, 2_000_000, 65_536),
    (100_000, 1_000_000, 65_537),
    (200_000, 500_000, 400_000),
    (700_000, 100, 4096),
    (800_000, 10_000, 100_000),
];

/// Whether the memory holds `expected`. An official version 1 initiator does not wait for its writes to land, so there the
/// bytes may come a little later.
fn becomes(node: &Node, expected: &[u8], acknowledged: bool) -> bool {
    let deadline = Instant::now() + if acknowledged { Duration::ZERO } else { PATIENCE };
    while node.memory() != expected {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

fn round_trip(environment: &[(&str, &str)], acknowledged: bool) {
    let Some(mut official) = Official::start("P2PHANDSHAKE", environment) else { return };
    let mut node = Node::new(LEN, MooncakeTcpOptions::default());
    let local = official.register(LEN);
    let theirs = random_bytes(21, LEN);
    official.load(local, &theirs);

    // Whole memory in one call each way.
    assert_eq!(official.call(json!(["write", node.name, local, node.base, LEN])), 0);
    assert!(becomes(&node, &theirs, acknowledged), "written bytes differ");
    let mut ours = random_bytes(22, LEN);
    node.memory_mut().copy_from_slice(&ours);
    assert_eq!(official.call(json!(["read", node.name, local, node.base, LEN])), 0);
    assert!(official.dump(local, LEN) == ours, "read bytes differ");

    // Batches, waited for and in the background.
    let lists = (
        BLOCKS.map(|(at, _, _)| local + at as u64),
        BLOCKS.map(|(_, at, _)| node.base + at as u64),
        BLOCKS.map(|(_, _, len)| len),
    );
    for call in [
        json!(["batch_write", node.name, lists.0, lists.1, lists.2]),
        json!(["background", "write", node.name, lists.0, lists.1, lists.2]),
    ] {
        official.load(local, &theirs);
        node.memory_mut().copy_from_slice(&ours);
        assert_eq!(official.call(call), 0);
        let mut expected = ours.clone();
        for (from, to, len) in BLOCKS {
            expected[to..to + len].copy_from_slice(&theirs[from..from + len]);
        }
        assert!(becomes(&node, &expected, acknowledged), "written batch differs");
    }
    for call in [
        json!(["batch_read", node.name, lists.0, lists.1, lists.2]),
        json!(["background", "read", node.name, lists.0, lists.1, lists.2]),
    ] {
        official.load(local, &theirs);
        ours = random_bytes(23, LEN);
        node.memory_mut().copy_from_slice(&ours);
        assert_eq!(official.call(call), 0);
        let mut expected = theirs.clone();
        for (to, from, len) in BLOCKS {
            expected[to..to + len].copy_from_slice(&ours[from..from + len]);
        }
        assert!(official.dump(local, LEN) == expected, "read batch differs");
    }
    println!("{environment:?}: {:?}", node.transport.target_stats());
}

#[test]
fn reads_and_writes_match_byte_for_byte() {
    round_trip(&[], true);
}

#[test]
fn reads_and_writes_match_with_a_connection_per_request() {
    round_trip(&[("MC_TCP_ENABLE_CONNECTION_POOL", "0")], true);
}

#[test]
fn reads_and_writes_match_in_version_1() {
    round_trip(&[("MC_TCP_PROTO", "1")], false);
}

#[test]
fn probe_notify_and_first_buffer_work() {
    let Some(mut official) = Official::start("P2PHANDSHAKE", &[]) else { return };
    let node = Node::new(LEN, MooncakeTcpOptions::default());
    let local = official.register(4096);
    assert_eq!(official.call(json!(["probe", node.name])), 0);
    assert_eq!(official.call(json!(["first_buffer", node.name])), json!(node.base));
    official.load(local, b"payload");
    assert_eq!(official.call(json!(["write_with_notify", node.name, local, node.base, 7, "who", "là\nhere"])), 0);
    assert_eq!(&node.memory()[..7], b"payload");
    assert_eq!(node.notes(), [("who".to_owned(), "là\nhere".to_owned())]);
}

#[test]
fn range_outside_fails_there_and_harms_nothing_here() {
    let Some(mut official) = Official::start("P2PHANDSHAKE", &[]) else { return };
    let node = Node::new(LEN, MooncakeTcpOptions::default());
    let local = official.register(LEN);
    let bytes = random_bytes(24, LEN);
    official.load(local, &bytes);
    let outside = node.base + LEN as u64 - 50;
    for direction in ["write", "read"] {
        for len in [100, 3_000_000] {
            assert_eq!(official.call(json!([direction, node.name, local, outside, len])), -1);
            assert!(node.memory()[LEN - 50..].iter().all(|b| *b == 0));
            // After a refused read, the official pool may hand out the connection that the target has closed, once.
            let good = json!(["write", node.name, local, node.base, 100]);
            assert!((0..2).any(|_| official.call(good.clone()) == 0), "after {direction} of {len}");
        }
    }
    assert_eq!(node.memory()[..100], bytes[..100]);
    assert!(node.memory()[100..].iter().all(|b| *b == 0));
    assert!(node.transport.target_stats().refused >= 4);
}
