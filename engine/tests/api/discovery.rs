//! Segments: opening, publishing, listing, taking over.

use std::time::{Duration, Instant};

use tidewire_engine::{Config, Location, SegmentId, TransferEngine, TransferError, TransportKind};

use crate::support::{LIMIT, buffer, engine, wait_until, write};

/// An engine in a store of the process.
fn stored(name: &str, store: &str) -> Result<TransferEngine, TransferError> {
    let mut config = Config::default();
    config.metadata = format!("memory://{store}");
    config.transports = vec![TransportKind::Tcp];
    TransferEngine::builder(name).config(config).build()
}

#[test]
fn the_same_name_gives_the_same_id_until_it_is_closed() {
    let (a, b, c) = (engine(&[]), engine(&[]), engine(&[]));
    let first = a.open_segment(b.segment_name()).unwrap();
    assert_eq!(a.open_segment(b.segment_name()), Ok(first));
    assert_ne!(a.open_segment(c.segment_name()).unwrap(), first);
    assert_eq!(a.open_segment_no_cache(b.segment_name()), Ok(first));
    assert_eq!(a.open_segment(a.segment_name()), Ok(SegmentId::LOCAL));
    a.close_segment(first).unwrap();
    assert_eq!(a.close_segment(first), Err(TransferError::UnknownSegment { segment: first }));
    assert_ne!(a.open_segment(b.segment_name()).unwrap(), first);
    assert!(a.close_segment(SegmentId::LOCAL).is_err());
}

#[test]
fn p2p_names_are_host_and_control_port() {
    let engine = engine(&[]);
    assert_eq!(engine.segment_name(), format!("127.0.0.1:{}", engine.rpc_port()));
    engine.probe(engine.segment_name()).unwrap();
}

#[test]
fn nobody_there_is_said_soon_with_the_name() {
    let a = engine(&[]);
    let gone = {
        let b = engine(&[]);
        b.segment_name().to_owned()
    };
    let started = Instant::now();
    match a.open_segment(&gone) {
        Err(TransferError::SegmentNotFound { segment, .. }) => assert_eq!(segment, gone),
        other => panic!("{other:?}"),
    }
    assert!(matches!(a.probe(&gone), Err(TransferError::Unreachable { .. })));
    assert!(started.elapsed() < Duration::from_secs(3));
}

#[test]
fn buffers_are_found_through_the_store_after_registration() {
    let (a, b) = (stored("127.0.0.1:a", "found").unwrap(), stored("127.0.0.1:b", "found").unwrap());
    let first = buffer(&b, 4096);
    let segment = a.open_segment("127.0.0.1:b").unwrap();
    let addrs = |a: &TransferEngine| -> Vec<u64> {
        a.segment_info(segment).unwrap().buffers.iter().map(|buffer| buffer.addr).collect()
    };
    assert_eq!(addrs(&a), [first.addr()]);
    let second = b.allocate(8192, Location::Cuda(3)).unwrap();
    a.open_segment_no_cache("127.0.0.1:b").unwrap();
    let info = a.segment_info(segment).unwrap();
    let found = info.buffers.iter().find(|buffer| buffer.addr == second.addr()).unwrap();
    assert_eq!((found.len, &found.location), (8192, &Location::Cuda(3)));
    drop(first);
    a.open_segment_no_cache("127.0.0.1:b").unwrap();
    assert_eq!(addrs(&a), [second.addr()]);
    let mut names: Vec<_> = a.segments().unwrap().into_iter().map(|listed| listed.name).collect();
    names.sort();
    assert_eq!(names, ["127.0.0.1:a", "127.0.0.1:b"]);
}

#[test]
fn a_batch_of_registrations_is_published_once() {
    let a = stored("127.0.0.1:once", "once").unwrap();
    let before = a.status().counters.publications;
    let mut memory = vec![0u8; 64 * 1000];
    let base = memory.as_mut_ptr();
    let parts: Vec<_> = (0..1000).map(|i| (base.wrapping_add(i * 64), 64)).collect();
    // SAFETY: the vector outlives the registrations, which end below.
    unsafe { a.register_memory_batch(&parts, Location::Any) }.unwrap();
    // With so many buffers nobody waits for the store.
    wait_until("the batch is published", || a.status().counters.publications > before);
    assert_eq!(a.status().counters.publications, before + 1);
    a.unregister_memory_batch(&parts.iter().map(|(addr, _)| *addr as u64).collect::<Vec<_>>()).unwrap();
    assert_eq!((a.status().counters.publications, a.status().buffers), (before + 2, 0));
}

#[test]
fn concurrent_registrations_share_publications() {
    let a = stored("127.0.0.1:coalesced", "coalesced").unwrap();
    let mut memory = vec![0u8; 64 * 800];
    let base = memory.as_mut_ptr() as usize;
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let a = &a;
            scope.spawn(move || {
                for i in 0..100 {
                    let addr = (base + (thread * 100 + i) * 64) as *mut u8;
                    // SAFETY: the vector outlives the engine's last use of it at the end of the test.
                    unsafe { a.register_memory(addr, 64, Location::Any) }.unwrap();
                }
            });
        }
    });
    assert_eq!(a.status().buffers, 800);
    assert!(a.status().counters.publications < 800, "{}", a.status().counters.publications);
    // With so many buffers nobody waits for the store.
    wait_until("all of them are published", || a.segments().unwrap()[0].descriptor.buffers.len() == 800);
    a.shutdown(LIMIT);
}

#[test]
fn a_live_owner_of_the_name_is_not_replaced() {
    let first = stored("127.0.0.1:owned", "owned").unwrap();
    match stored("127.0.0.1:owned", "owned") {
        Err(TransferError::Setting { reason, .. }) => assert!(reason.contains("127.0.0.1:owned"), "{reason}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(first.segments().unwrap().len(), 1);
    first.shutdown(LIMIT);
    stored("127.0.0.1:owned", "owned").unwrap();
}

#[test]
fn an_orderly_end_leaves_nothing_in_the_store() {
    let watcher = stored("127.0.0.1:watcher", "orderly").unwrap();
    let other = stored("127.0.0.1:other", "orderly").unwrap();
    assert_eq!(watcher.segments().unwrap().len(), 2);
    drop(other);
    assert_eq!(watcher.segments().unwrap().len(), 1);
    let gone = watcher.open_segment("127.0.0.1:other").unwrap_err();
    assert!(matches!(gone, TransferError::SegmentNotFound { .. }), "{gone:?}");
}

#[test]
fn a_vanished_descriptor_costs_no_link_while_the_peer_answers() {
    let (a, b) = (stored("127.0.0.1:va", "vanish").unwrap(), stored("127.0.0.1:vb", "vanish").unwrap());
    let (here, there) = (buffer(&a, 4096), buffer(&b, 4096));
    let segment = a.open_segment("127.0.0.1:vb").unwrap();
    a.transfer_sync(&[write(here.addr(), segment, there.addr(), 4096)], LIMIT).unwrap();
    // The store loses the key, as after an expired lease; the peer is well.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let uri = tidewire_engine::metadata::uri::parse("memory://vanish").unwrap();
        let store = tidewire_engine::metadata::open(&uri, &Default::default()).await.unwrap();
        assert!(store.remove("mooncake/ram/127.0.0.1:vb").await.unwrap());
    });
    a.transfer_sync(&[write(here.addr(), segment, there.addr(), 4096)], LIMIT).unwrap();
    assert_eq!(a.status().counters.links, 1);
}

#[test]
fn a_store_that_is_not_there_is_a_typed_error_at_start() {
    let mut config = Config::default();
    config.metadata = "http://127.0.0.1:1/metadata".to_owned();
    config.store_connect_timeout = Duration::from_millis(500);
    let started = Instant::now();
    let error = TransferEngine::builder("127.0.0.1").config(config).build().unwrap_err();
    assert!(matches!(error, TransferError::Metadata { .. }), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(5));
    let unknown = TransferEngine::builder("127.0.0.1").config(Config::default()).metadata("redis://h:1").build();
    assert!(unknown.unwrap_err().to_string().contains("redis"));
}

#[test]
fn an_address_that_is_not_ours_is_refused() {
    let error = TransferEngine::builder("192.0.2.1").config(Config::default()).build().unwrap_err();
    match error {
        TransferError::Setting { name, reason } => {
            assert_eq!(name, "TIDEWIRE_BIND_ADDRESS");
            assert!(reason.contains("192.0.2.1"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_engine_leaves_no_thread_behind() {
    let threads = || {
        let names = std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|entry| std::fs::read_to_string(entry.ok()?.path().join("comm")).ok());
        names.filter(|name| name.starts_with("tw-")).count()
    };
    // Other tests run engines at the same time, so the child process is this test alone.
    if std::env::var_os("TIDEWIRE_TEST_ALONE").is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "discovery::an_engine_leaves_no_thread_behind"])
            .env("TIDEWIRE_TEST_ALONE", "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let (a, b) = (engine(&[]), engine(&[]));
    let (here, there) = (buffer(&a, 4096), buffer(&b, 4096));
    let segment = a.open_segment(b.segment_name()).unwrap();
    a.transfer_sync(&[write(here.addr(), segment, there.addr(), 4096)], LIMIT).unwrap();
    assert!(threads() > 0);
    drop((here, there, a, b));
    wait_until("all threads end", || threads() == 0);
}

#[test]
fn engines_find_each_other_through_our_http_server() {
    let runtime = tidewire_engine::runtime::ctl::Ctl::start().unwrap();
    let options = tidewire_engine::metadata::server::ServerOptions::default();
    let start = tidewire_engine::metadata::server::MetadataServer::start("127.0.0.1:0".parse().unwrap(), options);
    let server = runtime.run(LIMIT, start).unwrap().unwrap();
    let uri = format!("http://{}/metadata", server.local_addr());
    let start = |name: &str| {
        let builder = TransferEngine::builder(name).config(Config::default()).metadata(uri.as_str());
        builder.transports(&[TransportKind::Tcp]).build().unwrap()
    };
    let (a, b) = (start("127.0.0.1:http-a"), start("127.0.0.1:http-b"));
    let (here, there) = (buffer(&a, 4096), buffer(&b, 4096));
    here.fill(5).unwrap();
    let segment = a.open_segment("127.0.0.1:http-b").unwrap();
    a.transfer_sync(&[write(here.addr(), segment, there.addr(), 4096)], LIMIT).unwrap();
    let mut seen = [0; 4096];
    there.read_at(0, &mut seen).unwrap();
    assert_eq!(seen, [5; 4096]);
    drop((b, there));
    let names: Vec<_> = a.segments().unwrap().into_iter().map(|listed| listed.name).collect();
    assert_eq!(names, ["127.0.0.1:http-a"]);
}

#[test]
fn a_name_may_be_an_ipv6_address() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        println!("SKIP no IPv6 loopback");
        return;
    }
    let start = || {
        let builder = TransferEngine::builder("[::1]").config(Config::default());
        builder.transports(&[TransportKind::Tcp]).build().unwrap()
    };
    let (a, b) = (start(), start());
    assert_eq!(b.segment_name(), format!("[::1]:{}", b.rpc_port()));
    let (here, there) = (buffer(&a, 4096), buffer(&b, 4096));
    let segment = a.open_segment(b.segment_name()).unwrap();
    a.transfer_sync(&[write(here.addr(), segment, there.addr(), 4096)], LIMIT).unwrap();
}
