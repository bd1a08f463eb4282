//! Registered local memory: who may touch it, and when nobody does any more.
//!
//! A [`LocalRegion`] is one registered buffer. Whoever moves its bytes holds a [`RegionPin`]; unregistering revokes the
//! region (no new pins) and waits until the last pin is gone. Nothing outside a pin dereferences registered memory.
//!
//! Invariants:
//! * regions of one table never overlap;
//! * a revoked region gives out no pin;
//! * after [`RegionTable::unregister`] returned `Ok`, no pin exists and none can be made;
//! * one thread at a time unregisters a region, so that nobody gives back what another revoked.

pub mod alloc;
pub(crate) mod io;

use std::{
    fmt,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tidewire_core::{ByteRange, Location, TransferError};

/// Locks, ignoring poisoning: the data under our locks is valid after every statement.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Set in [`LocalRegion::pins`] once the region is revoked.
const REVOKED: u64 = 1 << 63;

/// One registered buffer of this process.
pub struct LocalRegion {
    range: ByteRange,
    location: Location,
    /// What keeps the memory mapped, where the engine allocated it.
    backing: Option<Arc<dyn Backing>>,
    /// Number of pins, plus [`REVOKED`].
    pins: AtomicU64,
    drained: Mutex<()>,
    wake: Condvar,
    /// Held by the thread that unregisters this region.
    ending: Mutex<()>,
}

/// Memory that the engine allocated itself and that same-host peers may map.
pub trait Backing: Send + Sync + fmt::Debug {
    /// File that backs the memory, for passing to a same-host peer.
    fn file(&self) -> std::os::fd::BorrowedFd<'_>;
    /// Where in the file the region starts, in bytes.
    fn file_offset(&self) -> u64;
    /// The addresses that [`Self::fence`] replaces at once; `None` if this memory cannot be fenced.
    fn extent(&self) -> Option<ByteRange> {
        None
    }
    /// Puts a fresh file with the same bytes under the same addresses: who mapped the old file no longer reaches this
    /// memory. Nobody in this process may write to it meanwhile.
    ///
    /// # Errors
    /// [`TransferError::Unavailable`] where it cannot be done, [`TransferError::Os`] where a call failed; the memory is
    /// as it was then.
    fn fence(&self) -> Result<(), TransferError> {
        Err(TransferError::Unavailable { what: "fence".to_owned(), reason: "memory of the caller".to_owned() })
    }
}

/// Accesses to regions that hold no pin in this process: those of same-host peers.
pub trait ForeignAccess: Send + Sync + fmt::Debug {
    /// Lets no access to `region` begin any more. Does not block.
    fn revoke(&self, region: &Arc<LocalRegion>);
    /// Waits until no access to the revoked `region` is open, at most until `deadline`; whether that is so.
    fn wait_idle(&self, region: &Arc<LocalRegion>, deadline: Instant) -> bool;
}

impl fmt::Debug for LocalRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalRegion").field("range", &self.range).field("location", &self.location).finish()
    }
}

impl LocalRegion {
    /// The registered bytes.
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// Where they live, as registered.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// The file behind them, where the engine allocated them.
    pub fn backing(&self) -> Option<&Arc<dyn Backing>> {
        self.backing.as_ref()
    }

    /// Takes a pin; `None` once the region is revoked.
    pub fn pin(self: &Arc<Self>) -> Option<RegionPin> {
        // Acquire pairs with the AcqRel of `revoke`: a pin taken after it sees the revocation.
        let mut seen = self.pins.load(Ordering::Acquire);
        loop {
            if seen & REVOKED != 0 {
                return None;
            }
            match self.pins.compare_exchange_weak(seen, seen + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(RegionPin { region: Arc::clone(self) }),
                Err(now) => seen = now,
            }
        }
    }

    fn revoke(&self) {
        self.pins.fetch_or(REVOKED, Ordering::AcqRel);
    }

    fn restore(&self) {
        self.pins.fetch_and(!REVOKED, Ordering::AcqRel);
    }

    /// Waits until no pin is left, at most until `deadline`.
    pub(crate) fn wait_unpinned(&self, deadline: Instant) -> bool {
        let mut guard = lock(&self.drained);
        while self.pins.load(Ordering::Acquire) & !REVOKED != 0 {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            guard = self.wake.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// The right to touch the bytes of a region until dropped.
#[derive(Debug)]
pub struct RegionPin {
    region: Arc<LocalRegion>,
}

impl RegionPin {
    /// The region that is held.
    pub fn region(&self) -> &Arc<LocalRegion> {
        &self.region
    }
}

impl Drop for RegionPin {
    fn drop(&mut self) {
        let before = self.region.pins.fetch_sub(1, Ordering::AcqRel);
        if before == REVOKED + 1 {
            // Under the lock, so that a waiter between its check and its wait is not missed.
            let _guard = lock(&self.region.drained);
            self.region.wake.notify_all();
        }
    }
}

/// All registered buffers of an engine, in address order.
#[derive(Debug, Default)]
pub struct RegionTable {
    regions: RwLock<Vec<Arc<LocalRegion>>>,
    foreign: RwLock<Vec<Weak<dyn ForeignAccess>>>,
}

impl RegionTable {
    /// Adds a region.
    ///
    /// # Errors
    /// [`TransferError::ZeroLength`], [`TransferError::RangeOverflow`], [`TransferError::Overlap`].
    pub fn register(
        &self,
        addr: u64,
        len: u64,
        location: Location,
        backing: Option<Arc<dyn Backing>>,
    ) -> Result<Arc<LocalRegion>, TransferError> {
        if len == 0 {
            return Err(TransferError::ZeroLength { addr });
        }
        let range = ByteRange::new(addr, len).ok_or(TransferError::RangeOverflow { addr, len })?;
        let region = Arc::new(LocalRegion {
            range,
            location,
            backing,
            pins: AtomicU64::new(0),
            drained: Mutex::new(()),
            wake: Condvar::new(),
            ending: Mutex::new(()),
        });
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let index = regions.partition_point(|r| r.range.addr() < addr);
        let neighbours = index.checked_sub(1).into_iter().chain(std::iter::once(index));
        for other in neighbours.filter_map(|i| regions.get(i)) {
            if other.range.overlaps(range) {
                return Err(TransferError::Overlap { range, existing: other.range });
            }
        }
        regions.insert(index, Arc::clone(&region));
        Ok(region)
    }

    /// The region that holds `range` wholly.
    pub fn find(&self, range: ByteRange) -> Option<Arc<LocalRegion>> {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        let index = regions.partition_point(|r| r.range.addr() <= range.addr()).checked_sub(1)?;
        regions.get(index).filter(|r| r.range.contains(range)).cloned()
    }

    /// The region that starts at `addr`.
    pub fn at(&self, addr: u64) -> Option<Arc<LocalRegion>> {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        let index = regions.binary_search_by_key(&addr, |r| r.range.addr()).ok()?;
        regions.get(index).cloned()
    }

    /// Makes [`Self::unregister`] also end the accesses that `access` knows of.
    pub fn add_foreign_access(&self, access: Weak<dyn ForeignAccess>) {
        let mut listed = self.foreign.write().unwrap_or_else(PoisonError::into_inner);
        listed.retain(|f| f.strong_count() != 0);
        listed.push(access);
    }

    /// How many regions there are.
    pub fn count(&self) -> usize {
        self.regions.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// All regions, in address order.
    pub fn snapshot(&self) -> Vec<Arc<LocalRegion>> {
        self.regions.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes the region that starts at `addr` out of use: no new pin, then waits for the pins there are.
    ///
    /// After `drain`, `evict` is called once with the region to end whatever still holds it (close connections, cancel
    /// batches), and the wait goes on for `drain` again. Blocks the calling thread, also while another thread unregisters
    /// the same region.
    ///
    /// # Errors
    /// [`TransferError::NotRegistered`], also when another thread was faster; [`TransferError::StillInUse`] when even that did not help: the region is then
    /// still registered and its memory must stay mapped.
    pub fn unregister(
        &self,
        addr: u64,
        drain: Duration,
        evict: impl FnOnce(&Arc<LocalRegion>) -> Result<(), String>,
    ) -> Result<Arc<LocalRegion>, TransferError> {
        let region = self.at(addr).ok_or(TransferError::NotRegistered { addr })?;
        let _one = lock(&region.ending);
        if !self.at(addr).is_some_and(|listed| Arc::ptr_eq(&listed, &region)) {
            return Err(TransferError::NotRegistered { addr });
        }
        let started = Instant::now();
        region.revoke();
        let foreign: Vec<_> = {
            let listed = self.foreign.read().unwrap_or_else(PoisonError::into_inner);
            listed.iter().filter_map(Weak::upgrade).collect()
        };
        foreign.iter().for_each(|f| f.revoke(&region));
        let idle = |deadline| region.wait_unpinned(deadline) && foreign.iter().all(|f| f.wait_idle(&region, deadline));
        let mut holder = String::new();
        let drained = idle(started + drain) || {
            if let Err(text) = evict(&region) {
                holder = text;
            }
            holder.is_empty() && idle(Instant::now() + drain)
        };
        if !drained {
            region.restore();
            let waited_ms = started.elapsed().as_millis() as u64;
            return Err(TransferError::StillInUse { range: region.range, holder, waited_ms });
        }
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let index = regions.binary_search_by_key(&addr, |r| r.range.addr());
        if let Ok(index) = index
            && regions.get(index).is_some_and(|r| Arc::ptr_eq(r, &region))
        {
            regions.remove(index);
        }
        Ok(Arc::clone(&region))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn failed_unregister_leaves_the_revocation_of_a_concurrent_one_alone() {
        let table = RegionTable::default();
        let region = table.register(4096, 64, Location::Any, None).unwrap();
        let held = region.pin().unwrap();
        std::thread::scope(|scope| {
            let second = || table.unregister(4096, Duration::from_secs(60), |_| Ok(()));
            let mut waiter = None;
            let first = table.unregister(4096, Duration::from_millis(200), |_| {
                waiter = Some(scope.spawn(second));
                Ok(())
            });
            assert!(matches!(first, Err(TransferError::StillInUse { .. })), "{first:?}");
            let deadline = Instant::now() + Duration::from_secs(5);
            while let Some(pin) = region.pin() {
                drop(pin);
                assert!(Instant::now() < deadline, "pins are given out while a thread unregisters");
            }
            drop(held);
            waiter.unwrap().join().unwrap().unwrap();
        });
        assert!(region.pin().is_none());
        assert!(matches!(table.unregister(4096, Duration::ZERO, |_| Ok(())), Err(TransferError::NotRegistered { .. })));
    }

    #[test]
    fn of_two_concurrent_unregisters_one_succeeds() {
        let table = RegionTable::default();
        let region = table.register(4096, 64, Location::Any, None).unwrap();
        let held = region.pin().unwrap();
        let results = std::thread::scope(|scope| {
            let both = [(); 2].map(|()| scope.spawn(|| table.unregister(4096, Duration::from_secs(60), |_| Ok(()))));
            while region.pin().is_some() {
                std::thread::yield_now();
            }
            drop(held);
            both.map(|thread| thread.join().unwrap())
        });
        assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1, "{results:?}");
        assert!(results.iter().any(|r| matches!(r, Err(TransferError::NotRegistered { addr: 4096 }))), "{results:?}");
    }
}
