//! Memory that the engine allocates: a sealed memfd, mapped shared, which same-host peers can map too.
//!
//! Invariants:
//! * the file can neither shrink nor grow, so no mapping of it can fault for lack of file;
//! * the address never changes; [`Backing::fence`] puts another file under it, which no peer has.
#![allow(unsafe_code, reason = "maps memory and copies by address")]

use std::{
    ffi::c_void,
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr::{self, NonNull},
    sync::{Arc, Mutex},
};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap},
};
use tidewire_core::{ByteRange, TransferError};

use super::{Backing, lock};

/// How to allocate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AllocOptions {
    /// Try reserved huge pages of 2 MiB; without any, normal pages are used and that is logged.
    pub huge_pages: bool,
}

const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Shared memory of this process; unmapped when the last reference goes.
pub struct SharedAllocation {
    base: NonNull<u8>,
    len: usize,
    mapped_len: usize,
    file: OwnedFd,
    huge: bool,
    fencing: Mutex<()>,
}

// SAFETY: plain memory without thread affinity; accesses go by raw copies that callers keep in order.
unsafe impl Send for SharedAllocation {}
// SAFETY: as above; no reference to the bytes is ever handed out.
unsafe impl Sync for SharedAllocation {}

impl fmt::Debug for SharedAllocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedAllocation")
            .field("addr", &self.base)
            .field("len", &self.len)
            .field("huge", &self.huge)
            .finish_non_exhaustive()
    }
}

/// Allocates `len` bytes of zeroed shared memory with normal pages; see [`SharedAllocation::new`].
///
/// # Errors
/// As [`SharedAllocation::new`].
pub fn allocate(len: usize) -> Result<Arc<SharedAllocation>, TransferError> {
    SharedAllocation::new(len, AllocOptions::default())
}

impl SharedAllocation {
    /// Allocates `len` bytes, zeroed, with every page in place.
    ///
    /// # Errors
    /// [`TransferError::ZeroLength`]; [`TransferError::RangeOverflow`]; [`TransferError::Os`] naming the call that failed.
    pub fn new(len: usize, options: AllocOptions) -> Result<Arc<Self>, TransferError> {
        if len == 0 {
            return Err(TransferError::ZeroLength { addr: 0 });
        }
        if options.huge_pages {
            match Self::map(len, HUGE_PAGE_BYTES, true) {
                Ok(allocation) => return Ok(Arc::new(allocation)),
                Err(error) => tracing::warn!(%error, len, "no huge pages, normal pages are used"),
            }
        }
        Self::map(len, rustix::param::page_size(), false).map(Arc::new)
    }

    fn map(len: usize, page: usize, huge: bool) -> Result<Self, TransferError> {
        let overflow = TransferError::RangeOverflow { addr: 0, len: len as u64 };
        let mapped_len = len.checked_next_multiple_of(page).filter(|l| isize::try_from(*l).is_ok()).ok_or(overflow)?;
        let file = create_file(mapped_len, huge)?;
        // SAFETY: a fresh mapping at an address the kernel chooses replaces nothing.
        let base = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            mmap(ptr::null_mut(), mapped_len, access, MapFlags::SHARED, &file, 0)
        }
        .map_err(|e| TransferError::os("mmap", &e.into()))?;
        let base = NonNull::new(base.cast()).ok_or(TransferError::Internal { reason: "mmap gave address 0" })?;
        let allocation = SharedAllocation { base, len, mapped_len, file, huge, fencing: Mutex::new(()) };
        allocation.populate()?;
        Ok(allocation)
    }

    /// Faults every page in. With huge pages this is the only proof that there are any: creating and sizing the file
    /// succeeds without them.
    fn populate(&self) -> Result<(), TransferError> {
        let base = self.base.as_ptr().cast::<c_void>();
        // SAFETY: the range is this mapping; populating changes no byte.
        let populated = unsafe { madvise(base, self.mapped_len, Advice::LinuxPopulateWrite) };
        match populated {
            Ok(()) => Ok(()),
            // Kernels before 5.14 do not know the advice; pages then come one by one as they are touched.
            Err(rustix::io::Errno::INVAL) if !self.huge => Ok(()),
            Err(error) => Err(TransferError::os("madvise(MADV_POPULATE_WRITE)", &error.into())),
        }
    }

    /// Address of the first byte.
    pub fn addr(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Length in bytes, at least 1.
    #[allow(clippy::len_without_is_empty, reason = "an allocation is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether huge pages are in place.
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// The part from `offset` as the backing of a region that starts there.
    pub fn window(self: &Arc<Self>, offset: u64) -> Arc<dyn Backing> {
        Arc::new(Window { allocation: Arc::clone(self), offset })
    }

    fn pointer(&self, offset: usize, len: usize) -> Result<*mut u8, TransferError> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        let addr = self.addr().saturating_add(offset as u64);
        match end {
            Some(_) => Ok(self.base.as_ptr().wrapping_add(offset)),
            None => Err(TransferError::SourceNotRegistered {
                range: ByteRange::new(addr, len as u64)
                    .ok_or(TransferError::RangeOverflow { addr, len: len as u64 })?,
            }),
        }
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    /// [`TransferError::SourceNotRegistered`] when that leaves the allocation; nothing is copied then.
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) -> Result<(), TransferError> {
        let target = self.pointer(offset, bytes.len())?;
        // SAFETY: in bounds; no `&mut` to the allocation exists, so `bytes` cannot be part of it as a unique reference.
        unsafe { ptr::copy(bytes.as_ptr(), target, bytes.len()) };
        Ok(())
    }

    /// Fills `bytes` from `offset`.
    ///
    /// # Errors
    /// As [`Self::copy_in`].
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) -> Result<(), TransferError> {
        let source = self.pointer(offset, bytes.len())?;
        // SAFETY: in bounds on both sides.
        unsafe { ptr::copy(source.cast_const(), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// Sets `len` bytes from `offset` to `byte`.
    ///
    /// # Errors
    /// As [`Self::copy_in`].
    pub fn fill(&self, offset: usize, len: usize, byte: u8) -> Result<(), TransferError> {
        let target = self.pointer(offset, len)?;
        // SAFETY: in bounds.
        unsafe { ptr::write_bytes(target, byte, len) };
        Ok(())
    }

    /// Puts a fresh file with the same bytes under the same addresses.
    fn replace_file(&self) -> Result<(), TransferError> {
        let _one = lock(&self.fencing);
        let file = create_file(self.mapped_len, self.huge)?;
        let os = |call| move |e: rustix::io::Errno| TransferError::os(call, &io::Error::from(e));
        // SAFETY: a fresh mapping at an address the kernel chooses replaces nothing.
        let copy = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            mmap(ptr::null_mut(), self.mapped_len, access, MapFlags::SHARED, &file, 0)
        }
        .map_err(os("mmap"))?;
        // SAFETY: both mappings are `mapped_len` long and different.
        unsafe { ptr::copy_nonoverlapping(self.base.as_ptr().cast_const(), copy.cast(), self.mapped_len) };
        // SAFETY: `mremap` moves the copy over our own mapping; both are `mapped_len` long, and the bytes are the same.
        // Nothing but raw copies ever points there.
        unsafe {
            let flags = rustix::mm::MremapFlags::MAYMOVE;
            rustix::mm::mremap_fixed(copy, self.mapped_len, self.mapped_len, flags, self.base.as_ptr().cast())
        }
        .map_err(os("mremap"))?;
        // From here on peers that ask get the new file: the descriptor number stays, so borrowed handles stay good.
        // SAFETY: both descriptors are open and ours.
        let dup = unsafe { libc::dup3(file.as_raw_fd(), self.file.as_raw_fd(), libc::O_CLOEXEC) };
        if dup < 0 { Err(TransferError::os("dup3", &io::Error::last_os_error())) } else { Ok(()) }
    }
}

fn create_file(len: usize, huge: bool) -> Result<OwnedFd, TransferError> {
    let os = |call| move |e: rustix::io::Errno| TransferError::os(call, &io::Error::from(e));
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if huge {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let file = memfd_create("tidewire", flags).map_err(os("memfd_create"))?;
    ftruncate(&file, len as u64).map_err(os("ftruncate"))?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(os("fcntl(F_ADD_SEALS)"))?;
    Ok(file)
}

impl Drop for SharedAllocation {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and the last reference to it is going.
        if let Err(error) = unsafe { munmap(self.base.as_ptr().cast(), self.mapped_len) } {
            tracing::warn!(%error, len = self.len, "allocation stays mapped");
        }
    }
}

impl Backing for SharedAllocation {
    fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn file_offset(&self) -> u64 {
        0
    }

    fn extent(&self) -> Option<ByteRange> {
        ByteRange::new(self.addr(), self.mapped_len as u64)
    }

    fn fence(&self) -> Result<(), TransferError> {
        self.replace_file()
    }
}

/// A [`SharedAllocation`] seen from an offset.
#[derive(Debug)]
struct Window {
    allocation: Arc<SharedAllocation>,
    offset: u64,
}

impl Backing for Window {
    fn file(&self) -> BorrowedFd<'_> {
        self.allocation.file()
    }

    fn file_offset(&self) -> u64 {
        self.offset
    }

    fn extent(&self) -> Option<ByteRange> {
        self.allocation.extent()
    }

    fn fence(&self) -> Result<(), TransferError> {
        self.allocation.fence()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_in_and_out_and_bounds_hold() {
        let memory = allocate(10_000).unwrap();
        memory.copy_in(9_990, &[7; 10]).unwrap();
        memory.fill(0, 5, 9).unwrap();
        let mut out = [1u8; 12];
        memory.copy_out(9_988, &mut out).unwrap();
        assert_eq!(out, [0, 0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]);
        assert!(memory.copy_in(9_991, &[0; 10]).is_err() && memory.fill(usize::MAX, 2, 0).is_err());
        assert!(memory.copy_out(10_001, &mut out).is_err());
    }

    #[test]
    fn zero_and_impossible_lengths_are_refused() {
        assert!(matches!(allocate(0), Err(TransferError::ZeroLength { .. })));
        assert!(matches!(allocate(usize::MAX), Err(TransferError::RangeOverflow { .. })));
    }

    #[test]
    fn huge_pages_fall_back_when_none_are_reserved() {
        let memory = SharedAllocation::new(3 << 20, AllocOptions { huge_pages: true }).unwrap();
        memory.fill(0, 3 << 20, 1).unwrap();
    }

    #[test]
    fn fence_keeps_the_bytes_and_cuts_off_who_mapped_the_file_before() {
        let memory = allocate(5000).unwrap();
        memory.fill(0, 5000, 3).unwrap();
        let region = ByteRange::new(memory.addr(), 5000).unwrap();
        let late = crate::shm::FileMapping::new(memory.file(), 0, 8192).unwrap();
        memory.fence().unwrap();
        // SAFETY: the mapping is two pages long.
        unsafe { ptr::write_bytes(late.base().as_ptr(), 0xFF, 8192) };
        let mut out = vec![0u8; 5000];
        memory.copy_out(0, &mut out).unwrap();
        assert!(out.iter().all(|b| *b == 3));
        assert_eq!(region.addr(), memory.addr());
        let fresh = crate::shm::FileMapping::new(memory.file(), 0, 8192).unwrap();
        // SAFETY: the mapping is two pages long.
        assert_eq!(unsafe { fresh.base().as_ptr().read() }, 3);
    }
}
