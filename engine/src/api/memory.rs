//! Registering and unregistering of memory.
#![allow(unsafe_code, reason = "declares the unsafe registration functions; there is no unsafe operation here")]

use std::{sync::Arc, time::Duration};

use tidewire_core::{Location, TransferError};

use super::{
    buffer::Buffer,
    engine::{EngineInner, TransferEngine},
};
use crate::memory::{Backing, LocalRegion, alloc};

impl TransferEngine {
    /// Allocates registered memory, zeroed. Best for transfers on one host: peers map it.
    ///
    /// # Errors
    /// [`TransferError::ZeroLength`], [`TransferError::Os`], and those of [`TransferEngine::register_memory`].
    pub fn allocate(&self, len: usize, location: Location) -> Result<Buffer, TransferError> {
        self.inner().check_gate()?;
        let memory = alloc::allocate(len)?;
        let backing: Arc<dyn Backing> = memory.window(0);
        self.inner().register(&[(memory.addr(), len as u64)], &location, Some(backing))?;
        Ok(Buffer::new(Arc::clone(self.inner()), memory))
    }

    /// Registers memory of the caller: peers that find this segment may read and write it from now on, and it may be the
    /// source of requests. Returns after the metadata store has it (see `TIDEWIRE_PUBLISH_WAIT`).
    ///
    /// # Errors
    /// [`TransferError::ZeroLength`], [`TransferError::RangeOverflow`], [`TransferError::Overlap`],
    /// [`TransferError::Metadata`], [`TransferError::ShutDown`]. Nothing is registered then.
    ///
    /// # Safety
    /// The `len` bytes at `addr` are mapped, readable and writable until [`TransferEngine::unregister_memory`] returned
    /// `Ok` for `addr`, or the engine was dropped. Whoever holds references into them must expect that their bytes change.
    pub unsafe fn register_memory(&self, addr: *mut u8, len: usize, location: Location) -> Result<(), TransferError> {
        self.inner().register(&[(addr as u64, len as u64)], &location, None)
    }

    /// Registers several buffers, all or none, and publishes them at once.
    ///
    /// # Errors
    /// As [`TransferEngine::register_memory`].
    ///
    /// # Safety
    /// As [`TransferEngine::register_memory`], for each of them.
    pub unsafe fn register_memory_batch(
        &self,
        buffers: &[(*mut u8, usize)],
        location: Location,
    ) -> Result<(), TransferError> {
        let ranges: Vec<(u64, u64)> = buffers.iter().map(|(addr, len)| (*addr as u64, *len as u64)).collect();
        self.inner().register(&ranges, &location, None)
    }

    /// Unregisters the buffer that starts at `addr`. Operations that use it get a moment to end
    /// (`TIDEWIRE_UNREGISTER_DRAIN_MS`), then they are ended. After `Ok` nobody reads or writes this memory.
    ///
    /// # Errors
    /// [`TransferError::NotRegistered`]; [`TransferError::StillInUse`] if an operation could not be ended: the memory must
    /// stay mapped then.
    pub fn unregister_memory(&self, addr: u64) -> Result<(), TransferError> {
        self.inner().unregister(&[addr])
    }

    /// Unregisters several buffers and publishes that once. All are tried.
    ///
    /// # Errors
    /// The first error.
    pub fn unregister_memory_batch(&self, addrs: &[u64]) -> Result<(), TransferError> {
        self.inner().unregister(addrs)
    }
}

impl EngineInner {
    /// Registers `ranges`, all or none.
    pub(crate) fn register(
        &self,
        ranges: &[(u64, u64)],
        location: &Location,
        backing: Option<Arc<dyn Backing>>,
    ) -> Result<(), TransferError> {
        self.check_gate()?;
        let mut added: Vec<Arc<LocalRegion>> = Vec::with_capacity(ranges.len());
        let result = ranges.iter().try_for_each(|(addr, len)| {
            added.push(self.regions.register(*addr, *len, location.clone(), backing.clone())?);
            let Some(region) = added.last() else { return Ok(()) };
            self.connector.transports.iter().try_for_each(|transport| transport.register(region))
        });
        let registered = result.is_ok();
        let result = result.and_then(|()| self.publisher.publish(self.config.publish_wait));
        if result.is_err() {
            for region in &added {
                // Nobody was told of it, so there is nothing to wait for.
                let _ = self.regions.unregister(region.range().addr(), Duration::ZERO, |region| self.evict(region));
            }
            self.own.touch();
            if registered {
                // The failed write may still arrive or be repeated, so one without the buffers follows; it says itself
                // when it fails.
                let _ = self.publisher.publish(false);
            }
        }
        result
    }

    /// Unregisters the buffers at `addrs`; the first error.
    pub(crate) fn unregister(&self, addrs: &[u64]) -> Result<(), TransferError> {
        let mut first = Ok(());
        for addr in addrs {
            let drain = self.config.unregister_drain;
            let result = self.regions.unregister(*addr, drain, |region| self.evict(region));
            if let Err(error) = result
                && first.is_ok()
            {
                first = Err(error);
            }
        }
        if self.check_gate().is_err() {
            self.own.touch();
        } else if let Err(error) = self.publisher.publish(self.config.publish_wait) {
            // The memory is free all the same: peers that still read the old descriptor are refused.
            tracing::warn!(%error, "the store was not told of an unregistered buffer");
        }
        first
    }

    /// Ends whatever uses `region`: local batches, and peers over every transport.
    pub(super) fn evict(&self, region: &Arc<LocalRegion>) -> Result<(), String> {
        for flight in self.batches.in_flight() {
            if flight.core.holds(region) {
                flight.abort(&|_, _| TransferError::Cancelled);
            }
        }
        let mut holders = Vec::new();
        for transport in &self.connector.transports {
            if let Err(holder) = transport.evict(region, self.config.unregister_drain) {
                holders.push(holder);
            }
        }
        if holders.is_empty() { Ok(()) } else { Err(holders.join("; ")) }
    }
}
