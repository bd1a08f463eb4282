//! The processes of the demo, prefill and decode: each does what its parent says. Which is which, only the setup tells.

use super::{
    pool::Pool,
    protocol::{Command, Reply},
};
use crate::{
    child::{Commands, reply},
    cpu,
    error::CliError,
};

/// Serves until told to stop.
///
/// # Errors
/// Only when the parent cannot be answered; everything else is answered.
pub fn serve() -> Result<(), CliError> {
    let commands = Commands::listen()?;
    let mut pool = None;
    loop {
        let command = commands.receive()?;
        if let Command::Stop = command {
            break;
        }
        let answer = obey(&mut pool, command);
        reply(&answer.unwrap_or_else(|error| Reply::Failed { message: error.to_string(), hint: error.hint() }))?;
    }
    if let Some(pool) = pool {
        pool.shutdown();
    }
    Ok(())
}

fn obey(pool: &mut Option<Pool>, command: Command) -> Result<Reply, CliError> {
    if let Command::Start(setup) = &command {
        let started = Pool::start(setup)?;
        let pages = started.pages();
        *pool = Some(started);
        return Ok(Reply::Ready(pages));
    }
    let Some(pool) = pool else { return Err(CliError::usage("not started", "")) };
    match command {
        Command::Sample { peer, direction, blocks } => pool.sample(&peer, direction, blocks),
        Command::Move { peer, direction, message } => {
            pool.transfer(&peer, direction, &message, |bytes| reply(&Reply::Progress { bytes }))
        }
        Command::Wipe => pool.wipe().map(|()| Reply::Done),
        Command::Notifications => Ok(Reply::Notified { messages: pool.notifications() }),
        Command::Verify => pool.verify().map(|(crc32c, wrong)| Reply::Verified { crc32c, wrong }),
        Command::Save { path } => pool.save(&path).map(|()| Reply::Done),
        Command::Cpu => Ok(Reply::Cpu { seconds: cpu::process_seconds() }),
        Command::Start(_) | Command::Stop => Ok(Reply::Done),
    }
}
