//! Control page: who may touch which region, shared between an owner and one attached peer.
//!
//! The owner gives the peer one page set per connection. Each region granted to the peer has a slot: a sequence number,
//! odd while the grant is good, and a count of the accesses that the peer has open. The peer counts itself in, *then* looks
//! at the sequence; the owner changes the sequence, *then* looks at the count. Both sides use sequentially consistent
//! operations, so at least one of them sees the other: after the owner saw a count of zero, no access under the old
//! sequence can begin.
//!
//! Invariants:
//! * the owner reuses a slot only after its count was zero under a revoked sequence, or its peer is dead;
//! * whatever a peer writes into the page, the owner's code stays in bounds; a lying peer only harms itself (its accesses
//!   are fenced or reported, see [`crate::transport::shm`]).

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create},
    thread::futex,
};

use super::FileMapping;

/// Grants that one connection can hold.
pub(crate) const SLOTS: u32 = 16_384;

/// Bytes before the first slot.
const HEADER_BYTES: usize = 64;
const PAGE_BYTES: usize = (HEADER_BYTES + SLOTS as usize * size_of::<Slot>()).next_multiple_of(4096);

#[repr(C)]
struct Header {
    /// Random; a peer that reads it through `process_vm_readv` knows that it reads the right process.
    probe_word: AtomicU64,
}

#[repr(C, align(64))]
struct Slot {
    sequence: AtomicU64,
    active: AtomicU32,
}

/// One side's view of a control page.
#[derive(Debug)]
pub(crate) struct ControlPage {
    mapping: FileMapping,
}

impl ControlPage {
    /// Makes the page and the file to hand to the peer. Pages nobody uses take no memory.
    ///
    /// # Errors
    /// errno of the call that failed.
    pub(crate) fn create(probe_word: u64) -> io::Result<(Self, OwnedFd)> {
        let file = memfd_create("tidewire-control", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, PAGE_BYTES as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let page = ControlPage { mapping: FileMapping::new(file.as_fd(), 0, PAGE_BYTES)? };
        page.header().probe_word.store(probe_word, Ordering::Release);
        Ok((page, file))
    }

    /// Maps the page that a peer handed over.
    ///
    /// # Errors
    /// `InvalidData` if the file is not a control page of this version; errno of `mmap(2)`.
    pub(crate) fn attach(file: BorrowedFd<'_>) -> io::Result<Self> {
        let sealed = fcntl_get_seals(file)?.contains(SealFlags::SHRINK);
        if !sealed || fstat(file)?.st_size != PAGE_BYTES as i64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a control page"));
        }
        Ok(ControlPage { mapping: FileMapping::new(file, 0, PAGE_BYTES)? })
    }

    /// The word that proves which process this page belongs to.
    pub(crate) fn probe_word(&self) -> u64 {
        self.header().probe_word.load(Ordering::Acquire)
    }

    /// Where that word is in this process.
    pub(crate) fn probe_addr(&self) -> u64 {
        self.mapping.base().as_ptr() as u64
    }

    fn header(&self) -> &Header {
        // SAFETY: the mapping is page aligned, longer than the header, lives as long as `self` and is made of atomics.
        unsafe { self.mapping.base().cast().as_ref() }
    }

    fn slot(&self, index: u32) -> Option<&Slot> {
        if index >= SLOTS {
            return None;
        }
        let offset = HEADER_BYTES + index as usize * size_of::<Slot>();
        let slot = self.mapping.base().as_ptr().wrapping_add(offset).cast::<Slot>();
        // SAFETY: `index < SLOTS`, so the slot lies in the mapping, aligned to 64; it is made of atomics.
        unsafe { slot.as_ref() }
    }

    /// Peer: opens an access under `sequence`; `None` if the grant was revoked.
    pub(crate) fn enter(&self, slot: u32, sequence: u64) -> Option<Access<'_>> {
        let access = Access { slot: self.slot(slot)?, sequence };
        access.slot.active.fetch_add(1, Ordering::SeqCst);
        // Sequentially consistent with `revoke`: either we see the new sequence or the owner sees our count.
        access.still_granted().then_some(access)
    }

    /// Owner: makes a free slot good under a new sequence, which is returned.
    pub(crate) fn grant(&self, slot: u32, after: u64) -> u64 {
        let sequence = (after | 1).wrapping_add(2);
        if let Some(slot) = self.slot(slot) {
            slot.sequence.store(sequence, Ordering::SeqCst);
        }
        sequence
    }

    /// Owner: no access can begin under `sequence` any more. Those that are open go on; see [`Self::wait_idle`].
    pub(crate) fn revoke(&self, slot: u32, sequence: u64) {
        if let Some(slot) = self.slot(slot) {
            slot.sequence.store(sequence.wrapping_add(1), Ordering::SeqCst);
        }
    }

    /// Owner: whether the peer has no access open in the slot.
    pub(crate) fn is_idle(&self, slot: u32) -> bool {
        self.slot(slot).is_none_or(|s| s.active.load(Ordering::SeqCst) == 0)
    }

    /// Owner: waits until the slot is idle, at most until `deadline`; whether it is.
    pub(crate) fn wait_idle(&self, slot: u32, deadline: Instant) -> bool {
        let Some(slot) = self.slot(slot) else { return true };
        loop {
            let active = slot.active.load(Ordering::SeqCst);
            if active == 0 {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            // Leaving wakes us; the cap covers a peer that dies between its last store and its wake.
            let nap = left.min(Duration::from_millis(50));
            let nap = futex::Timespec { tv_sec: 0, tv_nsec: i64::from(nap.subsec_nanos()) };
            // Every outcome, an error included, leads to another look at the count.
            let _ = futex::wait(&slot.active, futex::Flags::empty(), active, Some(&nap));
        }
    }

    /// Owner: the peer is dead, nobody is inside any more.
    pub(crate) fn clear(&self, slot: u32) {
        if let Some(slot) = self.slot(slot) {
            slot.active.store(0, Ordering::SeqCst);
            let _ = futex::wake(&slot.active, futex::Flags::empty(), u32::MAX);
        }
    }
}

/// An open access of this process to a region of a peer.
#[derive(Debug)]
pub(crate) struct Access<'a> {
    slot: &'a Slot,
    sequence: u64,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot").field("sequence", &self.sequence).field("active", &self.active).finish()
    }
}

impl Access<'_> {
    /// Whether the owner still grants the region; long copies in pieces look before each piece.
    pub(crate) fn still_granted(&self) -> bool {
        self.slot.sequence.load(Ordering::SeqCst) == self.sequence
    }
}

impl Drop for Access<'_> {
    fn drop(&mut self) {
        let before = self.slot.active.fetch_sub(1, Ordering::SeqCst);
        if before == 1 && !self.still_granted() {
            let _ = futex::wake(&self.slot.active, futex::Flags::empty(), u32::MAX);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn pair() -> (ControlPage, ControlPage) {
        let (owner, file) = ControlPage::create(0x5eed).unwrap();
        let peer = ControlPage::attach(file.as_fd()).unwrap();
        (owner, peer)
    }

    #[test]
    fn revoked_grant_lets_nobody_in_and_waits_for_who_is_inside() {
        let (owner, peer) = pair();
        assert_eq!(peer.probe_word(), 0x5eed);
        let sequence = owner.grant(3, 0);
        let inside = peer.enter(3, sequence).unwrap();
        assert!(!owner.is_idle(3));
        owner.revoke(3, sequence);
        assert!(peer.enter(3, sequence).is_none() && !inside.still_granted());
        assert!(!owner.wait_idle(3, Instant::now() + Duration::from_millis(5)));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| owner.wait_idle(3, Instant::now() + Duration::from_secs(30)));
            drop(inside);
            assert!(waiter.join().unwrap());
        });
        let next = owner.grant(3, sequence);
        assert!(next != sequence && peer.enter(3, sequence).is_none() && peer.enter(3, next).is_some());
    }

    #[test]
    fn slots_past_the_end_are_refused() {
        let (owner, peer) = pair();
        assert!(peer.enter(SLOTS, 1).is_none() && owner.is_idle(SLOTS));
    }
}
