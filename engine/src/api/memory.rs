//! Registering and unregistering of memory.
#![allow(unsafe_code, reason = "declares the unsafe registration functions; there is no unsafe operation here")]

use std::sync::Arc;

use tidewire_core::{Location, TransferError, TransportKind};

use super::{
    buffer::Buffer,
    engine::{EngineInner, TransferEngine},
};
use crate::{
    memory::{Backing, LocalRegion, alloc},
    segment::publish::WAIT_BUFFERS,
};

impl TransferEngine {
    /// Allocates registered memory, zeroed. Best for transfers on one host: peers map it.
    ///
    /// # Errors
    /// [`TransferError::ZeroLength`], [`TransferError::Os`], and those of [`TransferEngine::register_memory`]. After
    /// [`TransferError::StillInUse`] the engine keeps the memory, until it is unregistered or the engine ends.
    pub fn allocate(&self, len: usize, location: Location) -> Result<Buffer, TransferError> {
        self.inner().check_gate()?;
        let memory = alloc::allocate(len)?;
        let backing: Arc<dyn Backing> = memory.window(0);
        self.inner().register(&[(memory.addr(), len as u64)], &location, Some(backing))?;
        Ok(Buffer::new(Arc::clone(self.inner()), memory))
    }

    /// Registers memory of the caller: peers that find this segment may read and write it from now on, and it may be the
    /// source of requests. Returns after the metadata store has it (see `TIDEWIRE_PUBLISH_WAIT`);
    /// with more than 256 buffers it is published soon after.
    ///
    /// # Errors
    /// [`TransferError::ZeroLength`], [`TransferError::RangeOverflow`], [`TransferError::Overlap`],
    /// [`TransferError::Metadata`], [`TransferError::ShutDown`]. Nothing is registered then. But with
    /// [`TransferError::StillInUse`] registering failed and a peer that had found the memory meanwhile did not let go of it:
    /// it is still registered and must stay mapped until [`TransferEngine::unregister_memory`] returned `Ok` for it.
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
    /// As [`TransferEngine::register_memory`]. [`TransferError::StillInUse`] names one buffer; others of `buffers` may still
    /// be registered too.
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
        let result = result.and_then(|()| self.publisher.publish(self.waits(ranges.len())));
        result.map_err(|error| self.take_back(&added, error))
    }

    /// Unregisters what a failed [`Self::register`] had `added`; the error to return. Peers may have found it already: the
    /// target judges ranges by the table, and a write to the store that failed here may have arrived there.
    fn take_back(&self, added: &[Arc<LocalRegion>], error: TransferError) -> TransferError {
        let drain = self.config.unregister_drain;
        let mut outcome = error;
        for region in added {
            let result = self.regions.unregister(region.range().addr(), drain, |region| self.evict(region));
            if let Err(error @ TransferError::StillInUse { .. }) = result
                && !matches!(outcome, TransferError::StillInUse { .. })
            {
                tracing::warn!(error = %outcome, range = %region.range(), "buffer stays registered, registering failed");
                outcome = error;
            }
        }
        if !added.is_empty() {
            self.announce_removal(false);
        }
        outcome
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
        self.announce_removal(self.waits(addrs.len()));
        first
    }

    /// Whether a change of `count` buffers waits for the store: a batch does, a single one only among few.
    fn waits(&self, count: usize) -> bool {
        self.config.publish_wait && (count > 1 || self.regions.count() <= WAIT_BUFFERS)
    }

    /// Publishes that buffers are gone, unless the engine is ending.
    fn announce_removal(&self, wait: bool) {
        if self.check_gate().is_err() {
            self.own.touch();
        } else if let Err(error) = self.publisher.publish(wait) {
            // The memory is free all the same: peers that still read the old descriptor are refused.
            tracing::warn!(%error, "the store was not told of an unregistered buffer");
        }
    }

    /// Ends whatever uses `region`: local batches, and peers over every transport.
    pub(super) fn evict(&self, region: &Arc<LocalRegion>) -> Result<(), String> {
        for flight in self.batches.in_flight() {
            if flight.core.holds(region) {
                flight.abort(&|_, _| TransferError::Cancelled);
            }
        }
        let mut holders = Vec::new();
        // Those on this host last: they may replace the memory, which nothing here may be receiving into then.
        let mut transports: Vec<_> = self.connector.transports.iter().collect();
        transports.sort_by_key(|transport| matches!(transport.kind(), TransportKind::Shm | TransportKind::Cma));
        for transport in transports {
            if let Err(holder) = transport.evict(region, self.config.unregister_drain) {
                holders.push(holder);
            }
        }
        if holders.is_empty() { Ok(()) } else { Err(holders.join("; ")) }
    }
}
