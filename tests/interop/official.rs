//! An official Mooncake engine in its own process, driven over a pipe.

use std::{
    ffi::OsString,
    fs,
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc::{Receiver, channel},
    },
    time::Duration,
};

use serde_json::{Value, json};

/// Longest time one call may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// The process; killed when dropped.
pub struct Official {
    child: Child,
    input: ChildStdin,
    answers: Receiver<String>,
    folder: PathBuf,
    /// Segment name: `127.0.0.1:<control port>`, or with a store a name of its own.
    pub name: String,
}

impl Official {
    /// Starts an engine with discovery by `metadata`; `None`, after saying why, if the release is not here.
    pub fn start(metadata: &str, environment: &[(&str, &str)]) -> Option<Self> {
        let venv = venv()?;
        // Unique in this process and over processes.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let unique = format!("interop-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(unique);
        fs::create_dir_all(&folder).unwrap();
        let mut child = Command::new(PathBuf::from(venv).join("bin/python"))
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/official.py"))
            .envs(environment.iter().copied())
            .env("MC_LOG_LEVEL", "ERROR")
            // With a store it would advertise the first interface otherwise.
            .env("MC_TCP_BIND_ADDRESS", "127.0.0.1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the interpreter of the environment starts");
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let input = child.stdin.take().unwrap();
        let mut official = Official { child, input, answers, folder, name: String::new() };
        let host = "127.0.0.1";
        official.name = match metadata {
            "P2PHANDSHAKE" => format!("{host}:{}", official.call(json!(["start", host, metadata]))),
            _ => {
                let name = format!("official-{}", std::process::id());
                official.call(json!(["start", name, metadata]));
                name
            }
        };
        Some(official)
    }

    /// Calls and waits for the value.
    pub fn call(&mut self, call: Value) -> Value {
        self.begin(&call);
        self.answer()
    }

    /// Waits for the value of a call begun before.
    pub fn answer(&mut self) -> Value {
        let line = self.answers.recv_timeout(PATIENCE).expect("the official engine answers");
        serde_json::from_str(&line).unwrap()
    }

    /// Calls and does not wait.
    pub fn begin(&mut self, call: &Value) {
        writeln!(self.input, "{call}").unwrap();
    }

    /// Allocates and registers; the address.
    pub fn register(&mut self, len: usize) -> u64 {
        self.call(json!(["register", len])).as_u64().unwrap()
    }

    /// Fills memory of the process.
    pub fn load(&mut self, addr: u64, bytes: &[u8]) {
        let path = self.folder.join("in");
        fs::write(&path, bytes).unwrap();
        self.call(json!(["load", addr, path]));
    }

    /// Memory of the process.
    pub fn dump(&mut self, addr: u64, len: usize) -> Vec<u8> {
        let path = self.folder.join("out");
        self.call(json!(["dump", addr, len, path]));
        fs::read(&path).unwrap()
    }

    /// Process id, for signals.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends the process at once.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Official {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Environment that holds the official release; `None`, after saying so, if there is none.
pub fn venv() -> Option<OsString> {
    let venv = std::env::var_os("TIDEWIRE_TEST_MOONCAKE_VENV");
    if venv.is_none() {
        println!("SKIP official Mooncake: TIDEWIRE_TEST_MOONCAKE_VENV is not set");
    }
    venv
}
