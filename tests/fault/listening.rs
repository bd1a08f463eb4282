//! What an engine listens on: nothing but the address it was given, whatever port it is.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use tidewire_engine::{Config, TransferEngine};

use super::flood::descriptor;

const ROLE: &str = "TIDEWIRE_FAULT_LISTENER";

/// Listening TCP sockets of this network namespace: local address in the kernel's hexadecimal form, by inode.
fn listening() -> HashMap<u64, String> {
    const LISTEN: &str = "0A";
    let mut found = HashMap::new();
    for table in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
        // A kernel without IPv6 has no second table.
        for line in std::fs::read_to_string(table).unwrap_or_default().lines().skip(1) {
            let words: Vec<_> = line.split_whitespace().collect();
            if words[3] == LISTEN {
                found.insert(words[9].parse().unwrap(), words[1].to_owned());
            }
        }
    }
    found
}

/// Inodes of the sockets of a process.
fn sockets(pid: u32) -> Vec<u64> {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = files.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok());
    links.filter_map(|link| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()).collect()
}

#[test]
fn an_engine_listens_on_its_own_address_only_and_not_for_mooncake_unless_told() {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "listening::act_as_engine", "--nocapture"])
        .env(ROLE, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let ready = output.lines().map(Result::unwrap).find_map(|line| line.strip_prefix("@ready ").map(str::to_owned));
    let ready = ready.expect("the engine starts");
    let words: Vec<_> = ready.split_whitespace().collect();
    let [name, control, native, mooncake] = words[..] else { panic!("{ready}") };
    let (table, own) = (listening(), sockets(child.id()));
    let addresses: Vec<&String> = own.iter().filter_map(|inode| table.get(inode)).collect();
    let descriptor = descriptor(name);
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());

    let expected = [control, native].map(|port| format!("0100007F:{:04X}", port.parse::<u16>().unwrap()));
    for address in &addresses {
        assert!(address.starts_with("0100007F:"), "listens on {address}");
        assert!(expected.contains(address), "{address} is neither the control nor the native port");
    }
    assert_eq!(addresses.len(), 2, "{addresses:?}");
    assert_eq!((mooncake, descriptor.tcp_data_port), ("0", 0));
    assert_eq!(descriptor.tidewire.unwrap().data_port.to_string(), native);
}

/// Not a test of its own: an engine with default settings.
#[test]
fn act_as_engine() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let engine = TransferEngine::builder("127.0.0.1").config(Config::default()).build().unwrap();
    let status = engine.status();
    println!("\n@ready {} {} {} {}", engine.segment_name(), engine.rpc_port(), status.data_port, status.mooncake_port);
    std::io::stdin().lines().for_each(drop);
    drop(engine);
    // Nobody reads what libtest would print now.
    std::process::exit(0);
}
