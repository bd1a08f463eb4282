//! Records the commit the tool was built from, for `tidewire --version`.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=.git/HEAD");
    let commit = Command::new("git").args(["rev-parse", "--short=10", "HEAD"]).output();
    let text = commit.ok().filter(|o| o.status.success()).and_then(|o| String::from_utf8(o.stdout).ok());
    println!("cargo::rustc-env=TIDEWIRE_COMMIT={}", text.as_deref().unwrap_or("unknown").trim());
}
