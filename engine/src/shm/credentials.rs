//! Who is at the other end of a Unix socket.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Process and user at the other end, as they were when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PeerCredentials {
    /// Process id; 0 when the process is in another pid namespace.
    pub(crate) pid: i32,
    /// Effective user id.
    pub(crate) uid: u32,
}

/// Asks the kernel (`SO_PEERCRED`). Done here by hand because a pid of 0 must be representable.
///
/// # Errors
/// errno of `getsockopt(2)`.
pub(crate) fn peer_credentials(socket: BorrowedFd<'_>) -> io::Result<PeerCredentials> {
    let mut found = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the value and its length are alive during the call, and the length is the value's.
    let rc = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut found).cast(), &raw mut len)
    };
    if rc == 0 { Ok(PeerCredentials { pid: found.pid, uid: found.uid }) } else { Err(io::Error::last_os_error()) }
}
