//! The socket in the face of strangers.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod faults;

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{SendAncillaryBuffer, SendFlags, sendmsg},
};
use tidewire_core::{ByteRange, Generation, Location, error::RefuseReason, local::Message};

use super::{
    socket::{Packet, Received, connect_to, receive, send_packet},
    *,
};
use crate::shm::ControlPage;

fn host(options: SameHostOptions) -> (Arc<SameHost>, Arc<Identity>, Arc<RegionTable>) {
    let identity = Arc::new(Identity {
        segment: "owner".to_owned(),
        generation: Generation(7),
        token: [9; 16],
        host_id: host_id().unwrap(),
    });
    let regions = Arc::new(RegionTable::default());
    let host = SameHost::start(Arc::clone(&identity), Arc::clone(&regions), options).unwrap();
    (host, identity, regions)
}

fn hello(identity: &Identity) -> Message {
    let (generation, token) = (identity.generation, identity.token);
    Message::Hello { version: 1, generation, token, name: "tester".to_owned() }
}

fn hear(socket: &OwnedFd) -> io::Result<Received> {
    let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&limit)).unwrap();
    assert_eq!(ready, 1, "nothing came");
    receive(socket.as_fd())
}

fn is_hung_up(socket: &OwnedFd) -> bool {
    matches!(hear(socket), Ok(Received::Closed) | Err(_))
}

fn send_raw(socket: &OwnedFd, bytes: &[u8]) {
    sendmsg(socket, &[IoSlice::new(bytes)], &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL).unwrap();
}

fn attach_with_page(host: &SameHost, identity: &Identity) -> (OwnedFd, ControlPage) {
    let socket = connect_to(host.socket_name()).unwrap();
    send_packet(socket.as_fd(), &Packet::new(&hello(identity))).unwrap();
    match hear(&socket) {
        Ok(Received::Message(Message::Welcome { probe_word, .. }, Some(file))) => {
            let page = ControlPage::attach(file.as_fd()).unwrap();
            assert_eq!(page.probe_word(), probe_word);
            (socket, page)
        }
        other => panic!("{other:?}"),
    }
}

fn attach(host: &SameHost, identity: &Identity) -> OwnedFd {
    attach_with_page(host, identity).0
}

fn ask(peer: &OwnedFd, addr: u64) -> Message {
    let range = ByteRange::new(addr, 1).unwrap();
    send_packet(peer.as_fd(), &Packet::new(&Message::Ask { id: 1, range, want_file: true })).unwrap();
    match hear(peer) {
        Ok(Received::Message(message, _)) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn garbage_ends_the_connection_and_nothing_else() {
    let (host, identity, _) = host(SameHostOptions::default());
    let good = attach(&host, &identity);
    let mut cut = hello(&identity).encode();
    cut.truncate(12);
    for bytes in [b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0; 3000], vec![1], cut] {
        let stranger = connect_to(host.socket_name()).unwrap();
        send_raw(&stranger, &bytes);
        assert!(is_hung_up(&stranger));
        // Also after a good hello.
        let peer = attach(&host, &identity);
        send_raw(&peer, &bytes);
        assert!(is_hung_up(&peer));
    }
    let stranger = connect_to(host.socket_name()).unwrap();
    send_packet(stranger.as_fd(), &Packet::new(&Message::Release { slot: 0, sequence: 3 })).unwrap();
    assert!(is_hung_up(&stranger), "a message before the hello");
    let range = ByteRange::new(4096, 1).unwrap();
    send_packet(good.as_fd(), &Packet::new(&Message::Ask { id: 5, range, want_file: true })).unwrap();
    assert!(matches!(hear(&good), Ok(Received::Message(Message::Deny { id: 5, .. }, None))));
}

#[test]
fn wrong_version_token_and_generation_are_told_apart() {
    let (host, identity, _) = host(SameHostOptions::default());
    let Message::Hello { generation, token, .. } = hello(&identity) else { return };
    let name = String::new();
    let cases = [
        (Message::Hello { version: 2, generation, token, name: name.clone() }, RefuseReason::Version),
        (Message::Hello { version: 1, generation, token: [8; 16], name: name.clone() }, RefuseReason::Token),
        (Message::Hello { version: 1, generation: Generation(6), token, name }, RefuseReason::Generation),
    ];
    for (message, expected) in cases {
        let socket = connect_to(host.socket_name()).unwrap();
        send_packet(socket.as_fd(), &Packet::new(&message)).unwrap();
        match hear(&socket) {
            Ok(Received::Message(Message::Refuse { reason }, None)) => assert_eq!(reason, expected),
            other => panic!("{expected:?}: {other:?}"),
        }
        assert!(is_hung_up(&socket));
    }
}

#[test]
fn a_thousand_silent_connections_delay_nobody_and_are_hung_up_on() {
    let short = Duration::from_millis(1500);
    crate::runtime::descriptors::raise_limit();
    let (host, identity, _) =
        host(SameHostOptions { connect_timeout: short, max_peers: 1100, ..SameHostOptions::default() });
    let silent: Vec<_> = (0..1000).map_while(|_| connect_patiently(host.socket_name())).collect();
    // Each takes two descriptors on the other side too; where the limit is lower, fewer must do.
    assert!(silent.len() >= 100, "only {} connections", silent.len());
    let started = Instant::now();
    drop(attach(&host, &identity));
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert!(silent.iter().all(is_hung_up));
    drop(attach(&host, &identity));
}

/// The backlog is shorter than a thousand, so the listener may need a moment.
fn connect_patiently(name: &str) -> Option<OwnedFd> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match connect_to(name) {
            Ok(socket) => return Some(socket),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::yield_now();
            }
            Err(_) => return None,
        }
    }
}

#[test]
fn region_of_a_peer_that_never_uses_it_is_released_at_once() {
    let (host, identity, regions) = host(SameHostOptions::default());
    let memory = crate::memory::alloc::allocate(8192).unwrap();
    regions.register(memory.addr(), 8192, Location::Any, Some(memory.window(0))).unwrap();
    let peer = attach(&host, &identity);
    let granted = match ask(&peer, memory.addr() + 100) {
        Message::Grant { slot, sequence, region, file_offset: Some(0), .. } => {
            assert_eq!(region, ByteRange::new(memory.addr(), 8192).unwrap());
            (slot, sequence)
        }
        other => panic!("{other:?}"),
    };
    let started = Instant::now();
    regions.unregister(memory.addr(), Duration::from_secs(30), |_| Err("not reached".to_owned())).unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    match hear(&peer) {
        Ok(Received::Message(Message::Revoke { slot, sequence }, None)) => assert_eq!((slot, sequence), granted),
        other => panic!("{other:?}"),
    }
    assert!(matches!(ask(&peer, memory.addr()), Message::Deny { .. }));
    host.stop();
    assert!(is_hung_up(&peer));
}

#[test]
fn shutdown_lets_nobody_in_and_waits_for_who_is_inside() {
    let (host, identity, regions) = host(SameHostOptions::default());
    let memory = crate::memory::alloc::allocate(4096).unwrap();
    regions.register(memory.addr(), 4096, Location::Any, Some(memory.window(0))).unwrap();
    let (peer, page) = attach_with_page(&host, &identity);
    let Message::Grant { slot, sequence, .. } = ask(&peer, memory.addr()) else { panic!("no grant") };
    let inside = page.enter(slot, sequence).unwrap();
    let (entered, done) = mpsc::channel();
    std::thread::scope(|scope| {
        let transport = host.shm();
        scope.spawn(move || {
            transport.shutdown(Duration::from_secs(60));
            entered.send(()).unwrap();
        });
        while inside.still_granted() {
            std::thread::yield_now();
        }
        assert!(page.enter(slot, sequence).is_none());
        assert!(done.recv_timeout(Duration::from_millis(100)).is_err(), "shutdown did not wait");
        drop(inside);
        done.recv_timeout(Duration::from_secs(30)).unwrap();
    });
    let Message::Deny { .. } = ask(&peer, memory.addr()) else { panic!("granted after shutdown") };
}
