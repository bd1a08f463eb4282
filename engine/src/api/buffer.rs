//! Memory that the engine allocates, registered from birth to drop.

use std::sync::Arc;

use tidewire_core::TransferError;

use super::engine::EngineInner;
use crate::memory::alloc::SharedAllocation;

/// Registered memory of the engine. Same-host peers map it; others reach it like any registered memory.
///
/// Reads and writes here are plain copies. Peers may write at the same time: who reads what when is for the application
/// to settle, by notifications. Dropping it unregisters; if something still uses it then, the memory is leaked and a
/// warning logged.
#[derive(Debug)]
pub struct Buffer {
    engine: Arc<EngineInner>,
    memory: Option<Arc<SharedAllocation>>,
    addr: u64,
    len: usize,
}

impl Buffer {
    pub(crate) fn new(engine: Arc<EngineInner>, memory: Arc<SharedAllocation>) -> Self {
        let (addr, len) = (memory.addr(), memory.len());
        Buffer { engine, memory: Some(memory), addr, len }
    }

    /// Address of the first byte; what peers use as target offset.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Length in bytes, at least 1.
    #[allow(clippy::len_without_is_empty, reason = "a buffer is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    /// [`TransferError::SourceNotRegistered`] when that leaves the buffer; nothing is copied then.
    pub fn write_at(&self, offset: usize, bytes: &[u8]) -> Result<(), TransferError> {
        self.memory()?.copy_in(offset, bytes)
    }

    /// Fills `bytes` from `offset`.
    ///
    /// # Errors
    /// As [`Buffer::write_at`].
    pub fn read_at(&self, offset: usize, bytes: &mut [u8]) -> Result<(), TransferError> {
        self.memory()?.copy_out(offset, bytes)
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// None in practice.
    pub fn fill(&self, byte: u8) -> Result<(), TransferError> {
        self.memory()?.fill(0, self.len, byte)
    }

    fn memory(&self) -> Result<&Arc<SharedAllocation>, TransferError> {
        self.memory.as_ref().ok_or(TransferError::Internal { reason: "buffer without memory" })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Err(error) = self.engine.unregister(&[self.addr]) else { return };
        if matches!(error, TransferError::StillInUse { .. }) {
            tracing::warn!(addr = format_args!("{:#x}", self.addr), len = self.len, %error, "memory of a buffer is leaked");
            std::mem::forget(self.memory.take());
        }
    }
}
