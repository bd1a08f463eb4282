//! Waits until a process that was sent SIGSTOP has stopped: the signal takes effect some time after it was sent.

use std::time::{Duration, Instant};

/// Returns once every thread of the process stands.
pub fn wait_stopped(pid: u32) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let running = || {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        let states = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok());
        states.filter(|stat| !stat.contains(") T ")).count()
    };
    while running() > 0 {
        assert!(Instant::now() < deadline, "process {pid} does not stop");
        std::thread::yield_now();
    }
}
