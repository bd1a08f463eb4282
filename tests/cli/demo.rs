//! `tidewire demo`.

use std::{
    fs,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::support::{Ended, TOOL, run, scratch, start};

/// Rows of the table: operation, transport, and the two checksums.
fn rows(ended: &Ended) -> Vec<(String, String, String, String)> {
    let mut rows = Vec::new();
    for line in ended.out.lines().filter(|line| line.starts_with("write ") || line.starts_with("read ")) {
        let cells: Vec<&str> = line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
        let [operation, transport, bytes, speed, p50, p99, cpu, prefill, decode, equal] = cells[..] else {
            panic!("{} cells in {line:?}", cells.len())
        };
        assert_eq!(equal, "equal");
        assert!(bytes.parse::<u64>().unwrap() > 0 && speed.parse::<f64>().unwrap() > 0.0, "{line}");
        assert!(p50.ends_with(" us") && p99.ends_with(" us") && cpu.parse::<f64>().unwrap() > 0.0, "{line}");
        rows.push((operation.to_owned(), transport.to_owned(), prefill.to_owned(), decode.to_owned()));
    }
    rows
}

#[test]
fn a_small_cache_moves_both_ways_over_the_best_transport_and_over_tcp() {
    let ended = run(TOOL, &["demo", "--tokens", "100", "--operation", "both"]).expect(0);
    let rows = rows(&ended);
    let paths: Vec<(&str, &str)> = rows.iter().map(|row| (row.0.as_str(), row.1.as_str())).collect();
    assert_eq!(paths[..2].iter().map(|path| path.0).collect::<Vec<_>>(), ["write", "read"], "{}", ended.out);
    assert!(paths.contains(&("write", "tcp")) && paths.contains(&("read", "tcp")), "{}", ended.out);
    assert_eq!(paths[0].1, "shm", "two processes on one host share memory: {}", ended.out);
    assert!(rows.iter().all(|row| row.2 == row.3 && row.2 == rows[0].2), "{}", ended.out);
    assert!(ended.out.contains("Why tcp: ") && ended.out.contains("7 pages of 16 tokens"), "{}", ended.out);
    assert!(ended.err.contains("100 %"), "progress in plain lines: {}", ended.err);
}

#[test]
fn each_transport_can_be_asked_for() {
    for transport in ["tcp", "shm", "cma"] {
        let ended = run(TOOL, &["demo", "--tokens", "40", "--transport", transport, "--operation", "both"]);
        if transport == "cma" && ended.is_refused_by_the_kernel() {
            continue;
        }
        let ended = ended.expect(0);
        assert!(rows(&ended).iter().all(|row| row.1 == transport), "{}", ended.out);
    }
}

#[test]
fn a_file_arrives_as_it_is() {
    let (source, target) = (scratch("source"), scratch("target"));
    let bytes: Vec<u8> = (0..1_234_567u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(&source, &bytes).unwrap();
    let paths = [source.to_str().unwrap(), target.to_str().unwrap()];
    let ended = run(TOOL, &["demo", "--file", paths[0], "--output", paths[1], "--transport", "tcp"]).expect(0);
    assert_eq!(rows(&ended).len(), 1);
    assert!(ended.out.contains("1234567"), "{}", ended.out);
    assert!(fs::read(&target).unwrap() == bytes, "the file that arrived differs");
    let empty = scratch("empty");
    fs::write(&empty, []).unwrap();
    run(TOOL, &["demo", "--file", empty.to_str().unwrap()]).expect(2);
    for path in [source, target, empty] {
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn interrupting_ends_all_three_processes() {
    let mut demo = start(TOOL, &["demo", "--tokens", "20000"]);
    demo.wait_for("starting prefill and decode");
    assert_eq!(wait_for_others(&demo, 2), 2);
    demo.signal(Signal::INT);
    let ended = demo.end().expect(130);
    assert!(ended.err.contains("interrupted"), "{}", ended.err);
}

#[test]
fn killing_the_demo_ends_its_children() {
    let mut demo = start(TOOL, &["demo", "--tokens", "20000"]);
    demo.wait_for("starting prefill and decode");
    assert_eq!(wait_for_others(&demo, 2), 2);
    demo.signal(Signal::KILL);
    let left = demo.left_behind(Instant::now() + Duration::from_secs(10));
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// Waits until the command has `count` other processes, or a deadline passes; how many it has.
pub fn wait_for_others(run: &crate::support::Run, count: usize) -> usize {
    let deadline = Instant::now() + Duration::from_secs(20);
    while run.others().len() < count && Instant::now() < deadline {
        std::thread::yield_now();
    }
    run.others().len()
}
