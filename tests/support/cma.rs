//! Whether processes may copy each other's memory here, found out by doing it; shared by the test binaries that have
//! children.
//!
//! A seccomp filter may forbid the call altogether, yama a call towards a process that is no child. Test processes allow
//! everybody to trace them, so that only what cannot be helped is left. A binary includes this file as its module `cma`:
//! the probe's child is this binary again, with the test of that name.

use std::{
    io::{self, BufRead, BufReader, Read},
    process::{Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::process::{PTracer, set_ptracer};

const PROBE: &str = "TIDEWIRE_TEST_CMA_PROBE";
const VALUE: u64 = 0x7469_6465_7769_7265;
static WORD: AtomicU64 = AtomicU64::new(VALUE);

/// Lets any process of this user trace this one, where yama asks for that. Children of tests call it first.
pub fn allow() {
    // Fails where there is no yama, which forbids nothing then.
    let _ = set_ptracer(PTracer::Any);
}

/// Prints why `what` is not tested, if memory of processes may not be copied here. Probed once per process.
pub fn skip(what: &str) -> bool {
    static FORBIDDEN: OnceLock<Option<String>> = OnceLock::new();
    let forbidden = FORBIDDEN.get_or_init(|| probe().err());
    if let Some(reason) = forbidden {
        println!("\nSKIP cma: {what}: {reason}");
    }
    forbidden.is_some()
}

fn probe() -> Result<(), String> {
    allow();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cma::act_as_probe", "--nocapture"])
        .env(PROBE, format!("{} {}", std::process::id(), WORD.as_ptr() as u64))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdin = child.stdin.take();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let said = lines.find_map(|line| Some(line.strip_prefix("@cma ")?.to_owned())).expect("the probe's child ended");
    let (addr, upwards) = said.split_once(' ').unwrap();
    let downwards = read_word(child.id(), addr.parse().unwrap());
    drop(stdin);
    lines.for_each(drop);
    assert!(child.wait().unwrap().success());
    downwards.map_err(|error| format!("process_vm_readv of a child: {error}"))?;
    if upwards == "ok" { Ok(()) } else { Err(format!("process_vm_readv of the parent: {upwards}")) }
}

/// Reads the word at `addr` of a process and sees that it is the one that both have.
fn read_word(pid: u32, addr: u64) -> io::Result<()> {
    let mut word = 0u64;
    let local = libc::iovec { iov_base: (&raw mut word).cast(), iov_len: 8 };
    let remote = libc::iovec { iov_base: addr as *mut libc::c_void, iov_len: 8 };
    // SAFETY: the local vector is `word`, alive and writable; the kernel checks the remote one.
    let moved = unsafe { libc::process_vm_readv(pid as i32, &raw const local, 1, &raw const remote, 1, 0) };
    match moved {
        8 if word == VALUE => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        _ => Err(io::Error::other("the process id means another process")),
    }
}

/// Not a test of its own: the probe's child.
#[test]
fn act_as_probe() {
    let Ok(parent) = std::env::var(PROBE) else { return };
    allow();
    let (pid, addr) = parent.split_once(' ').unwrap();
    let read = read_word(pid.parse().unwrap(), addr.parse().unwrap());
    let said = read.map_or_else(|error| error.to_string(), |()| "ok".to_owned());
    println!("\n@cma {} {said}", WORD.as_ptr() as u64);
    // Until the parent has read as well.
    let _ = io::stdin().read(&mut [0]);
    assert_eq!(WORD.load(Ordering::Relaxed), VALUE);
}
