//! Socket IO straight between a socket and registered memory.
//!
//! The only code besides the same-host transports that dereferences registered addresses. A [`Span`] names bytes of
//! registered memory; whoever holds one also holds what keeps them alive: a slice token (the batch pins its regions) or a
//! [`RegionPin`](super::RegionPin).
//!
//! Invariants:
//! * a [`Cursor`] never passes the end of its spans;
//! * nothing here blocks: every call is `MSG_DONTWAIT`, and never raises `SIGPIPE`.
#![allow(unsafe_code, reason = "reads and writes registered memory by address")]

use std::{
    io,
    marker::PhantomData,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd},
};

use tidewire_core::ByteRange;

/// Most parts of one system call. The kernel's limit is 1024; past a few dozen the call costs nothing more per part.
const MAX_PARTS: usize = 512;

/// Some bytes of registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    addr: u64,
    len: u64,
}

impl Span {
    /// The bytes of `range`, which the caller knows to lie in a region that is pinned as long as the span is used.
    pub(crate) fn pinned(range: ByteRange) -> Self {
        Span { addr: range.addr(), len: range.len() }
    }
}

/// A list of spans and a position in it.
#[derive(Debug, Default)]
pub(crate) struct Cursor {
    spans: Vec<Span>,
    index: usize,
    offset: u64,
    left: u64,
}

impl Cursor {
    /// Appends a span; one that continues the last is merged with it.
    pub(crate) fn push(&mut self, span: Span) {
        self.left += span.len;
        match self.spans.last_mut() {
            Some(last) if last.addr + last.len == span.addr => last.len += span.len,
            _ => self.spans.push(span),
        }
    }

    /// Bytes from the position to the end.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// Empties the list and keeps its memory.
    pub(crate) fn clear(&mut self) {
        self.spans.clear();
        (self.index, self.offset, self.left) = (0, 0, 0);
    }

    /// Moves the position by `count` bytes (at most [`Cursor::left`]) and shows each piece passed.
    fn advance(&mut self, count: u64, mut passed: impl FnMut(u64, u64)) {
        let mut count = count.min(self.left);
        self.left -= count;
        while count > 0 {
            let Some(span) = self.spans.get(self.index) else { return };
            let piece = count.min(span.len - self.offset);
            passed(span.addr + self.offset, piece);
            self.offset += piece;
            count -= piece;
            if self.offset == span.len {
                self.index += 1;
                self.offset = 0;
            }
        }
    }

    /// Skips `count` bytes.
    pub(crate) fn skip(&mut self, count: u64) {
        self.advance(count, |_, _| {});
    }

    /// Skips `count` bytes and adds them to a CRC32C.
    pub(crate) fn skip_with_crc(&mut self, count: u64, crc: u32) -> u32 {
        let mut crc = crc;
        self.advance(count, |addr, len| crc = add_crc(crc, addr, len));
        crc
    }

    /// CRC32C of the bytes from the position to the end.
    pub(crate) fn crc(&self) -> u32 {
        self.parts().fold(0, |crc, (addr, len)| add_crc(crc, addr, len))
    }

    /// Copies the front of `bytes` into the memory at the position and moves it; bytes taken and the new CRC32C.
    pub(crate) fn place(&mut self, bytes: &[u8], crc: Option<u32>) -> (usize, Option<u32>) {
        let count = self.left.min(bytes.len() as u64);
        let mut from = 0;
        self.advance(count, |addr, len| {
            let piece = &bytes[from..from + len as usize];
            // SAFETY: the span lies in pinned registered memory (module contract), which the registration says is
            // writable; the piece is `len` bytes. A source that is itself inside the target is refused by `advance`'s
            // caller never handing out its own stage buffer as registered memory.
            unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), addr as *mut u8, piece.len()) };
            from += len as usize;
        });
        let crc = crc.map(|crc| crc32c::crc32c_append(crc, &bytes[..from]));
        (from, crc)
    }

    fn parts(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let first = self.offset;
        self.spans.iter().skip(self.index).enumerate().map(move |(i, span)| {
            let skip = if i == 0 { first } else { 0 };
            (span.addr + skip, span.len - skip)
        })
    }
}

fn add_crc(crc: u32, addr: u64, len: u64) -> u32 {
    // SAFETY: the span lies in pinned registered memory (module contract). Another process or thread may change the
    // bytes meanwhile; then the checksum is of some mix of them, which is all a checksum of changing bytes can be.
    let bytes = unsafe { std::slice::from_raw_parts(addr as *const u8, len as usize) };
    crc32c::crc32c_append(crc, bytes)
}

/// Parts of one vectored call.
pub(crate) struct Parts<'a> {
    /// The first `used` are set; setting all of them would cost more than the rest of a small call.
    parts: [MaybeUninit<libc::iovec>; MAX_PARTS],
    used: usize,
    bytes: u64,
    borrowed: PhantomData<&'a mut [u8]>,
}

impl<'a> Parts<'a> {
    /// No parts.
    pub(crate) fn new() -> Self {
        Parts { parts: [MaybeUninit::uninit(); MAX_PARTS], used: 0, bytes: 0, borrowed: PhantomData }
    }

    /// Bytes of all parts.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether no part fits any more.
    pub(crate) fn is_full(&self) -> bool {
        self.used == MAX_PARTS
    }

    fn push(&mut self, addr: u64, len: u64) {
        if let Some(slot) = self.parts.get_mut(self.used) {
            slot.write(libc::iovec { iov_base: addr as *mut libc::c_void, iov_len: len as usize });
            self.used += 1;
            self.bytes += len;
        }
    }

    /// Appends bytes to send.
    pub(crate) fn push_bytes(&mut self, bytes: &'a [u8]) {
        if !bytes.is_empty() {
            self.push(bytes.as_ptr() as u64, bytes.len() as u64);
        }
    }

    /// Appends room to receive into.
    pub(crate) fn push_room(&mut self, room: &'a mut [u8]) {
        if !room.is_empty() {
            self.push(room.as_mut_ptr() as u64, room.len() as u64);
        }
    }

    /// Appends registered memory from the position of `cursor`, at most `limit` bytes; whether all of the rest went in.
    pub(crate) fn push_cursor(&mut self, cursor: &Cursor, limit: u64) -> bool {
        let mut room = limit;
        for (addr, len) in cursor.parts() {
            if self.is_full() || room == 0 {
                return false;
            }
            let len_now = len.min(room);
            self.push(addr, len_now);
            room -= len_now;
            if len_now < len {
                return false;
            }
        }
        true
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: `msghdr` is plain data; all zeroes is its empty value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.parts.as_mut_ptr().cast();
        message.msg_iovlen = self.used as _;
        message
    }

    /// Sends the parts; bytes taken by the socket.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let message = self.message();
        loop {
            // SAFETY: the first `used` parts are set; each is borrowed for `'a` or lies in pinned registered memory (module contract).
            let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
            if let Some(result) = finished(sent) {
                return result;
            }
        }
    }

    /// Receives into the parts, in order; 0 is the end of the stream.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut message = self.message();
        loop {
            // SAFETY: the first `used` parts are set; each is exclusively borrowed for `'a` or lies in pinned registered memory that the
            // registration made writable (module contract).
            let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
            if let Some(result) = finished(got) {
                return result;
            }
        }
    }
}

fn finished(result: isize) -> Option<io::Result<usize>> {
    if result >= 0 {
        return Some(Ok(result as usize));
    }
    let error = io::Error::last_os_error();
    (error.kind() != io::ErrorKind::Interrupted).then_some(Err(error))
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, os::fd::AsFd};

    use super::*;

    fn span(bytes: &mut [u8]) -> Span {
        Span { addr: bytes.as_mut_ptr() as u64, len: bytes.len() as u64 }
    }

    #[test]
    fn scattered_bytes_arrive_in_order_and_the_tail_behind_them() -> io::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let a = std::net::TcpStream::connect(listener.local_addr()?)?;
        let (b, _) = listener.accept()?;
        let (mut x, mut y, mut z) = (vec![1u8; 3], vec![2u8; 5], vec![9u8; 10]);
        let mut out = Cursor::default();
        out.push(span(&mut x));
        out.push(span(&mut y));
        let mut parts = Parts::new();
        parts.push_bytes(b"hi");
        assert!(parts.push_cursor(&out, u64::MAX));
        parts.push_bytes(b"tail");
        assert_eq!(parts.send(a.as_fd())?, 14);

        let (mut p, mut q) = (vec![0u8; 2], vec![0u8; 8]);
        let mut inward = Cursor::default();
        inward.push(span(&mut p));
        inward.push(span(&mut q));
        let mut parts = Parts::new();
        assert!(parts.push_cursor(&inward, u64::MAX));
        parts.push_room(&mut z);
        let got = parts.receive(b.as_fd())?;
        assert_eq!(got, 14);
        inward.skip(10);
        assert_eq!(inward.left(), 0);
        assert_eq!((p, q, &z[..4]), (b"hi".to_vec(), vec![1, 1, 1, 2, 2, 2, 2, 2], b"tail".as_slice()));
        Ok(())
    }

    #[test]
    fn place_stops_at_the_end_and_sums_what_it_took() {
        let mut memory = vec![0u8; 6];
        let mut cursor = Cursor::default();
        let (left, right) = memory.split_at_mut(2);
        cursor.push(span(left));
        cursor.push(span(right));
        let (took, crc) = cursor.place(b"abcdefgh", Some(0));
        assert_eq!((took, crc), (6, Some(crc32c::crc32c(b"abcdef"))));
        assert_eq!(memory, b"abcdef");
    }
}
