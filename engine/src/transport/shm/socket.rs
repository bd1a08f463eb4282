//! Packet sockets of the same-host protocol, and the epoll set they live in.
//!
//! Nothing here blocks. What cannot be sent at once waits in the channel's outbox, which the loop empties when the socket
//! is writable again.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex},
};

use rustix::{
    event::epoll,
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen,
        recvmsg, sendmsg, shutdown, socket_with,
    },
};
use tidewire_core::local::{MAX_PACKET_BYTES, Message};

use crate::memory::lock;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 256;

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Listens on the abstract name.
pub(super) fn listen_on(name: &str) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    bind(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Connects to the abstract name.
pub(super) fn connect_to(name: &str) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    connect(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
    Ok(socket)
}

/// A message and the file that travels with it.
#[derive(Debug)]
pub(super) struct Packet {
    bytes: Vec<u8>,
    file: Option<OwnedFd>,
}

impl Packet {
    /// A message without a file.
    pub(super) fn new(message: &Message) -> Self {
        Packet { bytes: message.encode(), file: None }
    }

    /// A message with a file.
    pub(super) fn with_file(message: &Message, file: OwnedFd) -> Self {
        Packet { bytes: message.encode(), file: Some(file) }
    }
}

/// What a read gave.
#[derive(Debug)]
pub(super) enum Received {
    /// A packet.
    Message(Message, Option<OwnedFd>),
    /// Nothing now.
    Nothing,
    /// The peer hung up.
    Closed,
}

/// Sends one packet without blocking.
pub(super) fn send_packet(socket: BorrowedFd<'_>, packet: &Packet) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = packet.file.as_ref().map(|f| [f.as_fd()]);
    if let Some(files) = &files
        && !control.push(SendAncillaryMessage::ScmRights(files))
    {
        return Err(Errno::NOBUFS);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(&packet.bytes)], &mut control, flags).map(|_| ())
}

/// Reads one packet without blocking.
///
/// # Errors
/// errno of the read; `InvalidData` for bytes that are not the protocol.
pub(super) fn receive(socket: BorrowedFd<'_>) -> io::Result<Received> {
    let mut bytes = [0u8; MAX_PACKET_BYTES + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
        Ok(got) => got,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
        Err(error) => return Err(error.into()),
    };
    let file = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    if got.bytes == 0 {
        return Ok(Received::Closed);
    }
    if got.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "packet too long"));
    }
    let packet = bytes.get(..got.bytes).unwrap_or(&bytes);
    let message = Message::decode(packet).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    Ok(Received::Message(message, file))
}

/// The epoll set of the loop.
#[derive(Debug)]
pub(super) struct Poller {
    set: OwnedFd,
}

impl Poller {
    /// An empty set.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Poller { set: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    /// Watches for readability under `key`.
    pub(super) fn add(&self, fd: impl AsFd, key: u64) -> io::Result<()> {
        Ok(epoll::add(&self.set, fd, epoll::EventData::new_u64(key), epoll::EventFlags::IN)?)
    }

    /// Changes what is watched for.
    pub(super) fn watch(&self, fd: impl AsFd, key: u64, flags: epoll::EventFlags) -> io::Result<()> {
        Ok(epoll::modify(&self.set, fd, epoll::EventData::new_u64(key), flags)?)
    }

    /// Stops watching; unknown descriptors are no error.
    pub(super) fn remove(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.set, fd);
    }

    /// Waits for events, at most `timeout`.
    pub(super) fn wait(&self, events: &mut Vec<epoll::Event>, timeout: Option<std::time::Duration>) -> io::Result<()> {
        let timeout = timeout.map(|t| rustix::event::Timespec {
            tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(t.subsec_nanos()),
        });
        events.clear();
        match epoll::wait(&self.set, rustix::buffer::spare_capacity(events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A connected socket in the loop's set.
#[derive(Debug)]
pub(super) struct Channel {
    socket: OwnedFd,
    poller: Arc<Poller>,
    key: u64,
    outbox: Mutex<VecDeque<Packet>>,
    /// Whether a full outbox stops reading: the owner does that, so that a peer that does not read cannot make it pile up
    /// answers.
    stop_reading: bool,
}

impl Channel {
    /// Puts `socket` into the set under `key`.
    pub(super) fn new(socket: OwnedFd, poller: &Arc<Poller>, key: u64, stop_reading: bool) -> io::Result<Self> {
        poller.add(&socket, key)?;
        Ok(Channel { socket, poller: Arc::clone(poller), key, outbox: Mutex::default(), stop_reading })
    }

    /// Sends now, or as soon as the socket takes more.
    ///
    /// # Errors
    /// errno of the send: the connection is of no use then.
    pub(super) fn send(&self, packet: Packet) -> io::Result<()> {
        let mut outbox = lock(&self.outbox);
        if outbox.is_empty() {
            match send_packet(self.socket.as_fd(), &packet) {
                Ok(()) => return Ok(()),
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
            self.watch_outbox(true)?;
        }
        outbox.push_back(packet);
        Ok(())
    }

    /// Sends what waits; called when the socket is writable.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub(super) fn flush(&self) -> io::Result<()> {
        let mut outbox = lock(&self.outbox);
        while let Some(packet) = outbox.front() {
            match send_packet(self.socket.as_fd(), packet) {
                Ok(()) => drop(outbox.pop_front()),
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        self.watch_outbox(false)
    }

    fn watch_outbox(&self, waiting: bool) -> io::Result<()> {
        let flags = match (waiting, self.stop_reading) {
            (false, _) => epoll::EventFlags::IN,
            (true, false) => epoll::EventFlags::IN | epoll::EventFlags::OUT,
            (true, true) => epoll::EventFlags::OUT,
        };
        self.poller.watch(&self.socket, self.key, flags)
    }

    /// Reads one packet.
    ///
    /// # Errors
    /// As [`receive`].
    pub(super) fn receive(&self) -> io::Result<Received> {
        receive(self.socket.as_fd())
    }

    /// Takes the socket out of the set and hangs up.
    pub(super) fn close(&self) {
        self.poller.remove(&self.socket);
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}
