//! `tidewire metadata-server` and `tidewire segments`, with real segments.

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{BENCH, Run, TOOL, run, start, start_with};

/// A metadata server on a free port, and its connection string.
fn server() -> (Run, String) {
    let mut server = start(TOOL, &["metadata-server", "--port", "0"]);
    let line = server.wait_for("metadata server listening");
    (server, line.rsplit(' ').next().unwrap().to_owned())
}

fn target(name: &str, metadata: &str) -> Run {
    let flags = ["--mode=target", "--protocol=tcp", "--buffer_size=1M", "--threads=1", "--batch_size=1"];
    let (name, metadata) = (format!("--local_server_name={name}"), format!("--metadata_server={metadata}"));
    let environment = [("TIDEWIRE_BIND_ADDRESS", "127.0.0.1"), ("TIDEWIRE_LEASE_TTL_MS", "2000")];
    let mut target = start_with(BENCH, &[&flags[..], &[&name, &metadata]].concat(), &environment);
    target.wait_for("listening on");
    target
}

fn listed(arguments: &[&str]) -> Vec<Value> {
    let ended = run(TOOL, &[&["segments", "--json"], arguments].concat()).expect(0);
    ended.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn registered_segments_are_listed_and_a_dead_one_goes_away() {
    let (server, uri) = server();
    assert!(run(TOOL, &["segments", "--metadata", &uri]).expect(0).out.contains("no segment"));
    let (first, second) = (target("tw-first", &uri), target("tw-second", &uri));
    let segments = listed(&["--metadata", &uri]);
    let names: Vec<&str> = segments.iter().map(|segment| segment["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["tw-first", "tw-second"]);
    for segment in &segments {
        assert!(segment["reachable"] == true && segment["leased"] == true, "{segment}");
        assert!(segment["buffers"].as_u64() >= Some(1) && segment["bytes"].as_u64() >= Some(1 << 20), "{segment}");
        assert_eq!(segment["generation"].as_str().unwrap().len(), 16, "{segment}");
        assert!(segment["transports"].as_array().unwrap().contains(&Value::from("tcp")), "{segment}");
    }
    let table = run(TOOL, &["segments", "--metadata", &uri, "tw-second"]).expect(0).out;
    assert!(table.contains("tw-second") && table.contains("yes, ") && !table.contains("tw-first"), "{table}");

    first.signal(Signal::TERM);
    first.end().expect(0);
    second.signal(Signal::KILL);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(15);
    while !listed(&["--metadata", &uri]).is_empty() {
        assert!(std::time::Instant::now() < deadline, "a killed segment stays registered");
    }
    run(TOOL, &["segments", "--metadata", &uri, "tw-first"]).expect(1);
    server.signal(Signal::INT);
    server.end().expect(0);
}

#[test]
fn a_segment_without_a_server_is_asked_itself() {
    let mut p2p = start(
        BENCH,
        &[
            "--mode=target",
            "--protocol=tcp",
            "--buffer_size=1M",
            "--metadata_server=P2PHANDSHAKE",
            "--threads=1",
            "--batch_size=1",
            "--local_server_name=127.0.0.1",
        ],
    );
    let address = p2p.wait_for("listening on").rsplit(' ').next().unwrap().to_owned();
    let segments = listed(&[&address]);
    assert!(segments.len() == 1 && segments[0]["name"] == address.as_str() && segments[0]["reachable"] == true);
    p2p.signal(Signal::TERM);
    p2p.end().expect(0);
    run(TOOL, &["segments", &address]).expect(1);
}

#[test]
fn the_demo_finds_its_processes_through_a_server() {
    let (server, uri) = server();
    run(TOOL, &["demo", "--tokens", "20", "--transport", "tcp", "--metadata", &uri]).expect(0);
    assert!(listed(&["--metadata", &uri]).is_empty(), "an orderly end unregisters");
    server.signal(Signal::TERM);
    server.end().expect(0);
}
