//! Copies between this process's memory and another's, by address.
//!
//! # Source
//! `process_vm_readv(2)`: a transfer may be partial when a later page faults; a call moves at most `MAX_RW_COUNT` bytes.

use std::io;

/// One pair of ranges of equal length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Address in this process.
    pub local: u64,
    /// Address in the other process.
    pub remote: u64,
    /// Bytes.
    pub len: usize,
}

/// Parts that one call takes (`IOV_MAX`).
pub const MAX_PARTS: usize = 1024;

fn vectors(parts: &[Part]) -> (Vec<libc::iovec>, Vec<libc::iovec>) {
    let one = |addr: u64, len: usize| libc::iovec { iov_base: addr as *mut libc::c_void, iov_len: len };
    let local = parts.iter().map(|p| one(p.local, p.len)).collect();
    let remote = parts.iter().map(|p| one(p.remote, p.len)).collect();
    (local, remote)
}

/// Copies from process `pid` into this one; the count of bytes moved, in order of `parts`, may be short.
///
/// # Errors
/// errno of the call: `EPERM` when tracing that process is not allowed, `ESRCH` when it is gone, `EFAULT` when the first
/// byte cannot be read.
///
/// # Safety
/// The local side of every part is writable memory that nobody else relies on during the call.
pub unsafe fn read(pid: i32, parts: &[Part]) -> io::Result<usize> {
    let parts = parts.get(..MAX_PARTS).unwrap_or(parts);
    let (local, remote) = vectors(parts);
    let count = parts.len() as libc::c_ulong;
    // SAFETY: both arrays hold `count` vectors and outlive the call; the caller answers for the local memory, the kernel
    // checks the remote one.
    let moved = unsafe { libc::process_vm_readv(pid, local.as_ptr(), count, remote.as_ptr(), count, 0) };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// Copies from this process into process `pid`; the count of bytes moved, in order of `parts`, may be short.
///
/// # Errors
/// As [`read`].
///
/// # Safety
/// The local side of every part is readable memory, and the remote side belongs to whoever agreed to this write.
pub unsafe fn write(pid: i32, parts: &[Part]) -> io::Result<usize> {
    let parts = parts.get(..MAX_PARTS).unwrap_or(parts);
    let (local, remote) = vectors(parts);
    let count = parts.len() as libc::c_ulong;
    // SAFETY: both arrays hold `count` vectors and outlive the call; the caller answers for both sides.
    let moved = unsafe { libc::process_vm_writev(pid, local.as_ptr(), count, remote.as_ptr(), count, 0) };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_memory_can_be_copied_and_a_bad_address_is_an_error() {
        let source = [7u8; 64];
        let mut target = [0u8; 64];
        let pid = std::process::id() as i32;
        let part = Part { local: target.as_mut_ptr() as u64, remote: source.as_ptr() as u64, len: 64 };
        // SAFETY: both arrays are alive and 64 bytes long.
        let moved = unsafe { read(pid, &[part]) };
        assert_eq!(moved.map_err(|e| e.raw_os_error()), Ok(64));
        assert_eq!(target, source);
        // SAFETY: the kernel refuses the remote address before it writes.
        let moved = unsafe { read(pid, &[Part { remote: 16, ..part }]) };
        assert_eq!(moved.map_err(|e| e.raw_os_error()), Err(Some(libc::EFAULT)));
    }
}
