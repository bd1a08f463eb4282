//! The examples do what they say. A run of the whole suite builds them beside the tests.

use std::process::Command;

/// Runs an example; what it prints. `None`, after saying so, if it was not built with this test.
fn output(name: &str) -> Option<String> {
    let own = std::env::current_exe().unwrap();
    let program = own.parent().unwrap().parent().unwrap().join("examples").join(name);
    if !program.exists() {
        println!("SKIP example {name}: not built (cargo build --package tidewire-engine --examples)");
        return None;
    }
    let output = Command::new(program).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\nstdout:\n{out}\nstderr:\n{err}", output.status);
    Some(out.into_owned())
}

#[test]
fn p2p_write_delivers_bytes_and_notification() {
    let Some(out) = output("p2p_write") else { return };
    assert!(out.contains("16777216 bytes over ") && out.contains("\"hello\" arrived, 1 notification"), "{out}");
}

#[test]
fn async_batch_completes_every_batch() {
    let Some(out) = output("async_batch") else { return };
    assert_eq!(out.matches("1048576 bytes\n").count(), 8, "{out}");
    assert!(out.ends_with("the last byte is 42\n"), "{out}");
}

#[test]
fn eventfd_becomes_readable() {
    let Some(out) = output("eventfd") else { return };
    assert_eq!(out, "1 descriptor is readable, 33554432 bytes were read\n");
}
