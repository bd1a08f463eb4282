//! Memory of another process, reached by address.

use std::io;

use tidewire_core::{ByteRange, Opcode};
use tidewire_sys::process_vm::{self, Part};

use super::Access;

/// Most bytes of one system call: between two calls the revocation and the life of the process are looked at again.
const CHUNK_BYTES: u64 = 4 << 20;

/// Another process, by id. Whoever holds this also watches a pidfd, since ids are used again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RemoteProcess {
    pid: i32,
}

/// How far a copy came, and why not further.
#[derive(Debug)]
pub(crate) enum RemoteCopy {
    /// Every byte is in place.
    Done,
    /// The owner revoked the region meanwhile.
    Revoked,
    /// The caller wanted no further chunk.
    Stopped,
    /// The kernel refused after this many bytes.
    Failed(u64, io::Error),
}

impl RemoteProcess {
    /// The process `pid` of this pid namespace.
    pub(crate) fn new(pid: i32) -> Self {
        RemoteProcess { pid }
    }

    /// Reads the eight bytes at `addr` of that process.
    ///
    /// # Errors
    /// errno of `process_vm_readv(2)`; `UnexpectedEof` on a short read.
    pub(crate) fn read_word(self, addr: u64) -> io::Result<u64> {
        let mut word = 0u64;
        let part = Part { local: (&raw mut word) as u64, remote: addr, len: size_of::<u64>() };
        // SAFETY: the local side is `word`, alive and not borrowed during the call.
        let moved = unsafe { process_vm::read(self.pid, &[part]) }?;
        if moved == size_of::<u64>() { Ok(word) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Copies between `local`, pinned by the slice's batch, and `target` of the other process, which `access` holds open.
    /// Before each chunk `go_on` is asked, which must know whether the process lives: its id may be another's by then.
    pub(crate) fn copy(
        self,
        opcode: Opcode,
        local: u64,
        target: ByteRange,
        access: &Access<'_>,
        go_on: impl Fn() -> bool,
    ) -> RemoteCopy {
        let mut done = 0;
        while done < target.len() {
            if !go_on() {
                return RemoteCopy::Stopped;
            }
            if !access.still_granted() {
                return RemoteCopy::Revoked;
            }
            let len = (target.len() - done).min(CHUNK_BYTES) as usize;
            let part = Part { local: local + done, remote: target.addr() + done, len };
            let moved = match opcode {
                // SAFETY: `local` is pinned memory of `target.len()` bytes.
                Opcode::Read => unsafe { process_vm::read(self.pid, &[part]) },
                // SAFETY: as above; the other process granted `target` and `access` keeps it from being taken back.
                Opcode::Write => unsafe { process_vm::write(self.pid, &[part]) },
            };
            match moved {
                Ok(0) => return RemoteCopy::Failed(done, io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => done += moved as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return RemoteCopy::Failed(done, error),
            }
        }
        RemoteCopy::Done
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::{cell::Cell, os::fd::AsFd};

    use super::*;
    use crate::shm::ControlPage;

    #[test]
    fn life_of_the_process_is_asked_before_every_chunk() {
        let (owner, file) = ControlPage::create(1).unwrap();
        let peer = ControlPage::attach(file.as_fd()).unwrap();
        let access = peer.enter(0, owner.grant(0, 0)).unwrap();
        let len = 2 * CHUNK_BYTES + 5;
        let (source, mut sink) = (vec![7u8; len as usize], vec![0u8; len as usize]);
        // This process stands for the other one; reading its own memory is never forbidden but by seccomp.
        let process = RemoteProcess::new(std::process::id().cast_signed());
        let target = ByteRange::new(sink.as_mut_ptr() as u64, len).unwrap();
        let asked = Cell::new(0);
        let go_on = || asked.replace(asked.get() + 1) < 1;
        match process.copy(Opcode::Write, source.as_ptr() as u64, target, &access, go_on) {
            RemoteCopy::Failed(_, error) if error.raw_os_error() == Some(libc::EPERM) => {
                eprintln!("SKIP cma: {error}");
                return;
            }
            outcome => assert!(matches!(outcome, RemoteCopy::Stopped), "{outcome:?}"),
        }
        let arrived = sink.iter().take_while(|b| **b == 7).count() as u64;
        assert_eq!((arrived, asked.get()), (CHUNK_BYTES, 2));
        let outcome = process.copy(Opcode::Write, source.as_ptr() as u64, target, &access, || true);
        assert!(matches!(outcome, RemoteCopy::Done) && sink == source, "{outcome:?}");
    }
}
