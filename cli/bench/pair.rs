//! The target of `bench --pair`: a second process of this command, and the parent's handle on it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{
    flags::{BIND_SETTING, P2P, Protocol},
    rig::{Rig, RigOptions},
    span::Span,
};
use crate::{
    child::{Child, Commands, reply},
    cpu,
    error::CliError,
    pattern::{Mismatch, Pattern},
    stop::Stop,
};

/// Role name of the child.
pub const ROLE: &str = "bench-target";
/// How long the target may take to start: it touches all its memory.
const START: Duration = Duration::from_secs(120);
/// How long it may take to answer anything else.
const ANSWER: Duration = Duration::from_secs(300);

/// What the parent says.
#[derive(Debug, Serialize, Deserialize)]
enum Command {
    /// Start the engine.
    Start { name: String, metadata: String, protocol: Protocol, buffer_bytes: u64, spin_us: Option<u64> },
    /// Compare memory.
    Check { span: Span, pattern: Pattern },
    /// Tell the CPU time so far.
    Cpu,
    /// End.
    Stop,
}

/// What the child answers.
#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    /// Started, under this segment name.
    Ready { segment: String },
    /// Compared; the first difference.
    Checked { difference: Option<(String, Mismatch)> },
    /// CPU time in seconds.
    Cpu { seconds: f64 },
    /// It did not work.
    Failed { message: String, hint: String },
}

/// The target process, from the initiator's side.
#[derive(Debug)]
pub struct Partner {
    child: Child,
    segment: String,
    stop: Stop,
}

impl Partner {
    /// Starts a target; returns when its memory can be reached.
    ///
    /// # Errors
    /// [`CliError::Child`] with what the target said.
    pub fn start(options: &RigOptions, stop: &Stop) -> Result<Self, CliError> {
        // Beside its initiator on one host, whatever its name is.
        let bind = (options.metadata != P2P && std::env::var_os(BIND_SETTING).is_none())
            .then_some((BIND_SETTING, "127.0.0.1"));
        let environment: Vec<_> = bind.into_iter().collect();
        let mut partner =
            Partner { child: Child::start(ROLE, &environment)?, segment: String::new(), stop: stop.clone() };
        let start = Command::Start {
            name: options.name.clone(),
            metadata: options.metadata.clone(),
            protocol: options.protocol,
            buffer_bytes: options.buffer_bytes,
            spin_us: options.spin.map(|spin| spin.as_micros() as u64),
        };
        match partner.ask(&start, START)? {
            Reply::Ready { segment } => partner.segment = segment,
            other => return Err(partner.surprised(&other)),
        }
        Ok(partner)
    }

    /// Name to open.
    pub fn segment(&self) -> &str {
        &self.segment
    }

    /// Lets the target compare its memory.
    ///
    /// # Errors
    /// [`CliError::Corrupt`].
    pub fn check(&mut self, span: Span, pattern: Pattern) -> Result<(), CliError> {
        match self.ask(&Command::Check { span, pattern }, ANSWER)? {
            Reply::Checked { difference: None } => Ok(()),
            Reply::Checked { difference: Some((place, mismatch)) } => {
                Err(CliError::Corrupt { place: format!("the target's {place}, after it was written"), mismatch })
            }
            other => Err(self.surprised(&other)),
        }
    }

    /// CPU time that the target has used, in seconds.
    ///
    /// # Errors
    /// [`CliError::Child`].
    pub fn cpu_seconds(&mut self) -> Result<f64, CliError> {
        match self.ask(&Command::Cpu, ANSWER)? {
            Reply::Cpu { seconds } => Ok(seconds),
            other => Err(self.surprised(&other)),
        }
    }

    /// Ends the target in order; dropping ends it too, with less patience.
    ///
    /// # Errors
    /// [`CliError::Child`] when it is gone already.
    pub fn end(mut self) -> Result<(), CliError> {
        self.child.send(&Command::Stop)?;
        self.child.wait_end()
    }

    fn ask(&mut self, command: &Command, patience: Duration) -> Result<Reply, CliError> {
        self.child.send(command)?;
        // An answer that is under way is waited for, so that a stopped run still ends with what was measured.
        let never = Stop::new();
        let stop = if matches!(command, Command::Start { .. }) { &self.stop } else { &never };
        match self.child.receive(patience, stop)? {
            Reply::Failed { message, hint } => Err(CliError::Child { role: "target".to_owned(), message, hint }),
            answer => Ok(answer),
        }
    }

    fn surprised(&self, answer: &Reply) -> CliError {
        let message = format!("unexpected answer {answer:?}");
        CliError::Child { role: self.child.role().to_owned(), message, hint: String::new() }
    }
}

/// The child's side: does what it is told until told to stop.
///
/// # Errors
/// Only when the parent cannot be answered; everything else is answered.
pub fn serve() -> Result<(), CliError> {
    let commands = Commands::listen()?;
    let mut rig = None;
    loop {
        let answer = match commands.receive()? {
            Command::Stop => break,
            Command::Start { name, metadata, protocol, buffer_bytes, spin_us } => {
                let options = RigOptions {
                    name,
                    metadata,
                    protocol,
                    buffer_bytes,
                    mooncake_port: protocol == Protocol::MooncakeTcp,
                    spin: spin_us.map(Duration::from_micros),
                };
                Rig::start(&options).map(|started| {
                    let segment = started.engine.segment_name().to_owned();
                    rig = Some(started);
                    Reply::Ready { segment }
                })
            }
            Command::Check { span, pattern } => match &rig {
                Some(rig) => rig.check(span, pattern).map(|difference| Reply::Checked { difference }),
                None => Err(CliError::usage("not started", "")),
            },
            Command::Cpu => Ok(Reply::Cpu { seconds: cpu::process_seconds() }),
        };
        reply(&answer.unwrap_or_else(|error| Reply::Failed { message: error.to_string(), hint: error.hint() }))?;
    }
    if let Some(rig) = rig {
        rig.shutdown();
    }
    Ok(())
}
