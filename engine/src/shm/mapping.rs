//! Mappings of files shared between processes.

use std::{io, os::fd::BorrowedFd, ptr::NonNull};

use rustix::{
    fs::{SealFlags, fcntl_get_seals, fstat},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap},
};
use tidewire_core::{ByteRange, Opcode};

use super::{Access, copy_forward};

/// A shared mapping of a whole-page part of a file; unmapped on drop.
#[derive(Debug)]
pub(crate) struct FileMapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory without thread affinity; who reads and writes it is governed by the control page.
unsafe impl Send for FileMapping {}
// SAFETY: as above; no method hands out references to the bytes.
unsafe impl Sync for FileMapping {}

impl FileMapping {
    /// Maps `len` bytes of `file` from `offset`, both multiples of the page size, readable and writable.
    ///
    /// # Errors
    /// errno of `mmap(2)`.
    pub(crate) fn new(file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address the kernel chooses replaces nothing.
        let base = unsafe {
            mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, offset)
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(FileMapping { base, len })
    }

    /// First byte.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Enters the pages of the file into the page table, so that copies do not fault; a failure changes nothing.
    pub(crate) fn populate(&self) {
        // SAFETY: populating changes no byte; the range is this mapping.
        if let Err(error) = unsafe { madvise(self.base.as_ptr().cast(), self.len, Advice::LinuxPopulateWrite) } {
            tracing::debug!(%error, len = self.len, "mapping is not populated ahead");
        }
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrows from it any more.
        if let Err(error) = unsafe { munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::warn!(%error, len = self.len, "shared mapping stays mapped");
        }
    }
}

/// A region of a peer, mapped here.
#[derive(Debug)]
pub(crate) struct PeerMapping {
    mapping: FileMapping,
    /// Where the region starts in the mapping.
    skip: usize,
    /// The region, in addresses of the peer.
    region: ByteRange,
}

impl PeerMapping {
    /// Maps the part of `file` at `file_offset` that holds `region` of a peer.
    ///
    /// # Errors
    /// `InvalidInput` when the file is too short, or not sealed against shrinking (then an access could fault); errno of
    /// `mmap(2)`.
    pub(crate) fn new(file: BorrowedFd<'_>, file_offset: u64, region: ByteRange) -> io::Result<Self> {
        let stat = fstat(file)?;
        let end = file_offset.checked_add(region.len()).ok_or(io::ErrorKind::InvalidInput)?;
        if !fcntl_get_seals(file)?.contains(SealFlags::SHRINK) || u64::try_from(stat.st_size).is_ok_and(|s| s < end) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "file may shrink or is too short"));
        }
        // Huge-page files want offsets in multiples of their page size, which is the block size they report.
        let page = u64::try_from(stat.st_blksize).unwrap_or(0).max(rustix::param::page_size() as u64);
        let start = file_offset / page * page;
        let len = (end - start).next_multiple_of(page);
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mapping = FileMapping::new(file, start, len)?;
        Ok(PeerMapping { mapping, skip: (file_offset - start) as usize, region })
    }

    /// Enters the pages into the page table ahead of the first copy.
    pub(crate) fn populate(&self) {
        self.mapping.populate();
    }

    /// Copies between `local`, pinned by the slice's batch, and `target` in addresses of the peer; `false`, and nothing is
    /// copied, if that is not inside the region. `_access` holds the region open on the peer's side.
    pub(crate) fn copy(&self, opcode: Opcode, local: u64, target: ByteRange, _access: &Access<'_>) -> bool {
        if !self.region.contains(target) {
            return false;
        }
        let offset = self.skip + (target.addr() - self.region.addr()) as usize;
        let remote = self.mapping.base().as_ptr().wrapping_add(offset);
        let len = target.len() as usize;
        match opcode {
            // SAFETY: `target` is inside the mapped region, `local` is pinned memory of `len` bytes; this mapping and
            // registered memory of this process are different mappings, so the addresses do not overlap.
            Opcode::Read => unsafe { copy_forward(remote, local as *mut u8, len) },
            // SAFETY: as above.
            Opcode::Write => unsafe { copy_forward(local as *const u8, remote, len) },
        }
        true
    }
}
