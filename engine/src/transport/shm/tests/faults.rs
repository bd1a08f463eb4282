//! Peers that vanish inside a region, files that get lost, descriptors that run out.

use rustix::{
    net::{SocketAddrUnix, SocketFlags, accept_with, connect},
    process::{Resource, Rlimit, getrlimit, setrlimit},
    time::{ClockId, clock_gettime},
};
use tidewire_core::{
    Opcode,
    mooncake::descriptor::{BufferDescriptor, NativeExtension, SegmentDescriptor},
};

use super::*;
use crate::{
    batch::BatchCore,
    transport::{Slice, shm::socket::listen_on},
};

const LIMIT: Duration = Duration::from_secs(10);

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn peer_that_hung_up_inside_a_region_is_forgotten_once_it_left() {
    let (host, identity, regions) = host(SameHostOptions::default());
    let memory = crate::memory::alloc::allocate(8192).unwrap();
    regions.register(memory.addr(), 8192, Location::Any, Some(memory.window(0))).unwrap();
    let (peer, page) = attach_with_page(&host, &identity);
    let Message::Grant { slot, sequence, .. } = ask(&peer, memory.addr()) else { panic!("no grant") };
    let inside = page.enter(slot, sequence).unwrap();
    drop(peer);
    wait_until("hang-up noticed", || !inside.still_granted());
    // Still inside: it counts, and the region is not free.
    let held = regions.unregister(memory.addr(), Duration::from_millis(150), |_| Err("inside".to_owned()));
    assert!(matches!(held, Err(TransferError::StillInUse { .. })), "{held:?}");
    assert_eq!(host.attached_peers(), 1);
    drop(inside);
    wait_until("peer stays listed", || host.attached_peers() == 0);
    regions.unregister(memory.addr(), Duration::ZERO, |_| Err("nobody is inside".to_owned())).unwrap();
}

#[test]
fn memory_is_not_replaced_while_this_process_writes_to_it() {
    let (host, identity, regions) = host(SameHostOptions::default());
    let memory = crate::memory::alloc::allocate(8192).unwrap();
    let region = regions.register(memory.addr(), 8192, Location::Any, Some(memory.window(0))).unwrap();
    let (peer, page) = attach_with_page(&host, &identity);
    let Message::Grant { slot, sequence, .. } = ask(&peer, memory.addr()) else { panic!("no grant") };
    let _inside = page.enter(slot, sequence).unwrap();
    let transport = host.shm();
    let drain = Duration::from_millis(50);
    let evict = |region: &Arc<LocalRegion>| transport.evict(region, drain);
    let receiving = region.pin().unwrap();
    match regions.unregister(memory.addr(), drain, evict) {
        Err(TransferError::StillInUse { holder, .. }) => assert!(holder.contains("operations of this"), "{holder}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(host.fences(), 0);
    drop(receiving);
    regions.unregister(memory.addr(), drain, evict).unwrap();
    assert_eq!(host.fences(), 1);
}

/// An owner that loses the file of its first grant; what it was asked. Ends when the peer hangs up.
fn lossy_owner(listener: &OwnedFd, region: ByteRange) -> Vec<(ByteRange, bool)> {
    let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
    poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&limit)).unwrap();
    let peer = accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).unwrap();
    assert!(matches!(hear(&peer), Ok(Received::Message(Message::Hello { .. }, _))));
    let (page, file) = ControlPage::create(0x5eed).unwrap();
    let (pid, probe_addr, probe_word) = (std::process::id(), page.probe_addr(), page.probe_word());
    let welcome = Message::Welcome { pid, probe_addr, probe_word };
    send_packet(peer.as_fd(), &Packet::with_file(&welcome, file)).unwrap();
    let mut asked = Vec::new();
    while let Ok(Received::Message(Message::Ask { id, range, want_file }, _)) = hear(&peer) {
        asked.push((range, want_file));
        let slot = asked.len() as u32;
        let sequence = page.grant(slot, 0);
        let file_offset = want_file.then_some(0);
        let grant = Message::Grant { id, slot, sequence, region, file_offset };
        send_packet(peer.as_fd(), &Packet::new(&grant)).unwrap();
    }
    asked
}

#[test]
fn grant_whose_file_was_lost_is_not_used_by_address() {
    let (host, identity, _) = host(SameHostOptions::default());
    let memory = crate::memory::alloc::allocate(4096).unwrap();
    let range = ByteRange::new(memory.addr(), 4096).unwrap();
    let name = format!("{}-lossy", host.socket_name());
    let listener = listen_on(&name).unwrap();
    std::thread::scope(|scope| {
        let owner = scope.spawn(|| lossy_owner(&listener, range));
        let extension = NativeExtension {
            version: 1,
            generation: identity.generation.to_string(),
            token: "09".repeat(16),
            transports: vec!["shm".to_owned(), "cma".to_owned()],
            host_id: identity.host_id.clone(),
            local_socket: name.clone(),
            ..NativeExtension::default()
        };
        let buffer = BufferDescriptor { addr: range.addr(), length: range.len(), ..BufferDescriptor::default() };
        let descriptor = SegmentDescriptor {
            buffers: vec![buffer],
            tidewire: Some(extension),
            ..SegmentDescriptor::tcp("lossy", "", 0)
        };
        let address = "127.0.0.1:1".to_owned();
        let peer = Peer { segment: "lossy".to_owned(), address, descriptor: Arc::new(descriptor) };
        let link = host.shm().connect(Arc::new(peer)).unwrap();
        let cma = link.describe().contains("cma works");
        if !cma {
            eprintln!("SKIP cma: {}", link.describe());
        }
        let source = crate::memory::alloc::allocate(4096).unwrap();
        source.fill(0, 4096, 5).unwrap();
        let batch = BatchCore::new(1);
        let submit = batch.begin(&[1], Vec::new(), None).unwrap();
        let token = submit.token(0, range.len());
        drop(submit);
        link.submit(&mut vec![Slice { opcode: Opcode::Write, local: source.addr(), target: range, token }]);
        wait_until("slice settled", || batch.is_settled());
        link.close();
        let asked = owner.join().unwrap();
        // The first is the question of attaching. Only the answer to one without a file may be used by address.
        let expected = [true, true, false].map(|want_file| (range, want_file));
        assert_eq!(asked, expected.split_at(if cma { 3 } else { 2 }).0);
        let mut arrived = [0];
        memory.copy_out(4095, &mut arrived).unwrap();
        assert_eq!(arrived[0], if cma { 5 } else { 0 });
    });
}

const CHILD: &str = "TIDEWIRE_TEST_DESCRIPTORS_RUN_OUT";

#[test]
fn running_out_of_descriptors_costs_no_cpu_and_passes() {
    // The limit is of the whole process, so the test has one for itself.
    if std::env::var_os(CHILD).is_some() {
        return without_descriptors();
    }
    let name = "transport::shm::tests::faults::running_out_of_descriptors_costs_no_cpu_and_passes";
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
    assert!(String::from_utf8_lossy(&child.stdout).contains("1 passed"), "{child:?}");
}

fn without_descriptors() {
    let (host, identity, _) = host(SameHostOptions::default());
    let attached = attach(&host, &identity);
    // After this answer the owner has closed what it sent before.
    let Message::Deny { .. } = ask(&attached, 4096) else { panic!("granted what is not there") };
    // A socket from before, so that connecting needs no descriptor here.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let kind = rustix::net::SocketType::SEQPACKET;
    let waiting = rustix::net::socket_with(rustix::net::AddressFamily::UNIX, kind, flags, None).unwrap();
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(128), ..limit }).unwrap();
    let mut filler = Vec::new();
    while let Ok(file) = rustix::io::fcntl_dupfd_cloexec(&attached, 0) {
        filler.push(file);
    }
    connect(&waiting, &SocketAddrUnix::new_abstract_name(host.socket_name().as_bytes()).unwrap()).unwrap();
    send_packet(waiting.as_fd(), &Packet::new(&hello(&identity))).unwrap();
    let cpu = || clock_gettime(ClockId::ProcessCPUTime);
    let before = cpu();
    let silent = poll(&mut [PollFd::new(&waiting, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 700_000_000 }));
    assert_eq!(silent.unwrap(), 0, "admitted without a descriptor");
    let after = cpu();
    let spent =
        Duration::from_secs((after.tv_sec - before.tv_sec) as u64).as_nanos() as i64 + after.tv_nsec - before.tv_nsec;
    assert!(spent < 200_000_000, "{spent} ns of processor time in 0.7 s");
    filler.clear();
    assert!(matches!(hear(&waiting), Ok(Received::Message(Message::Welcome { .. }, Some(_)))));
}
