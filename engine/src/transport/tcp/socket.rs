//! Sockets of the native protocol: options, dialling, listening.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    os::fd::OwnedFd,
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use super::TcpOptions;

/// Sets what both sides want: no delay, keep-alive, buffers.
pub(super) fn configure(socket: &Socket, options: &TcpOptions) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(30)).with_interval(Duration::from_secs(10)).with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    if options.socket_buffer_bytes != 0 {
        // The kernel caps both at its own limits; a smaller buffer is slower, not wrong.
        let _ = socket.set_send_buffer_size(options.socket_buffer_bytes);
        let _ = socket.set_recv_buffer_size(options.socket_buffer_bytes);
    }
    Ok(())
}

/// Between two addresses of this host there is nothing to pace or to probe for, and a congestion control that does (BBR)
/// costs more than half of the rate: measured 2.9 GB/s against 6.2 GB/s for one raw stream. Reno is always there and
/// always permitted (`tcp(7)`).
pub(super) fn tune_for_peer(socket: &Socket, peer: IpAddr) {
    let local = socket.local_addr().ok().and_then(|a| a.as_socket()).map(|a| a.ip());
    if peer.is_loopback() || local == Some(peer) {
        // Left as it is, the connection is slower, not wrong.
        let _ = socket.set_tcp_congestion(b"reno");
    }
}

/// Starts a connection without waiting for it.
pub(super) fn dial(address: SocketAddr, options: &TcpOptions) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    configure(&socket, options)?;
    match socket.connect(&address.into()) {
        Ok(()) => {}
        Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(e) => return Err(e),
    }
    tune_for_peer(&socket, address.ip());
    Ok(socket.into())
}

/// Whether the peer reset the connection (bytes received before are void then).
pub(super) fn was_reset(socket: &OwnedFd) -> bool {
    SockRef::from(socket).take_error().map_or(true, |e| e.is_some())
}

/// Resets the connection, so that the peer drops what it has not placed yet and no thread waits on it any more.
///
/// Works while another thread still holds the descriptor: connecting a TCP socket to `AF_UNSPEC` aborts the connection
/// (`tcp(7)`, `connect(2)`).
pub(super) fn reset(socket: &OwnedFd) {
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
    if rustix::net::connect_unspec(socket).is_err() {
        let _ = SockRef::from(socket).shutdown(std::net::Shutdown::Both);
    }
}

/// Listens on `bind`, on the first free port of `ports` (0..=0 lets the system choose).
pub(super) fn listen(bind: IpAddr, ports: (u16, u16)) -> io::Result<(OwnedFd, u16)> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for port in ports.0..=ports.1 {
        let address = SocketAddr::new(bind, port);
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        // Connections of a former process in TIME_WAIT must not keep a fixed port from us.
        socket.set_reuse_address(true)?;
        match socket.bind(&address.into()).and_then(|()| socket.listen(1024)) {
            Ok(()) => {
                let bound = socket.local_addr()?.as_socket().map_or(0, |a| a.port());
                return Ok((socket.into(), bound));
            }
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => last = e,
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

/// Resolves `host:port`. Blocks for the resolver.
pub(super) fn resolve(host: &str, port: u16) -> io::Result<SocketAddr> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    (host, port).to_socket_addrs()?.next().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
}
