//! Connections to data ports.

use std::{
    io,
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};
use tidewire_core::mooncake::host::HostPort;

/// Resolves and connects, trying each address found. Blocks for the resolver, then for at most `timeout`.
pub(super) fn finish(address: &HostPort, timeout: Duration) -> io::Result<(OwnedFd, SocketAddr)> {
    let found = (address.host.as_str(), address.port).to_socket_addrs()?;
    let deadline = Instant::now() + timeout;
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for found in found {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let connected = TcpStream::connect_timeout(&found, left).and_then(|stream| {
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            Ok(stream)
        });
        match connected {
            Ok(stream) => return Ok((stream.into(), found)),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Starts a connection without waiting for it.
pub(super) fn start(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket.into()),
    }
}
