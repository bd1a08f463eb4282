//! `tidewire bench` and `transfer_engine_bench`.

use std::fs;

use rustix::process::Signal;
use serde_json::Value;

use crate::{
    demo::wait_for_others,
    support::{BENCH, Ended, TOOL, run, scratch, start},
};

/// Flags that keep a run short and small.
const SMALL: [&str; 4] = ["--duration=0.2", "--threads=2", "--batch_size=8", "--buffer_size=4M"];

fn small(program: &str, flags: &[&str]) -> Ended {
    let command: &[&str] = if program == TOOL { &["bench"] } else { &[] };
    run(program, &[command, &SMALL, flags].concat())
}

/// Whether a line is `Test completed: duration 2.00, batch count 537, throughput 0.56 GB/s`; its batch count and rate.
fn final_line(line: &str) -> Option<(u64, f64)> {
    let rest = line.strip_prefix("Test completed: duration ")?;
    let (duration, rest) = rest.split_once(", batch count ")?;
    let (count, rest) = rest.split_once(", throughput ")?;
    let rate = rest.strip_suffix(" GB/s")?;
    let two_digits = |text: &str| text.split_once('.').is_some_and(|(_, digits)| digits.len() == 2);
    (two_digits(duration) && two_digits(rate)).then_some(())?;
    Some((count.parse().ok()?, rate.parse().ok()?))
}

#[test]
fn every_byte_is_compared_for_each_transport_and_operation() {
    for transport in ["auto", "tcp", "shm", "cma"] {
        let flags = ["--pair", "--check", "--block_size=10000", "--operation=both", "--json"];
        let ended = small(TOOL, &[&flags[..], &[&format!("--protocol={transport}")]].concat());
        if transport == "cma" && ended.is_refused_by_the_kernel() {
            continue;
        }
        let ended = ended.expect(0);
        let points: Vec<Value> = ended.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let operations: Vec<&str> = points.iter().map(|point| point["operation"].as_str().unwrap()).collect();
        assert_eq!(operations, ["write", "read"]);
        for point in &points {
            let number = |name: &str| point[name].as_f64().unwrap_or_else(|| panic!("{name} of {point}"));
            assert!(point["checked"] == true && point["interrupted"] == false, "{point}");
            assert!(number("batches") >= 2.0 && number("bytes") == number("batches") * 80_000.0, "{point}");
            assert!(number("p50_us") > 0.0 && number("p50_us") <= number("p99_us"), "{point}");
            assert!(number("cpu_s") > 0.0 && number("cpu_s_per_gb") > 0.0 && number("target_cpu_s") >= 0.0, "{point}");
            let seconds = number("duration_s");
            assert!((number("bytes") / seconds / 1e9 - number("gb_per_s")).abs() < 1e-6, "{point}");
            let expected = if transport == "auto" { "shm" } else { transport };
            assert_eq!(point["transport"], expected, "{point}");
            assert!(!point["reason"].as_str().unwrap().is_empty(), "{point}");
        }
        assert_eq!(ended.err.matches("Check passed").count(), 2, "{}", ended.err);
    }
}

#[test]
fn the_report_is_the_original_one_and_on_stderr() {
    let ended = small(BENCH, &["--pair", "-protocol=tcp", "-operation", "write", "-block-size=4096"]).expect(0);
    assert!(ended.out.is_empty(), "{}", ended.out);
    let (batches, _) = ended.err.lines().find_map(final_line).unwrap_or_else(|| panic!("{}", ended.err));
    assert!(batches > 0);
    for worker in 0..2 {
        assert!(ended.err.lines().any(|line| line == format!("Worker {worker} stopped!")), "{}", ended.err);
    }
    let ended = small(BENCH, &["--pair", "--protocol=tcp", "--report_unit=MiB", "--report_precision=0"]).expect(0);
    assert!(ended.err.trim_end().ends_with(" MiB/s"), "{}", ended.err);
}

#[test]
fn rdma_falls_back_to_tcp_with_a_warning() {
    let ended = small(TOOL, &["--pair", "--json"]).expect(0);
    assert!(ended.err.contains("rdma is not available"), "{}", ended.err);
    assert!(ended.out.contains(r#""transport":"tcp""#), "{}", ended.out);
}

#[test]
fn a_target_started_by_hand_serves_an_initiator_and_ends_on_a_signal() {
    let target_flags = ["--mode=target", "--metadata_server=P2PHANDSHAKE", "--local_server_name=127.0.0.1"];
    let mut target = start(BENCH, &[&SMALL[..], &target_flags, &["--protocol=tcp"]].concat());
    let line = target.wait_for("listening on");
    assert!(line.contains("Transfer Engine RPC using P2P handshake, listening on 127.0.0.1:"), "{line}");
    let segment = format!("--segment_id={}", line.rsplit(' ').next().unwrap());
    let common = ["--metadata_server=P2PHANDSHAKE", "--local_server_name=127.0.0.1", "--protocol=tcp", "--check"];
    for operation in ["--operation=read", "--operation=write"] {
        let ended = small(BENCH, &[&common[..], &[&segment, operation]].concat()).expect(0);
        assert!(ended.err.contains("Check passed") && ended.err.lines().any(|l| final_line(l).is_some()));
    }
    let ended = small(BENCH, &[&common[..], &[&segment, "--buffer_size=64M"]].concat()).expect(1);
    assert!(ended.err.contains("--buffer_size"), "a target that is too small is named: {}", ended.err);
    target.signal(Signal::TERM);
    target.end().expect(0);
}

#[test]
fn interrupting_reports_what_was_measured() {
    let flags = ["bench", "--pair", "--protocol=tcp", "--duration=600", "--threads=1", "--buffer_size=16M", "--json"];
    let mut bench = start(TOOL, &flags);
    assert_eq!(wait_for_others(&bench, 1), 1);
    wait_until_moving(&bench);
    bench.signal(Signal::INT);
    bench.wait_for("Worker 0 stopped!");
    let ended = bench.end().expect(0);
    let (batches, _) = ended.err.lines().find_map(final_line).unwrap_or_else(|| panic!("{}", ended.err));
    let point: Value = serde_json::from_str(ended.out.trim()).unwrap();
    assert!(batches > 0 && point["interrupted"] == true && point["duration_s"].as_f64().unwrap() < 120.0);
}

#[test]
fn killing_the_initiator_ends_its_target() {
    let flags = ["bench", "--pair", "--protocol=tcp", "--duration=600", "--threads=1", "--buffer_size=16M"];
    let bench = start(TOOL, &flags);
    assert_eq!(wait_for_others(&bench, 1), 1);
    bench.signal(Signal::KILL);
    let left = bench.left_behind(std::time::Instant::now() + std::time::Duration::from_secs(10));
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[test]
fn a_sweep_gives_every_point_and_a_chart() {
    let (json, svg) = (scratch("points.json"), scratch("chart.svg"));
    let files = [format!("--json={}", json.display()), format!("--plot={}", svg.display())];
    let flags = ["--pair", "--protocol=tcp", "--sweep=4k,64k,128k", "--batch_sweep=1,4", "--operation=both", &files[0]];
    small(TOOL, &[&flags[..], &[&files[1], "--duration=0.05"]].concat()).expect(0);
    let text = fs::read_to_string(&json).unwrap();
    let points: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let sizes: Vec<u64> = points.iter().map(|point| point["block_size"].as_u64().unwrap()).collect();
    assert_eq!(sizes, [4096, 65536, 131072].repeat(4));
    let chart = fs::read_to_string(&svg).unwrap();
    assert!(well_formed(&chart), "{chart}");
    assert_eq!((chart.matches("<polyline").count(), chart.matches("<circle").count()), (4, 12));
    for label in ["4 KiB", "128 KiB", "GB/s", "write over tcp, batch 1", "read over tcp, batch 4"] {
        assert!(chart.contains(label), "no {label} in the chart");
    }
    fs::remove_file(json).unwrap();
    fs::remove_file(svg).unwrap();
}

/// Waits until the process has used CPU time well beyond its start, so that batches are moving.
fn wait_until_moving(run: &crate::support::Run) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    let ticks = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", run.pid())).unwrap();
        let fields: Vec<u64> = stat.rsplit(')').next().unwrap().split(' ').filter_map(|f| f.parse().ok()).collect();
        // After the name: state (no number), then ppid … ; utime and stime are the 11th and 12th numbers.
        fields[10] + fields[11]
    };
    while ticks() < 50 {
        assert!(std::time::Instant::now() < deadline, "nothing moves");
        std::thread::yield_now();
    }
}

/// Whether tags are closed in the order they were opened, and attributes are quoted.
fn well_formed(text: &str) -> bool {
    let mut open = Vec::new();
    for tag in text.split('<').skip(1) {
        let Some((inside, _)) = tag.split_once('>') else { return false };
        let name = inside.split([' ', '/']).find(|part| !part.is_empty()).unwrap_or_default();
        if inside.matches('"').count() % 2 != 0 {
            return false;
        }
        if inside.starts_with('/') {
            if open.pop() != Some(name) {
                return false;
            }
        } else if !inside.ends_with('/') {
            open.push(name);
        }
    }
    open.is_empty() && text.starts_with("<svg ")
}
