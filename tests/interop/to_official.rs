//! Our initiator, official target.

use serde_json::json;
use tidewire_core::{Notify, Opcode, TaskState, TransferError};
use tidewire_engine::transport::mooncake_tcp::MooncakeTcpOptions;

use crate::{
    node::{Entry, Node, address, random_bytes},
    official::Official,
};

const LEN: usize = 24 << 20;

/// Entries of mixed sizes over both memories: the target's blocks lie in reverse order.
fn entries(opcode: Opcode, remote: u64) -> Vec<Entry> {
    let sizes = [1, 3, 24, 4096, 4097, 65_535, 65_536, 65_537, 1 << 20, (9 << 20) + 11].into_iter();
    let sizes = sizes.chain(std::iter::repeat_n(4096, 500));
    let (mut offset, mut end) = (0, LEN);
    sizes
        .map(|len| {
            end -= len;
            offset += len;
            (opcode, offset - len, remote + end as u64, len)
        })
        .collect()
}

fn round_trip(options: MooncakeTcpOptions) {
    let Some(mut official) = Official::start("P2PHANDSHAKE", &[]) else { return };
    let remote = official.register(LEN);
    let mut node = Node::new(LEN, options);
    let written = random_bytes(11, LEN);
    node.memory_mut().copy_from_slice(&written);
    let link = node.open(&official.name);

    let writes = entries(Opcode::Write, remote);
    let status = node.run(&link, &writes);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    let seen = official.dump(remote, LEN);
    let mut expected = vec![0; LEN];
    for &(_, offset, addr, len) in &writes {
        let at = (addr - remote) as usize;
        expected[at..at + len].copy_from_slice(&written[offset..offset + len]);
    }
    assert!(seen == expected, "bytes in the official target differ");

    let theirs = random_bytes(12, LEN);
    official.load(remote, &theirs);
    let reads = entries(Opcode::Read, remote);
    let status = node.run(&link, &reads);
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    let mut expected = written;
    for &(_, offset, addr, len) in &reads {
        let at = (addr - remote) as usize;
        expected[offset..offset + len].copy_from_slice(&theirs[at..at + len]);
    }
    assert!(node.memory() == expected, "bytes read from the official target differ");
    println!("{}", link.describe());
}

#[test]
fn reads_and_writes_match_byte_for_byte() {
    round_trip(MooncakeTcpOptions::default());
}

#[test]
fn reads_and_writes_match_in_version_1() {
    round_trip(MooncakeTcpOptions { force_v1: true, ..MooncakeTcpOptions::default() });
}

#[test]
fn single_requests_and_late_registrations_work() {
    let Some(mut official) = Official::start("P2PHANDSHAKE", &[]) else { return };
    let first = official.register(4096);
    let mut node = Node::new(4096, MooncakeTcpOptions::default());
    let link = node.open(&official.name);
    // Registered after the descriptor was read: the target is the judge.
    let second = official.register(8192);
    node.memory_mut()[..4].copy_from_slice(b"tide");
    for remote in [first, second] {
        let status = node.run(&link, &[(Opcode::Write, 0, remote + 5, 4)]);
        assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
        assert_eq!(official.dump(remote, 10), b"\0\0\0\0\0tide\0");
    }
}

#[test]
fn range_outside_is_refused_and_the_link_goes_on() {
    for force_v1 in [false, true] {
        let Some(mut official) = Official::start("P2PHANDSHAKE", &[]) else { return };
        let remote = official.register(1 << 20);
        let mut node = Node::new(1 << 20, MooncakeTcpOptions { force_v1, ..MooncakeTcpOptions::default() });
        let bytes = random_bytes(13, 1 << 20);
        node.memory_mut().copy_from_slice(&bytes);
        let link = node.open(&official.name);
        let outside = remote + (1 << 20) - 100;
        for opcode in [Opcode::Write, Opcode::Read] {
            let batch = node.submit(
                &link,
                &[
                    (Opcode::Write, 0, remote, 1000),
                    (opcode, 0, outside, 500_000),
                    (Opcode::Write, 1000, remote + 1000, 1000),
                ],
            );
            assert!(batch.park(std::time::Instant::now() + crate::node::PATIENCE));
            let error = batch.task_status(1).unwrap().error;
            let Some(TransferError::OutOfBounds { segment, range, .. }) = &error else { panic!("{error:?}") };
            assert_eq!((segment.as_str(), range.addr()), (official.name.as_str(), outside));
            for index in [0, 2] {
                let status = batch.task_status(index).unwrap();
                assert_eq!(status.state, TaskState::Completed, "v1 {force_v1}: {:?}", status.error);
            }
            assert!(official.dump(remote, 2000) == bytes[..2000]);
        }
    }
}

#[test]
fn probe_and_notify_reach_the_official_engine() {
    let Some(mut official) = Official::start("P2PHANDSHAKE", &[]) else { return };
    let node = Node::new(4096, MooncakeTcpOptions::default());
    let peer = address(&official.name);
    node.control.block_on(node.client.probe(&peer)).unwrap();
    for text in ["plain", "two\nlines, ünïcode"] {
        let note = Notify { name: "name".to_owned(), message: text.to_owned() };
        node.control.block_on(node.client.notify(&peer, &note)).unwrap();
    }
    assert_eq!(official.call(json!(["notes"])), json!([["name", "plain"], ["name", "two\nlines, ünïcode"]]));
    let handshake = node.control.block_on(node.client.handshake(&peer, &Default::default())).unwrap();
    assert_eq!(handshake, Default::default(), "an engine without RDMA answers with empty fields");
    official.kill();
    assert!(node.control.block_on(node.client.probe(&peer)).is_err());
}
