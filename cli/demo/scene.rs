//! Prefill and decode on stage: starts the two processes and lets them move the pages once per direction.

use std::time::Duration;

use super::{
    protocol::{Command, Direction, Pages, Reply, Setup},
    report::Row,
};
use crate::{child::Child, error::CliError, stop::Stop};

/// Role name of both processes.
pub const ROLE: &str = "demo";
/// Seeds of the two page tables.
const PREFILL_TABLE: u64 = 0x51;
const DECODE_TABLE: u64 = 0xd3;
/// How long a process may take to fill or compare all its memory.
const PATIENCE: Duration = Duration::from_secs(600);
/// Blocks that are moved one at a time for the latency.
const SAMPLE_BLOCKS: u32 = 512;

/// The two processes.
#[derive(Debug)]
pub struct Scene {
    prefill: Actor,
    decode: Actor,
    stop: Stop,
    batch_patience: Duration,
}

#[derive(Debug)]
struct Actor {
    name: &'static str,
    child: Child,
    pages: Option<Pages>,
}

impl Scene {
    /// Starts both processes; returns when prefill's pages are filled and decode's are blank.
    ///
    /// `setup` is that of prefill; decode's differs in name, content and page table.
    ///
    /// # Errors
    /// [`CliError::Child`] with what a process said, [`CliError::Interrupted`].
    pub fn start(setup: &Setup, environment: &[(&str, &str)], stop: &Stop) -> Result<Self, CliError> {
        let actor = |name| Ok(Actor { name, child: Child::start(ROLE, environment)?, pages: None });
        let mut scene = Scene {
            prefill: actor("prefill")?,
            decode: actor("decode")?,
            stop: stop.clone(),
            batch_patience: Duration::from_millis(setup.timeout_ms) + Duration::from_secs(30),
        };
        let name =
            |role: &str| if setup.name.is_empty() { "127.0.0.1".to_owned() } else { format!("{}-{role}", setup.name) };
        let prefill = Setup { name: name("prefill"), filled: true, seed: PREFILL_TABLE, ..setup.clone() };
        let decode = Setup { name: name("decode"), filled: false, seed: DECODE_TABLE, ..setup.clone() };
        scene.prefill.child.send(&Command::Start(prefill))?;
        scene.decode.child.send(&Command::Start(decode))?;
        for actor in [&mut scene.prefill, &mut scene.decode] {
            match actor.hear(PATIENCE, stop)? {
                Reply::Ready(pages) => actor.pages = Some(pages),
                other => return Err(actor.surprised(&other)),
            }
        }
        Ok(scene)
    }

    /// Who is on stage, in one line.
    pub fn cast(&self) -> String {
        let line = |actor: &Actor| {
            let segment = actor.pages.as_ref().map_or("", |pages| &pages.segment);
            format!("{} {segment} (pid {})", actor.name, actor.child.pid())
        };
        format!("{}, {}", line(&self.prefill), line(&self.decode))
    }

    /// Moves every page in `direction`, compares both sides, and says how it went.
    ///
    /// # Errors
    /// [`CliError::Corrupt`] and [`CliError::Differs`] when a byte, the checksum or the notification is wrong.
    pub fn play(&mut self, direction: Direction, mut progress: impl FnMut(u64)) -> Result<Row, CliError> {
        let (stop, patience) = (self.stop.clone(), self.batch_patience);
        let (starter, other) = match direction {
            Direction::Write => (&mut self.prefill, &mut self.decode),
            Direction::Read => (&mut self.decode, &mut self.prefill),
        };
        let Some(peer) = other.pages.clone() else { return Err(CliError::Interrupted) };
        let sample = Command::Sample { peer: peer.clone(), direction, blocks: SAMPLE_BLOCKS };
        let (p50_us, p99_us, sampled) = match starter.ask(&sample, PATIENCE, &stop)? {
            Reply::Sampled { p50_us, p99_us, blocks } => (p50_us, p99_us, blocks),
            answer => return Err(starter.surprised(&answer)),
        };
        let receiver = if direction == Direction::Write { &mut *other } else { &mut *starter };
        receiver.ask(&Command::Wipe, PATIENCE, &stop)?;

        let cpu_before = starter.cpu(&stop)? + other.cpu(&stop)?;
        let message = format!("pages moved by {direction:?}");
        starter.child.send(&Command::Move { peer, direction, message: message.clone() })?;
        let (bytes, seconds, transport, reason) = loop {
            match starter.hear(patience, &stop)? {
                Reply::Progress { bytes } => progress(bytes),
                Reply::Moved { bytes, seconds, transport, reason } => break (bytes, seconds, transport, reason),
                answer => return Err(starter.surprised(&answer)),
            }
        };
        let cpu_s = starter.cpu(&stop)? + other.cpu(&stop)? - cpu_before;
        match other.ask(&Command::Notifications, PATIENCE, &stop)? {
            Reply::Notified { messages } if messages == [message.clone()] => {}
            Reply::Notified { messages } => {
                let (expected, found) = (format!("{:?}", [message]), format!("{messages:?}"));
                return Err(CliError::Differs { what: "notification", expected, found });
            }
            answer => return Err(other.surprised(&answer)),
        }
        let (source_crc, target_crc) = self.verify()?;
        Ok(Row { direction, transport, reason, bytes, seconds, sampled, p50_us, p99_us, cpu_s, source_crc, target_crc })
    }

    /// Lets both compare their memory; the checksums of prefill and decode.
    fn verify(&mut self) -> Result<(u32, u32), CliError> {
        self.prefill.child.send(&Command::Verify)?;
        self.decode.child.send(&Command::Verify)?;
        let mut sums = [0; 2];
        for (sum, actor) in sums.iter_mut().zip([&mut self.prefill, &mut self.decode]) {
            match actor.hear(PATIENCE, &self.stop)? {
                Reply::Verified { crc32c, wrong: None } => *sum = crc32c,
                Reply::Verified { wrong: Some((place, mismatch)), .. } => {
                    return Err(CliError::Corrupt { place: format!("{}'s memory, {place}", actor.name), mismatch });
                }
                answer => return Err(actor.surprised(&answer)),
            }
        }
        let [prefill, decode] = sums;
        if prefill != decode {
            let (expected, found) = (format!("{prefill:08x} (prefill)"), format!("{decode:08x} (decode)"));
            return Err(CliError::Differs { what: "checksum", expected, found });
        }
        Ok((prefill, decode))
    }

    /// Lets decode write what arrived to a file.
    ///
    /// # Errors
    /// [`CliError::Child`].
    pub fn save(&mut self, path: &std::path::Path) -> Result<(), CliError> {
        let stop = self.stop.clone();
        self.decode.ask(&Command::Save { path: path.to_owned() }, PATIENCE, &stop).map(drop)
    }

    /// Ends both in order; dropping ends them too.
    ///
    /// # Errors
    /// [`CliError::Child`] when one is gone already.
    pub fn end(mut self) -> Result<(), CliError> {
        self.prefill.child.send(&Command::Stop)?;
        self.decode.child.send(&Command::Stop)?;
        self.prefill.child.wait_end()?;
        self.decode.child.wait_end()
    }
}

impl Actor {
    fn ask(&mut self, command: &Command, patience: Duration, stop: &Stop) -> Result<Reply, CliError> {
        self.child.send(command)?;
        self.hear(patience, stop)
    }

    fn hear(&mut self, patience: Duration, stop: &Stop) -> Result<Reply, CliError> {
        match self.child.receive(patience, stop) {
            Ok(Reply::Failed { message, hint }) => Err(self.error(message, hint)),
            Err(CliError::Child { message, hint, .. }) => Err(self.error(message, hint)),
            answer => answer,
        }
    }

    fn cpu(&mut self, stop: &Stop) -> Result<f64, CliError> {
        match self.ask(&Command::Cpu, PATIENCE, stop)? {
            Reply::Cpu { seconds } => Ok(seconds),
            answer => Err(self.surprised(&answer)),
        }
    }

    fn error(&self, message: String, hint: String) -> CliError {
        CliError::Child { role: self.name.to_owned(), message, hint }
    }

    fn surprised(&self, answer: &Reply) -> CliError {
        self.error(format!("unexpected answer {answer:?}"), String::new())
    }
}
