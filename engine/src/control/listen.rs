//! Listeners on exactly the address asked for, with a fixed port or one drawn from a range.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs},
    ops::RangeInclusive,
};

use socket2::{Domain, Protocol, Socket, Type};
use tidewire_core::mooncake::host::{DEFAULT_PORT_RANGE, HostPort, unbracket};

use super::ControlError;

/// Draws from a range before giving up, as many as Mooncake makes.
const DRAWS: usize = 500;
/// Connections the kernel holds before they are accepted.
const BACKLOG: i32 = 1024;

/// Which port to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortChoice {
    /// This one; 0 lets the kernel choose.
    Fixed(u16),
    /// A free one of these, drawn at random.
    Range(RangeInclusive<u16>),
}

impl Default for PortChoice {
    fn default() -> Self {
        PortChoice::Range(DEFAULT_PORT_RANGE)
    }
}

/// Opens a non-blocking listener on `host` and nowhere else (a wildcard address is the caller's explicit choice).
///
/// A name is resolved and its first address taken; this may block. `host` may be bracketed.
///
/// # Errors
/// [`ControlError::Resolve`], [`ControlError::Listen`].
pub fn listen(host: &str, port: &PortChoice) -> Result<TcpListener, ControlError> {
    let ip = resolve(host)?;
    match port {
        PortChoice::Fixed(port) => {
            let address = SocketAddr::new(ip, *port);
            open(address).map_err(|source| ControlError::Listen { address: address.to_string(), source })
        }
        PortChoice::Range(range) => draw(ip, range).map_err(|source| {
            let address = format!("{}-{}", SocketAddr::new(ip, *range.start()), range.end());
            ControlError::Listen { address, source }
        }),
    }
}

fn draw(ip: IpAddr, range: &RangeInclusive<u16>) -> io::Result<TcpListener> {
    let ports = u64::from(range.end().saturating_sub(*range.start())) + 1;
    for _ in 0..DRAWS {
        let offset = getrandom::u64().map_err(|e| io::Error::other(e.to_string()))? % ports;
        match open(SocketAddr::new(ip, range.start().saturating_add(offset as u16))) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            done => return done,
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

fn open(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.cloexec(), Some(Protocol::TCP))?;
    // Lets a restarted process have its port back at once; two listeners on one port are refused all the same.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn resolve(host: &str) -> Result<IpAddr, ControlError> {
    let host = unbracket(host);
    if let Ok(ip) = host.parse() {
        return Ok(ip);
    }
    let failed = |source| ControlError::Resolve { address: HostPort::new(host, 0).to_string(), source };
    let found = (host, 0).to_socket_addrs().map_err(failed)?.next();
    found.map(|address| address.ip()).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
}
