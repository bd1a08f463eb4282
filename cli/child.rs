//! Second processes of a command: the same binary again, in a role, spoken to in lines of JSON.
//!
//! A role is an argument that starts with `__`; it never shows in `--help`. Commands go down the child's stdin, replies
//! come up its stdout, its stderr is the parent's.
//!
//! Invariant: no child outlives its parent. Three things see to it: [`Child`] ends it on drop, the kernel kills it when
//! the parent's thread ends (`PR_SET_PDEATHSIG`), and the end of its stdin ends it. A child is in a process group of its
//! own, so that Ctrl-C at a terminal reaches the parent only, which ends the child in order.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Signal, set_parent_process_death_signal};
use serde::{Serialize, de::DeserializeOwned};

use crate::{error::CliError, logging, stop::Stop};

/// How long a child may take to end by itself.
const GRACE: Duration = Duration::from_secs(5);
/// How often a wait for a reply looks for a stop.
const TICK: Duration = Duration::from_millis(50);
/// Exit status of a child whose parent went away.
const ORPHANED: i32 = 3;

/// A running child, from the parent's side.
#[derive(Debug)]
pub struct Child {
    role: String,
    process: std::process::Child,
    replies: mpsc::Receiver<String>,
}

impl Child {
    /// Starts this binary in `role` with extra environment variables.
    ///
    /// Call it from a thread that lives as long as the child shall.
    ///
    /// # Errors
    /// [`CliError::Io`] when the process cannot be started.
    pub fn start(role: &str, environment: &[(&str, &str)]) -> Result<Self, CliError> {
        let program = std::env::current_exe().map_err(CliError::io("finding the path of this program"))?;
        let mut process = Command::new(program)
            .arg(format!("__{role}"))
            .envs(environment.iter().copied().chain(logging::for_child()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(CliError::io(format!("starting the {role} process")))?;
        let (sender, replies) = mpsc::channel();
        let stdout = process.stdout.take();
        let child = Child { role: role.to_owned(), process, replies };
        if let Some(stdout) = stdout {
            let read = move || {
                let lines = BufReader::new(stdout).lines().map_while(Result::ok);
                // A failed send means that nobody asks any more.
                lines.map(|line| sender.send(line)).take_while(Result::is_ok).for_each(drop);
            };
            thread::Builder::new()
                .name(format!("tw-{role}"))
                .spawn(read)
                .map_err(CliError::io("starting a thread that reads replies"))?;
        }
        Ok(child)
    }

    /// Name of the role.
    pub fn role(&self) -> &str {
        &self.role
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Sends one command.
    ///
    /// # Errors
    /// [`CliError::Child`] when the process is gone.
    pub fn send(&mut self, command: &impl Serialize) -> Result<(), CliError> {
        let sent = serde_json::to_string(command).map_err(io::Error::from).and_then(|line| {
            let stdin = self.process.stdin.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
            stdin.write_all(format!("{line}\n").as_bytes())
        });
        sent.map_err(|error| self.failed(&format!("cannot be told what to do: {error}")))
    }

    /// The next reply. Blocks, at most for `patience`.
    ///
    /// # Errors
    /// [`CliError::Child`] when the process ended, says something else or says nothing; [`CliError::Interrupted`].
    pub fn receive<R: DeserializeOwned>(&mut self, patience: Duration, stop: &Stop) -> Result<R, CliError> {
        let deadline = Instant::now() + patience;
        loop {
            match self.replies.recv_timeout(TICK) {
                Ok(line) => {
                    return serde_json::from_str(&line).map_err(|_| self.failed(&format!("said {line:?}")));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.ended()),
                Err(RecvTimeoutError::Timeout) if stop.is_requested() => return Err(CliError::Interrupted),
                Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                    return Err(self.failed(&format!("no answer for {} s", patience.as_secs())));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn failed(&self, message: &str) -> CliError {
        CliError::Child { role: self.role.clone(), message: message.to_owned(), hint: String::new() }
    }

    fn ended(&mut self) -> CliError {
        match self.process.wait() {
            Ok(status) => self.failed(&format!("ended early ({status})")),
            Err(error) => self.failed(&format!("ended early ({error})")),
        }
    }

    /// Waits until a child that was told to end has done so; dropping it then has nothing to do.
    ///
    /// # Errors
    /// [`CliError::Child`] when it takes too long, or ended otherwise than well.
    pub fn wait_end(mut self) -> Result<(), CliError> {
        if !self.wait_silence() {
            return Err(self.failed(&format!("did not end within {} s", GRACE.as_secs())));
        }
        match self.process.wait() {
            Ok(status) if status.success() => Ok(()),
            _ => Err(self.ended()),
        }
    }

    /// Waits until the child's stdout ends, as it does with the child; whether it did.
    fn wait_silence(&self) -> bool {
        let deadline = Instant::now() + GRACE;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            if let Err(RecvTimeoutError::Disconnected) = self.replies.recv_timeout(left) {
                return true;
            }
        }
        false
    }

    /// Ends the process at once: closes its stdin, and kills it if that does not help.
    fn end(&mut self) {
        drop(self.process.stdin.take());
        self.wait_silence();
        // Fails only if the process has ended, which is what is wanted.
        let _ = self.process.kill();
        if let Err(error) = self.process.wait() {
            tracing::warn!(role = self.role, %error, "cannot wait for a child");
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.end();
    }
}

/// What a child reads: commands, until the parent goes away.
#[derive(Debug)]
pub struct Commands {
    lines: mpsc::Receiver<String>,
}

impl Commands {
    /// Ties this process to its parent and starts to read commands.
    ///
    /// From here on the process ends with [`ORPHANED`] as soon as its stdin ends, whatever it does at that moment: what
    /// it holds (sockets, shared memory) goes with it.
    ///
    /// # Errors
    /// [`CliError::Io`] when the kernel refuses, or the thread cannot be started.
    pub fn listen() -> Result<Self, CliError> {
        set_parent_process_death_signal(Some(Signal::KILL))
            .map_err(|errno| CliError::io("tying this process to its parent")(errno.into()))?;
        let (sender, lines) = mpsc::channel();
        let read = move || {
            let input = io::stdin().lock().lines().map_while(Result::ok);
            input.map(|line| sender.send(line)).take_while(Result::is_ok).for_each(drop);
            std::process::exit(ORPHANED);
        };
        thread::Builder::new()
            .name("tw-commands".to_owned())
            .spawn(read)
            .map_err(CliError::io("starting the thread that reads commands"))?;
        Ok(Commands { lines })
    }

    /// The next command. Blocks.
    ///
    /// # Errors
    /// [`CliError::Usage`] when a line is no command: a role is started by hand.
    pub fn receive<C: DeserializeOwned>(&self) -> Result<C, CliError> {
        let line = self.lines.recv().map_err(|_| CliError::Interrupted)?;
        serde_json::from_str(&line).map_err(|error| {
            CliError::usage(format!("bad command {line:?}: {error}"), "roles are started by `demo` and `bench` only")
        })
    }
}

/// Answers the parent.
///
/// # Errors
/// [`CliError::Io`] when the parent is gone.
pub fn reply(message: &impl Serialize) -> Result<(), CliError> {
    let line = serde_json::to_string(message).map_err(io::Error::from);
    let written = line.and_then(|line| {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{line}")?;
        stdout.flush()
    });
    written.map_err(CliError::io("answering the parent process"))
}
