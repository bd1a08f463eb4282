//! `cma`: copies by the peer's addresses, through `process_vm_readv` and `process_vm_writev`.
//!
//! Reaches any registered memory of a process on the same host, at the price of a copy by the kernel. Whether it is allowed
//! depends on users, yama, seccomp filters and namespaces, so it is never assumed: attaching reads a word of the peer
//! whose value the peer told over its socket, which also proves that the id means the same process on both sides.
//!
//! The transport itself is made by [`super::shm::SameHost::cma`]; it shares sockets, grants and control pages with `shm`.

use std::{fs, io};

use tidewire_core::{ByteRange, TransferError};

use crate::{
    shm::{Access, RemoteCopy, RemoteProcess},
    transport::{Peer, Slice, TransportKind},
};

/// Reads the word at `addr` of `process` and compares it with what the peer told.
///
/// # Errors
/// Text saying why this host does not let us: the error, and the setting that usually causes it.
pub(super) fn probe(process: RemoteProcess, addr: u64, word: u64) -> Result<(), String> {
    match process.read_word(addr) {
        Ok(found) if found == word => Ok(()),
        Ok(_) => Err("the process id means another process here".to_owned()),
        Err(error) => Err(refusal(&error)),
    }
}

fn refusal(error: &io::Error) -> String {
    let yama = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    let yama = yama.map_or_else(|_| "none".to_owned(), |text| text.trim().to_owned());
    format!("process_vm_readv: {error} (yama ptrace_scope: {yama}; a container's seccomp filter may also forbid it)")
}

/// How a copy ended, other than well.
#[derive(Debug)]
pub(super) enum CopyFault {
    /// The owner revoked the region meanwhile.
    Revoked,
    /// The process is gone, or the link is ending.
    Gone,
    /// The kernel refused.
    Error(TransferError),
}

/// Copies `slice` under `access` as long as `go_on` says that the process lives and the copy is wanted.
///
/// # Errors
/// [`CopyFault`]; a part of the bytes may have arrived.
pub(super) fn copy(
    process: RemoteProcess,
    slice: &Slice,
    access: &Access<'_>,
    peer: &Peer,
    go_on: impl Fn() -> bool,
) -> Result<(), CopyFault> {
    match process.copy(slice.opcode, slice.local, slice.target, access, go_on) {
        RemoteCopy::Done => Ok(()),
        RemoteCopy::Revoked => Err(CopyFault::Revoked),
        RemoteCopy::Stopped => Err(CopyFault::Gone),
        RemoteCopy::Failed(_, error) if error.raw_os_error() == Some(libc::ESRCH) => Err(CopyFault::Gone),
        RemoteCopy::Failed(done, error) => {
            let at = slice.target.addr() + done;
            let rest = ByteRange::new(at, slice.target.len() - done).unwrap_or(slice.target);
            if error.raw_os_error() == Some(libc::EPERM) {
                let what = format!("{} to {} of segment {}", TransportKind::Cma.name(), peer.address, peer.segment);
                return Err(CopyFault::Error(TransferError::Unavailable { what, reason: refusal(&error) }));
            }
            Err(CopyFault::Error(TransferError::Os {
                call: "process_vm_readv/writev",
                errno: error.raw_os_error().unwrap_or(0),
                reason: format!("{error} at {rest} of segment {} of peer {}", peer.segment, peer.address),
            }))
        }
    }
}
