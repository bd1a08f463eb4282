//! A network that stops carrying packets, between two network namespaces: no reset, no error from the kernel, silence.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use tidewire_engine::{
    TransferEngine,
    core::{ErrorClass, Location, Opcode},
};

use super::target::{Target, config, request};

const ROLE: &str = "TIDEWIRE_FAULT_INITIATOR";
const NAME: &str = "twfault";
const LEN: u64 = 8 << 20;

fn netns(arguments: &[&str]) -> std::process::Output {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/netns.sh");
    Command::new("bash").arg(script).args(arguments).output().unwrap()
}

/// Removes the namespaces however the test ends.
struct Cable;

impl Drop for Cable {
    fn drop(&mut self) {
        netns(&["down", NAME]);
    }
}

#[test]
fn a_partition_fails_open_batches_within_the_heartbeat_and_heals() {
    let probe = netns(&["probe"]);
    if !probe.status.success() {
        println!("{}", String::from_utf8_lossy(&probe.stdout).trim());
        return;
    }
    let up = netns(&["up", NAME]);
    assert!(up.status.success(), "{}", String::from_utf8_lossy(&up.stderr));
    let _cable = Cable;
    let addresses = String::from_utf8(up.stdout).unwrap();
    let (near, far) = addresses.trim().split_once(' ').unwrap();
    let inside = ["ip", "netns", "exec", "twfault-b"];
    let target = Target::start_in(Some(&inside), LEN, "tcp", far, &[]);
    let mut initiator = Command::new("ip")
        .args(["netns", "exec", "twfault-a"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "partition::act_as_initiator", "--nocapture"])
        .env(ROLE, format!("{near} {} {}", target.name, target.addr))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = initiator.stdin.take().unwrap();
    let mut lines = BufReader::new(initiator.stdout.take().unwrap()).lines();
    let mut read = |tag: &str| loop {
        let line = lines.next().expect("the initiator ended").unwrap();
        if let Some((_, rest)) = line.split_once(&format!("@{tag}")) {
            break rest.trim().to_owned();
        }
    };
    read("moving");
    let cut = Instant::now();
    assert!(netns(&["cut", NAME]).status.success());
    let error = read("failed");
    // The heartbeat timeout is one second; the batch that was under way may have been answered just before the cut.
    assert!(cut.elapsed() < Duration::from_secs(4), "{:?}: {error}", cut.elapsed());
    assert!(error.contains(&target.name), "{error}");
    assert!(netns(&["heal", NAME]).status.success());
    writeln!(stdin, "again").unwrap();
    read("moved");
    assert!(initiator.wait().unwrap().success());
}

/// Not a test of its own: the initiator inside its namespace.
#[test]
fn act_as_initiator() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let words: Vec<&str> = role.split_whitespace().collect();
    let [host, peer, addr] = words[..] else { panic!("{role}") };
    let addr: u64 = addr.parse().unwrap();
    let engine = TransferEngine::builder(host).config(config("tcp")).build().unwrap();
    let buffer = engine.allocate(LEN as usize, Location::Any).unwrap();
    let segment = engine.open_segment(peer).unwrap();
    let write = request(Opcode::Write, buffer.addr(), segment, addr, LEN);
    let limit = Duration::from_secs(30);
    let started = Instant::now();
    let error = loop {
        match engine.transfer_sync(&[write], limit) {
            Ok(_) if started.elapsed() < Duration::from_millis(200) => {}
            Ok(_) => println!("@moving"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.class(), ErrorClass::PeerDown, "{error}");
    println!("@failed {error}");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let outcome = engine.open_segment(peer).and_then(|segment| {
            engine.transfer_sync(&[request(Opcode::Write, buffer.addr(), segment, addr, LEN)], limit)
        });
        match outcome {
            Ok(_) => break println!("@moved"),
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    }
}
