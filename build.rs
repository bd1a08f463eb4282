//! Records the commit the tool was built from, for `tidewire --version`.

use std::{path::Path, process::Command};

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // HEAD usually names a branch and stays the same from commit to commit; its log does not. Both lie elsewhere in a
    // linked worktree. A path that does not exist would run this script, and build the tool, every time.
    for name in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", name]).filter(|path| Path::new(path).exists()) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    let commit = git(&["rev-parse", "--short=10", "HEAD"]);
    println!("cargo::rustc-env=TIDEWIRE_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
}
