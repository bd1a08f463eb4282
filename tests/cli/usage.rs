//! What a wrong call ends with, and what needs no engine.

use crate::support::{BENCH, TOOL, run};

#[test]
fn version_names_the_commit() {
    for program in [TOOL, BENCH] {
        let ended = run(program, &["--version"]).expect(0);
        assert!(ended.out.contains(env!("CARGO_PKG_VERSION")) && ended.out.contains('('), "{}", ended.out);
    }
}

#[test]
fn wrong_calls_end_with_status_2_and_say_what_to_do() {
    let wrong: [(&str, &[&str], &str); 10] = [
        (TOOL, &[], "Usage"),
        (TOOL, &["swim"], "swim"),
        (TOOL, &["demo", "--model", "gpt"], "llama3-8b"),
        (TOOL, &["demo", "--tokens", "0"], "hint:"),
        (TOOL, &["bench", "--nosuchflag"], "nosuchflag"),
        (TOOL, &["bench", "--protocol=efa"], "hint: use tcp"),
        (BENCH, &["-backend=tent"], "hint: use --backend=classic"),
        (BENCH, &["--block_size=0", "--protocol=tcp"], "hint:"),
        (BENCH, &["--pair", "--mode=target"], "hint:"),
        (TOOL, &["segments"], "HOST:PORT"),
    ];
    for (program, arguments, expected) in wrong {
        let ended = run(program, arguments).expect(2);
        assert!(ended.err.contains(expected), "{arguments:?}: {}", ended.err);
        assert!(ended.out.is_empty(), "{arguments:?} printed {}", ended.out);
    }
}

#[test]
fn failures_end_with_status_1_and_a_hint() {
    let flags = ["--metadata_server=http://127.0.0.1:1/metadata", "--protocol=tcp", "--local_server_name=127.0.0.1"];
    let ended = run(BENCH, &[&flags[..], &["--buffer_size=1M", "--threads=1", "--batch_size=1"]].concat()).expect(1);
    assert!(ended.err.contains("error: ") && ended.err.contains("hint: "), "{}", ended.err);
    let ended = run(TOOL, &["demo", "--file", "/nonexistent/file"]).expect(1);
    assert!(ended.err.contains("/nonexistent/file"), "{}", ended.err);
    let ended = run(TOOL, &["segments", "--metadata", "gopher://x"]).expect(1);
    assert!(ended.err.contains("gopher") && ended.err.contains("hint: "), "{}", ended.err);
}

#[test]
fn config_lists_the_settings() {
    let ended = run(TOOL, &["config"]).expect(0);
    assert!(ended.out.contains("TIDEWIRE_METADATA") && ended.out.contains("P2PHANDSHAKE"), "{}", ended.out);
    let ended = run(TOOL, &["config", "--markdown"]).expect(0);
    assert!(ended.out.starts_with("# Settings") && ended.out.contains("| `TIDEWIRE_METADATA` |"), "{}", ended.out);
}

#[test]
fn config_shows_what_is_changed_and_no_password() {
    let environment = [("TIDEWIRE_TCP_STREAMS", "7"), ("TIDEWIRE_ETCD_PASSWORD", "s3cret")];
    let ended = crate::support::start_with(TOOL, &["config"], &environment).end().expect(0);
    let line = |name: &str| ended.out.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(line("TIDEWIRE_TCP_STREAMS").contains("7") && line("TIDEWIRE_TCP_STREAMS").contains("changed"));
    assert!(!ended.out.contains("s3cret") && line("TIDEWIRE_ETCD_PASSWORD").contains("(set)"));
}
