//! Runs a binary with a deadline, reads what it says, and sees that nothing of it is left behind.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// Longest a command of these tests may take.
const LIMIT: Duration = Duration::from_secs(120);
/// Marks every process that a test starts, children of children included.
const MARK: &str = "TIDEWIRE_TEST_MARK";

pub const TOOL: &str = env!("CARGO_BIN_EXE_tidewire");
pub const BENCH: &str = env!("CARGO_BIN_EXE_transfer_engine_bench");

/// A command under way. Dropping it kills it; [`Run::end`] also sees that it left nothing behind.
pub struct Run {
    child: Child,
    lines: Receiver<(Stream, String)>,
    mark: String,
    out: String,
    err: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Out,
    Err,
}

/// What a command ended with.
pub struct Ended {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

impl Ended {
    /// Fails the test with everything that was said unless the exit status is `code`.
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.status.code(), Some(code), "{}\nstdout:\n{}\nstderr:\n{}", self.status, self.out, self.err);
        self
    }

    /// Whether the kernel does not let processes copy each other's memory; says so. Any other failure is not that.
    pub fn is_refused_by_the_kernel(&self) -> bool {
        let refusal = |line: &&str| line.contains("process_vm_readv: Operation not permitted");
        match self.err.lines().find(refusal) {
            Some(line) if self.status.code() == Some(1) => println!("\nSKIP cma: {line}"),
            _ => return false,
        }
        true
    }
}

pub fn start(program: &str, arguments: &[&str]) -> Run {
    start_with(program, arguments, &[])
}

pub fn start_with(program: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Run {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mark = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let mut command = Command::new(program);
    command.args(arguments).env(MARK, &mark).envs(environment.iter().copied());
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start the binary");
    let (sender, lines) = mpsc::channel();
    let pump = |stream, pipe: Box<dyn Read + Send>| {
        let sender = sender.clone();
        thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                let _ = sender.send((stream, line));
            }
        });
    };
    pump(Stream::Out, Box::new(child.stdout.take().unwrap()));
    pump(Stream::Err, Box::new(child.stderr.take().unwrap()));
    Run { child, lines, mark, out: String::new(), err: String::new() }
}

/// Runs to the end.
pub fn run(program: &str, arguments: &[&str]) -> Ended {
    start(program, arguments).end()
}

impl Run {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Reads until a line contains `text`; that line.
    pub fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok((stream, line)) => {
                    self.keep(stream, &line);
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(_) => panic!("no line with {text:?}\nstdout:\n{}\nstderr:\n{}", self.out, self.err),
            }
        }
    }

    /// Sends a signal to the process alone.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for the end, and for the end of every process that it started.
    pub fn end(mut self) -> Ended {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((stream, line)) => self.keep(stream, &line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("still running after {LIMIT:?}\nstdout:\n{}\nstderr:\n{}", self.out, self.err)
                }
            }
        }
        let status = self.child.wait().unwrap();
        let left = self.left_behind(Instant::now() + Duration::from_secs(5));
        assert!(left.is_empty(), "left behind: {left:?}");
        Ended { status, out: std::mem::take(&mut self.out), err: std::mem::take(&mut self.err) }
    }

    /// Processes of this command other than itself, now.
    pub fn others(&self) -> Vec<u32> {
        marked(&self.mark).into_iter().filter(|pid| *pid != self.pid()).collect()
    }

    /// Processes with the mark that are still there at `deadline`.
    pub fn left_behind(&self, deadline: Instant) -> Vec<u32> {
        loop {
            let left = self.others();
            if left.is_empty() || Instant::now() >= deadline {
                return left;
            }
            thread::yield_now();
        }
    }

    fn keep(&mut self, stream: Stream, line: &str) {
        let text = if stream == Stream::Out { &mut self.out } else { &mut self.err };
        text.push_str(line);
        text.push('\n');
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Processes, zombies excluded, whose environment has the mark.
fn marked(mark: &str) -> Vec<u32> {
    let wanted = format!("{MARK}={mark}");
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    // A zombie's environment reads as empty.
    let has_mark = |pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
    };
    pids.filter(has_mark).collect()
}

/// A path in the folder for test files that no other test uses.
pub fn scratch(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("cli");
    fs::create_dir_all(&folder).unwrap();
    folder.join(format!("{}-{name}", std::process::id()))
}
