//! What one more item costs as their number grows: registered buffers, open segments, connected peers.
//!
//! Each count is measured in a fresh engine, so the cost of the first hundred can be held against that of the last.
//! Segments and peers are one target under many names: it listens on every loopback address, and each address of
//! 127.0.0.0/8 is a name of its own, so discovery, descriptor, link and connections are made anew for each.

use std::{
    error::Error,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use tidewire_engine::{Buffer, Config, Location, Opcode, SegmentId, TransferEngine, TransferRequest, TransportKind};

const PAGE: usize = 4096;

pub fn run(what: &str, counts: &[&str]) -> Result<(), Box<dyn Error>> {
    for count in counts {
        let count: usize = count.parse()?;
        let (seconds, more) = match what {
            "register" => register(count)?,
            "segments" => segments(count)?,
            "peers" => peers(count)?,
            other => return Err(format!("cost of {other}").into()),
        };
        let us_per_item = seconds * 1e6 / count as f64;
        println!(
            "{}",
            serde_json::json!({ "count": count, "us_per_item": us_per_item, "more_us_per_item": more * 1e6 / count as f64 })
        );
    }
    Ok(())
}

/// Registers and unregisters `count` pages one by one: seconds of each.
fn register(count: usize) -> Result<(f64, f64), Box<dyn Error>> {
    let engine = TransferEngine::builder("127.0.0.1").build()?;
    // A gap between the pages keeps them apart for whatever joins neighbours.
    let mut memory = vec![1u8; count * 2 * PAGE];
    let places: Vec<*mut u8> = memory.chunks_exact_mut(2 * PAGE).map(<[u8]>::as_mut_ptr).collect();
    let begin = Instant::now();
    for place in &places {
        // SAFETY: `memory` outlives the registration, which the loop below ends, and is not resized.
        unsafe { engine.register_memory(*place, PAGE, Location::Cpu(0))? };
    }
    let registered = begin.elapsed().as_secs_f64();
    let begin = Instant::now();
    for place in &places {
        engine.unregister_memory(*place as u64)?;
    }
    Ok((registered, begin.elapsed().as_secs_f64()))
}

/// A target that every loopback address reaches, and its memory.
fn target() -> Result<(TransferEngine, Buffer), Box<dyn Error>> {
    let mut config = Config::from_env();
    config.bind_address = "0.0.0.0".to_owned();
    config.advertise_address = "127.0.0.1".to_owned();
    let engine = TransferEngine::builder("127.0.0.1").config(config).transports(&[TransportKind::Tcp]).build()?;
    let buffer = engine.allocate(1 << 20, Location::Cpu(0))?;
    Ok((engine, buffer))
}

/// The n-th name of the target.
fn name(index: usize, port: u16) -> String {
    let address = Ipv4Addr::from(u32::from(Ipv4Addr::LOCALHOST) + index as u32);
    format!("{address}:{port}")
}

fn open_all(engine: &TransferEngine, count: usize, port: u16) -> Result<Vec<SegmentId>, Box<dyn Error>> {
    Ok((0..count).map(|index| engine.open_segment(&name(index, port))).collect::<Result<_, _>>()?)
}

/// Opens `count` segments, then opens them all again: seconds of each. The second time they are known.
fn segments(count: usize) -> Result<(f64, f64), Box<dyn Error>> {
    let (target, _buffer) = target()?;
    let engine = TransferEngine::builder("127.0.0.1").transports(&[TransportKind::Tcp]).build()?;
    let begin = Instant::now();
    let opened = open_all(&engine, count, target.rpc_port())?;
    let first = begin.elapsed().as_secs_f64();
    let begin = Instant::now();
    assert_eq!(open_all(&engine, count, target.rpc_port())?, opened);
    Ok((first, begin.elapsed().as_secs_f64()))
}

/// Writes one page to each of `count` peers, which connects them, then once more: seconds of each.
fn peers(count: usize) -> Result<(f64, f64), Box<dyn Error>> {
    let (target, remote) = target()?;
    let engine = TransferEngine::builder("127.0.0.1").transports(&[TransportKind::Tcp]).build()?;
    let local = engine.allocate(PAGE, Location::Cpu(0))?;
    let opened = open_all(&engine, count, target.rpc_port())?;
    let mut seconds = [0.0; 2];
    for round in &mut seconds {
        let begin = Instant::now();
        for segment in &opened {
            let batch = engine.allocate_batch(1)?;
            batch.submit(&[TransferRequest {
                opcode: Opcode::Write,
                source: local.addr(),
                target: *segment,
                target_offset: remote.addr(),
                length: PAGE as u64,
            }])?;
            if let Some(error) = batch.wait(Duration::from_secs(30))?.error {
                return Err(error.into());
            }
        }
        *round = begin.elapsed().as_secs_f64();
    }
    Ok((seconds[0], seconds[1]))
}
