//! Whether this machine has an etcd that the tests can use; shared by the test binaries that start one.

use std::process::Command;

/// Oldest release whose JSON gateway is under `/v3`.
const OLDEST: (u32, u32) = (3, 4);

/// Prints why tests with etcd cannot run, if they cannot.
pub fn skip() -> bool {
    let reason = match Command::new("etcd").arg("--version").output() {
        Err(error) => format!("etcd cannot be started: {error}"),
        Ok(output) => match release(&String::from_utf8_lossy(&output.stdout)) {
            Some(found) if found >= OLDEST => return false,
            Some((major, minor)) => format!("etcd {major}.{minor} is older than {}.{}", OLDEST.0, OLDEST.1),
            None => "etcd --version tells no version".to_owned(),
        },
    };
    println!("SKIP {reason}");
    true
}

/// Major and minor number in what `etcd --version` prints.
fn release(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.lines().find_map(|line| line.strip_prefix("etcd Version: "))?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[test]
fn the_release_is_read_from_the_first_line() {
    assert_eq!(release("etcd Version: 3.5.16\nGit SHA: f20bbad\n"), Some((3, 5)));
    assert_eq!(release("etcd Version: 3.3.25\n"), Some((3, 3)));
    assert_eq!(release("bash: etcd"), None);
}
