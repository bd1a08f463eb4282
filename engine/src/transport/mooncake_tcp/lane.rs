//! One connection to a target: requests go out back to back, replies come in in the same order.
//!
//! A lane owns the requests it was given until each is settled or handed back by [`Lane::close`]. Payload moves straight
//! between the socket and registered memory; several requests share one system call.
//!
//! Version 1 has no reply to a write, so there a lane carries one request: after a write it half-closes, and the write is
//! done when the target closes in order. A target that refuses closes with bytes unread, which arrives as a reset.
//!
//! Invariants:
//! * replies are matched to requests in order; `sent` requests at the front have left completely;
//! * registered memory is touched only inside [`Lane::ready`] and [`Lane::send`], so a lane that is dropped touches nothing.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::event::epoll::EventFlags;
use socket2::SockRef;
use tidewire_core::{
    Opcode,
    mooncake::data::{DataStatus, HEADER_BYTES, STATUS_BYTES},
};

use super::request::Request;
use crate::memory::io::Parts;

/// Bytes handed to one system call.
const CALL_BYTES: u64 = 1 << 20;
/// Replies taken by one system call.
const CALL_REPLIES: usize = 256;
/// System calls per direction before other lanes have their turn.
const ROUNDS: usize = 8;
/// Requests on a lane at a time.
const WINDOW_REQUESTS: usize = 512;
/// Bytes on a lane at a time; one request may exceed it.
const WINDOW_BYTES: u64 = 8 << 20;

/// How a lane ends.
#[derive(Debug)]
pub(super) enum End {
    /// The connection could not be made.
    NotConnected(io::Error),
    /// The target refused the first request; it did nothing about those behind it.
    Rejected,
    /// The target sent what is not the protocol, about the first request.
    Protocol(String),
    /// The connection broke or was closed.
    Lost(io::Error),
}

/// One connection.
#[derive(Debug)]
pub(super) struct Lane {
    socket: OwnedFd,
    connected: bool,
    acknowledged: bool,
    /// Takes no more requests: version 1 was given its one, or another lane to the same peer was lost.
    used_up: bool,
    send_ended: bool,
    queue: VecDeque<Request>,
    /// Requests at the front of `queue` that have left.
    sent: usize,
    bytes: u64,
    status: [u8; STATUS_BYTES],
    status_got: usize,
    /// What the poller watches.
    pub(super) interest: EventFlags,
    /// Last time bytes moved, or the lane went from idle to busy.
    pub(super) progress: Instant,
    /// The link it serves.
    pub(super) link: u64,
}

impl Lane {
    /// A lane over a socket that is connected or being connected. `acknowledged` is version 2.
    pub(super) fn new(socket: OwnedFd, connected: bool, acknowledged: bool, link: u64, now: Instant) -> Self {
        Lane {
            socket,
            connected,
            acknowledged,
            used_up: false,
            send_ended: false,
            queue: VecDeque::new(),
            sent: 0,
            bytes: 0,
            status: [0; STATUS_BYTES],
            status_got: 0,
            interest: EventFlags::empty(),
            progress: now,
            link,
        }
    }

    pub(super) fn socket(&self) -> impl AsFd + '_ {
        self.socket.as_fd()
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connected
    }

    /// Bytes of the requests on the lane.
    pub(super) fn backlog_bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether time counts against the peer.
    pub(super) fn is_waiting(&self) -> bool {
        !self.connected || !self.queue.is_empty()
    }

    /// Whether another request may be given.
    pub(super) fn has_room(&self) -> bool {
        let roomy = self.queue.len() < WINDOW_REQUESTS && self.bytes < WINDOW_BYTES;
        self.connected && !self.send_ended && !self.used_up && roomy
    }

    /// Gives the lane no more requests; whether it can go now.
    pub(super) fn retire(&mut self) -> bool {
        self.used_up = true;
        self.queue.is_empty()
    }

    /// Whether it counts against the connections of its peer. Retired ones do not: they may be dead.
    pub(super) fn counts(&self) -> bool {
        !self.acknowledged || !self.used_up
    }

    /// Whether its work is done and it cannot be given more.
    pub(super) fn is_spent(&self) -> bool {
        self.used_up && self.queue.is_empty()
    }

    pub(super) fn push(&mut self, request: Request, now: Instant) {
        if self.queue.is_empty() {
            self.progress = now;
        }
        self.used_up |= !self.acknowledged;
        self.bytes += request.target.len();
        self.queue.push_back(request);
    }

    /// Whether a request satisfies `test`.
    pub(super) fn any(&self, test: impl Fn(&Request) -> bool) -> bool {
        self.queue.iter().any(test)
    }

    /// Closes and hands the requests back in order. With requests open it resets the connection, so that the target drops
    /// what it has not placed.
    pub(super) fn close(self) -> VecDeque<Request> {
        if !self.queue.is_empty() {
            // Failing to set the option only turns the reset into an ordinary close.
            let _ = SockRef::from(&self.socket).set_linger(Some(Duration::ZERO));
        }
        self.queue
    }

    /// What the poller should watch now.
    pub(super) fn wanted(&self) -> EventFlags {
        let sending = self.connected && !self.send_ended && self.sent < self.queue.len();
        let out = if sending || !self.connected { EventFlags::OUT } else { EventFlags::empty() };
        out | EventFlags::IN
    }

    /// Moves what can be moved. Completed requests are settled here; `Err` ends the lane, with the requests that are left
    /// still on it (the first is the one an [`End::Rejected`] or [`End::Protocol`] is about).
    pub(super) fn ready(&mut self, now: Instant) -> Result<(), End> {
        if !self.connected {
            let socket = SockRef::from(&self.socket);
            if let Some(error) = socket.take_error().map_err(End::NotConnected)? {
                return Err(End::NotConnected(error));
            }
            if socket.peer_addr().is_err() {
                return Ok(());
            }
            self.connected = true;
            self.progress = now;
        }
        self.receive(now)?;
        self.send(now);
        if self.send_ended && self.acknowledged {
            // What the target said before it closed is still to be read; then its close is seen.
            self.receive(now)?;
        }
        Ok(())
    }

    /// Sends what the socket takes. A broken connection is noticed by the next receive, after the last replies.
    pub(super) fn send(&mut self, now: Instant) {
        for _ in 0..ROUNDS {
            if self.send_ended || !self.connected {
                return;
            }
            let mut parts = Parts::new();
            for request in self.queue.iter().skip(self.sent) {
                parts.push_bytes(request.header.get(request.header_sent..).unwrap_or_default());
                let room = CALL_BYTES.saturating_sub(parts.bytes());
                let whole = request.opcode == Opcode::Read || parts.push_cursor(&request.body, room);
                if !whole || parts.is_full() || parts.bytes() >= CALL_BYTES {
                    break;
                }
            }
            let offered = parts.bytes();
            if offered == 0 {
                return;
            }
            match parts.send(self.socket.as_fd()) {
                Ok(count) => {
                    self.progress = now;
                    self.note_sent(count);
                    if (count as u64) < offered {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.send_ended = true,
            }
        }
    }

    fn note_sent(&mut self, mut count: usize) {
        while let Some(request) = self.queue.get_mut(self.sent) {
            let head = count.min(HEADER_BYTES - request.header_sent);
            request.header_sent += head;
            count -= head;
            if request.opcode == Opcode::Write {
                let body = request.body.left().min(count as u64);
                request.body.skip(body);
                count -= body as usize;
            }
            let body_left = request.opcode == Opcode::Write && request.body.left() != 0;
            if request.header_sent < HEADER_BYTES || body_left {
                return;
            }
            self.sent += 1;
            if request.opcode == Opcode::Write && !self.acknowledged {
                // Version 1: the target's close is the acknowledgement.
                let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
                self.send_ended = true;
            }
            if count == 0 {
                return;
            }
        }
    }

    fn receive(&mut self, now: Instant) -> Result<(), End> {
        for _ in 0..ROUNDS {
            let mut statuses = [[0; STATUS_BYTES]; CALL_REPLIES];
            let (asked, result) = self.receive_once(&mut statuses);
            match result {
                Ok(0) => return self.at_end(),
                Ok(count) => {
                    self.progress = now;
                    self.settle(count, &statuses)?;
                    if (count as u64) < asked {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(End::Lost(error)),
            }
        }
        Ok(())
    }

    /// One system call for the replies to come, in order. Payloads behind a refusal never come, so memory that is offered
    /// for them early stays as it is.
    fn receive_once(&self, statuses: &mut [[u8; STATUS_BYTES]; CALL_REPLIES]) -> (u64, io::Result<usize>) {
        let mut parts = Parts::new();
        let mut got = self.status_got;
        for (index, (request, status)) in self.queue.iter().zip(statuses.iter_mut()).enumerate() {
            if self.acknowledged {
                parts.push_room(status.get_mut(got..).unwrap_or_default());
            }
            got = 0;
            let room = CALL_BYTES.saturating_sub(parts.bytes());
            let whole = request.opcode == Opcode::Write || parts.push_cursor(&request.body, room);
            // Nothing can come for requests that have not left yet, except a refusal of the first of them.
            if !whole || index >= self.sent || parts.is_full() {
                break;
            }
        }
        let mut nothing_expected = [0; 1];
        if parts.bytes() == 0 {
            parts.push_room(&mut nothing_expected);
        }
        (parts.bytes(), parts.receive(self.socket.as_fd()))
    }

    fn settle(&mut self, mut count: usize, statuses: &[[u8; STATUS_BYTES]; CALL_REPLIES]) -> Result<(), End> {
        let mut statuses = statuses.iter();
        while count > 0 {
            let Some(request) = self.queue.front_mut() else {
                return Err(End::Protocol("bytes without a request".to_owned()));
            };
            if self.acknowledged {
                let came = statuses.next().copied().unwrap_or_default();
                let end = (self.status_got + count).min(STATUS_BYTES);
                let fresh = self.status_got..end;
                count -= fresh.len();
                for (to, from) in self.status.iter_mut().zip(came).take(end).skip(fresh.start) {
                    *to = from;
                }
                self.status_got = end;
                if self.status_got < STATUS_BYTES {
                    return Ok(());
                }
                match DataStatus::decode(self.status) {
                    Ok(DataStatus::Ok) => {}
                    Ok(DataStatus::Rejected) => return Err(End::Rejected),
                    Ok(DataStatus::Unknown(code)) => return Err(End::Protocol(format!("status code {code}"))),
                    Err(error) => return Err(End::Protocol(error.to_string())),
                }
                if self.sent == 0 {
                    return Err(End::Protocol("acknowledged before everything was sent".to_owned()));
                }
            }
            if request.opcode == Opcode::Read {
                let body = request.body.left().min(count as u64);
                request.body.skip(body);
                count -= body as usize;
                if request.body.left() != 0 {
                    return Ok(());
                }
            } else if !self.acknowledged {
                return Err(End::Protocol("bytes in reply to a version 1 write".to_owned()));
            }
            self.complete_first();
        }
        Ok(())
    }

    fn complete_first(&mut self) {
        self.status_got = 0;
        self.sent = self.sent.saturating_sub(1);
        if let Some(request) = self.queue.pop_front() {
            self.bytes -= request.target.len();
            request.complete();
        }
    }

    fn at_end(&mut self) -> Result<(), End> {
        let version_1_write = !self.acknowledged
            && self.sent == 1
            && self.queue.front().is_some_and(|request| request.opcode == Opcode::Write);
        if version_1_write {
            self.complete_first();
            return Ok(());
        }
        Err(End::Lost(io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the peer")))
    }
}
