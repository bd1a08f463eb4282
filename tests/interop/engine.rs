//! The whole engine against an official one, over every way of discovery.

use std::time::Duration;

use serde_json::json;
use tidewire_core::{Location, Notify, Opcode, SegmentId, TaskState, TransferError, TransferRequest};
use tidewire_engine::{Buffer, TransferEngine, transport::TransportKind};

use crate::{
    node::{PATIENCE, random_bytes},
    official::Official,
    stores::Store,
};

const LEN: usize = 6 << 20;

fn requests(opcode: Opcode, buffer: &Buffer, target: SegmentId, remote: u64) -> Vec<TransferRequest> {
    let blocks = [(0, 5_000_000, 900_000), (900_000, 0, 4096), (1_000_000, 100_000, 4_500_001)];
    let request = |(local, far, length): (u64, u64, u64)| TransferRequest {
        opcode,
        source: buffer.addr() + local,
        target,
        target_offset: remote + far,
        length,
    };
    blocks.map(request).to_vec()
}

fn bytes_of(buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len()];
    buffer.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Copies what `requests` copy, from the side they read to the side they write.
fn copied(
    requests: &[TransferRequest],
    from: &[u8],
    from_base: u64,
    to: &mut [u8],
    to_base: u64,
    local_is_source: bool,
) {
    for request in requests {
        let (near, far) = (request.source, request.target_offset);
        let (source, target) = if local_is_source { (near, far) } else { (far, near) };
        let (source, target) = ((source - from_base) as usize, (target - to_base) as usize);
        let len = request.length as usize;
        to[target..target + len].copy_from_slice(&from[source..source + len]);
    }
}

fn both_ways(uri: &str, local_name: &str) {
    let Some(mut official) = Official::start(uri, &[]) else { return };
    let remote = official.register(LEN);
    let engine = TransferEngine::builder(local_name).metadata(uri).mooncake_port(true).build().unwrap();
    let buffer = engine.allocate(LEN, Location::Any).unwrap();
    let target = engine.open_segment(&official.name).unwrap();
    assert_eq!(engine.connect(target).unwrap(), TransportKind::MooncakeTcp);
    engine.probe(&engine.segment_info(target).unwrap().address).unwrap();

    let ours = random_bytes(31, LEN);
    buffer.write_at(0, &ours).unwrap();
    let writes = requests(Opcode::Write, &buffer, target, remote);
    let batch = engine.allocate_batch(writes.len()).unwrap();
    let note = Notify { name: "kv".to_owned(), message: "block 7".to_owned() };
    batch.submit_with_notify(&writes, note).unwrap();
    let status = batch.wait(PATIENCE).unwrap();
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    assert_eq!(official.call(json!(["notes"])), json!([["kv", "block 7"]]));
    let mut expected = vec![0; LEN];
    copied(&writes, &ours, buffer.addr(), &mut expected, remote, true);
    assert!(official.dump(remote, LEN) == expected, "written bytes differ");

    let theirs = random_bytes(32, LEN);
    official.load(remote, &theirs);
    let reads = requests(Opcode::Read, &buffer, target, remote);
    let status = engine.transfer_sync(&reads, PATIENCE).unwrap();
    assert_eq!(status.state, TaskState::Completed, "{:?}", status.error);
    let mut expected = ours;
    copied(&reads, &theirs, remote, &mut expected, buffer.addr(), false);
    assert!(bytes_of(&buffer) == expected, "read bytes differ");

    let outside = TransferRequest { target_offset: remote + LEN as u64 - 1, ..writes[1] };
    let error = engine.transfer_sync(&[outside], PATIENCE).unwrap_err();
    assert!(matches!(&error, TransferError::OutOfBounds { segment, .. } if *segment == official.name), "{error:?}");

    let name = engine.segment_name();
    assert_eq!(official.call(json!(["probe", name])), 0);
    assert_eq!(official.call(json!(["first_buffer", name])), json!(buffer.addr()));
    assert_eq!(official.call(json!(["write_with_notify", name, remote, buffer.addr(), LEN, "who", "what"])), 0);
    assert!(bytes_of(&buffer) == theirs, "bytes written by the official initiator differ");
    assert_eq!(engine.take_notifications(), [Notify { name: "who".to_owned(), message: "what".to_owned() }]);
    buffer.write_at(0, &expected).unwrap();
    assert_eq!(official.call(json!(["read", name, remote, buffer.addr(), LEN])), 0);
    assert!(official.dump(remote, LEN) == expected, "bytes read by the official initiator differ");

    drop(buffer);
    engine.shutdown(Duration::from_secs(5));
    assert_ne!(official.call(json!(["probe", name])), 0);
}

#[test]
fn both_directions_work_over_p2p() {
    both_ways("P2PHANDSHAKE", "127.0.0.1");
}

#[test]
fn both_directions_work_over_the_official_http_server() {
    let Some(store) = Store::official_http() else { return };
    both_ways(&store.uri, "127.0.0.1:24001");
}

#[test]
fn both_directions_work_over_our_http_server() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let address = "127.0.0.1:0".parse().unwrap();
    let server = runtime
        .block_on(tidewire_engine::metadata::server::MetadataServer::start(address, Default::default()))
        .unwrap();
    let uri = server.uri();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = std::thread::spawn(move || {
        runtime.block_on(async {
            // Ends by the drop of the sender.
            let _ = stopped.await;
            server.stop().await;
        });
    });
    both_ways(&uri, "127.0.0.1:24002");
    drop(stop);
    serving.join().unwrap();
}

#[cfg(feature = "etcd")]
#[test]
fn both_directions_work_over_etcd() {
    let Some(store) = Store::etcd() else { return };
    both_ways(&store.uri, "127.0.0.1:24003");
}
