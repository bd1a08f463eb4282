//! Every byte compared: what the initiator sent, what it got back, and (where this command started the target) what the
//! target itself holds.
//!
//! A benchmark is one-sided, so an arbitrary target cannot be asked. There, a pattern that depends on the place is
//! written, the own copy is wiped, and the target is read back. Which direction failed is then not known; with `--pair`
//! the target compares its own memory, and it is.

use tidewire_core::Opcode;

use super::{
    pair::Partner,
    rig::Rig,
    span::Span,
    worker::{Target, run_batch},
};
use crate::{error::CliError, pattern::Pattern};

/// Compares around one point.
#[derive(Debug)]
pub struct Checker<'a> {
    /// Own memory.
    pub rig: &'a Rig,
    /// The other side.
    pub target: &'a Target,
    /// The process behind it, where this command started it.
    pub partner: Option<&'a mut Partner>,
    /// Geometry of the point.
    pub span: Span,
    /// What the bytes should be.
    pub pattern: Pattern,
    /// How long a batch may take.
    pub patience: std::time::Duration,
}

impl Checker<'_> {
    /// Moves the pattern to the target and back, and leaves memory as the measurement of `opcode` needs it: for writes
    /// the pattern here and a blank target, for reads the other way round.
    ///
    /// # Errors
    /// [`CliError::Corrupt`], or the engine's.
    pub fn before(&mut self, opcode: Opcode) -> Result<(), CliError> {
        self.rig.fill(self.span, self.pattern)?;
        self.all(Opcode::Write)?;
        self.check_target()?;
        self.rig.blank(self.span)?;
        self.all(Opcode::Read)?;
        self.check_here("after reading the target back")?;
        self.rig.blank(self.span)?;
        if opcode == Opcode::Write {
            self.all(Opcode::Write)?;
            self.rig.fill(self.span, self.pattern)?;
        }
        Ok(())
    }

    /// Compares what the measurement of `opcode` moved.
    ///
    /// # Errors
    /// [`CliError::Corrupt`], or the engine's.
    pub fn after(&mut self, opcode: Opcode) -> Result<(), CliError> {
        if opcode == Opcode::Write {
            self.check_target()?;
            self.rig.blank(self.span)?;
            self.all(Opcode::Read)?;
        }
        self.check_here("after the measurement")
    }

    fn all(&self, opcode: Opcode) -> Result<(), CliError> {
        for thread in 0..self.span.threads {
            let target = self.target;
            let requests = self.rig.requests(self.span, thread, opcode, target.segment, &target.buffers);
            run_batch(&self.rig.engine, &requests, self.patience)?;
        }
        Ok(())
    }

    fn check_here(&self, when: &str) -> Result<(), CliError> {
        match self.rig.check(self.span, self.pattern)? {
            None => Ok(()),
            Some((place, mismatch)) => {
                Err(CliError::Corrupt { place: format!("the initiator's {place}, {when}"), mismatch })
            }
        }
    }

    fn check_target(&mut self) -> Result<(), CliError> {
        match self.partner.as_deref_mut() {
            None => Ok(()),
            Some(partner) => partner.check(self.span, self.pattern),
        }
    }
}
