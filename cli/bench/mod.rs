//! `tidewire bench` and `transfer_engine_bench`: measures transfers between two processes.
//!
//! The same flags, access pattern and final line as Mooncake's tool of that name, plus comparison of every byte, sweeps,
//! latencies, JSON and a chart. The final line and `Worker <t> stopped!` go to stderr as in the original.

pub mod check;
pub mod flags;
pub mod gflags;
pub mod pair;
pub mod plot;
pub mod report;
pub mod rig;
pub mod span;
pub mod worker;

use std::{fs, time::Duration};

use tidewire_core::Opcode;

use self::{
    check::Checker,
    flags::{BenchFlags, Mode, P2P, Protocol},
    pair::Partner,
    report::{JsonLines, Point},
    rig::{Rig, RigOptions},
    span::Span,
    worker::{Target, measure},
};
use crate::{error::CliError, pattern::Pattern, stop::Stop};

/// Seed of the bytes that are moved.
const SEED: u64 = 0x7469_6465_7769_7265;

/// Runs the benchmark.
///
/// # Errors
/// See [`CliError`]. A run that Ctrl-C ended with something measured is no error.
pub fn run(flags: &BenchFlags) -> Result<(), CliError> {
    let protocol = flags.checked_protocol()?;
    let options = RigOptions {
        name: flags.local_name(),
        metadata: flags.metadata().to_owned(),
        protocol,
        buffer_bytes: flags.buffer_bytes()?,
        mooncake_port: flags.mode == Mode::Target && !matches!(protocol, Protocol::Shm | Protocol::Cma),
        spin: flags.spin_us.map(Duration::from_micros),
    };
    let stop = Stop::listen().map_err(CliError::io("installing signal handlers"))?;
    match flags.mode {
        Mode::Target if flags.pair => {
            Err(CliError::usage("--pair starts its own target", "leave out --mode=target, or --pair"))
        }
        Mode::Target => hold(&options, &stop),
        Mode::Initiator => initiate(flags, &options, &stop),
    }
}

/// The target: holds memory until a signal.
fn hold(options: &RigOptions, stop: &Stop) -> Result<(), CliError> {
    let rig = Rig::start(options)?;
    let how = if options.metadata == P2P { "P2P handshake" } else { "new RPC mapping" };
    let name = rig.engine.segment_name();
    let host = if options.metadata == P2P { name } else { &options.name };
    let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
    eprintln!("Transfer Engine RPC using {how}, listening on {host}:{}", rig.engine.rpc_port());
    stop.wait_forever();
    rig.shutdown();
    Ok(())
}

fn initiate(flags: &BenchFlags, options: &RigOptions, stop: &Stop) -> Result<(), CliError> {
    let mut json = JsonLines::open(flags.json.as_deref())?;
    let mut partner = if flags.pair {
        let name = partner_name(options);
        Some(Partner::start(&RigOptions { name, ..options.clone() }, stop)?)
    } else {
        None
    };
    let rig = Rig::start(options)?;
    let target = open_target(&rig, partner.as_ref().map_or_else(|| flags.target_name(), Partner::segment), options)?;
    let mut points = Vec::new();
    let mut outcome = Ok(());
    'points: for &opcode in flags.operation.opcodes() {
        for batch_size in flags.batch_sizes() {
            for block_size in flags.block_sizes() {
                let span = Span { block_size, batch_size, threads: flags.threads };
                let measured = run_point(flags, &rig, &target, partner.as_mut(), span, opcode, stop);
                match measured {
                    Ok(point) => {
                        eprintln!("{}", point.final_line(flags.unit(), usize::from(flags.report_precision)));
                        json.write(&point)?;
                        points.push(point);
                    }
                    Err(error) => {
                        outcome = Err(error);
                        break 'points;
                    }
                }
                if stop.is_requested() {
                    break 'points;
                }
            }
        }
    }
    if let Some(path) = &flags.plot {
        let batches: Vec<String> = flags.batch_sizes().iter().map(u32::to_string).collect();
        let title = format!("Throughput, {} thread(s), batch of {}", flags.threads, batches.join(", "));
        fs::write(path, plot::draw(&title, &points)).map_err(CliError::io(format!("writing {}", path.display())))?;
    }
    rig.shutdown();
    if let Some(partner) = partner {
        partner.end()?;
    }
    outcome
}

/// Name of the target that `--pair` starts: for p2p the same host, with a port of its own; else a name of its own.
fn partner_name(options: &RigOptions) -> String {
    if options.metadata == P2P { options.name.clone() } else { format!("{}-target", options.name) }
}

fn open_target(rig: &Rig, name: &str, options: &RigOptions) -> Result<Target, CliError> {
    let segment = rig.engine.open_segment(name).map_err(CliError::transfer(format!("opening segment {name}")))?;
    rig.engine.connect(segment).map_err(CliError::transfer(format!("connecting to segment {name}")))?;
    let info = rig.engine.segment_info(segment).map_err(CliError::transfer(format!("looking at segment {name}")))?;
    let small = info.buffers.iter().find(|buffer| buffer.len < options.buffer_bytes);
    let reason = match (info.buffers.is_empty(), small) {
        (true, _) => "has no registered buffer".to_owned(),
        (false, Some(buffer)) => format!(
            "has a buffer of {} bytes, this run needs {}: start it with the same --buffer_size and sizes",
            buffer.len, options.buffer_bytes
        ),
        (false, None) => return Ok(Target { segment, name: name.to_owned(), buffers: info.buffers }),
    };
    Err(CliError::Target { segment: name.to_owned(), reason })
}

fn run_point(
    flags: &BenchFlags,
    rig: &Rig,
    target: &Target,
    mut partner: Option<&mut Partner>,
    span: Span,
    opcode: Opcode,
    stop: &Stop,
) -> Result<Point, CliError> {
    let pattern = Pattern::new(SEED ^ span.bytes());
    let patience = flags.patience();
    if flags.check {
        Checker { rig, target, partner: partner.as_deref_mut(), span, pattern, patience }.before(opcode)?;
    }
    let target_before = partner.as_deref_mut().map(Partner::cpu_seconds).transpose()?;
    let tally = measure(rig, target, span, opcode, flags.run_time(), patience, stop)?;
    let target_after = partner.as_deref_mut().map(Partner::cpu_seconds).transpose()?;
    let checked = flags.check && tally.every_thread;
    if checked {
        Checker { rig, target, partner, span, pattern, patience }.after(opcode)?;
        eprintln!("Check passed: every byte of {} bytes compared, both directions", span.bytes());
    }
    let info = rig.engine.segment_info(target.segment).map_err(CliError::transfer("looking at the segment"))?;
    let bytes = tally.batches * span.batch_bytes();
    let gigabytes = bytes as f64 / 1e9;
    let duration_s = tally.elapsed.as_secs_f64();
    Ok(Point {
        operation: if opcode == Opcode::Read { "read" } else { "write" }.to_owned(),
        block_size: span.block_size,
        batch_size: span.batch_size,
        threads: span.threads,
        duration_s,
        batches: tally.batches,
        bytes,
        gb_per_s: gigabytes / duration_s.max(1e-9),
        p50_us: tally.latency.quantile_us(0.50),
        p99_us: tally.latency.quantile_us(0.99),
        cpu_s: tally.cpu_s,
        cpu_s_per_gb: (bytes > 0).then(|| tally.cpu_s / gigabytes),
        target_cpu_s: target_after.zip(target_before).map(|(after, before)| after - before),
        transport: info.transport.map_or("none", |kind| kind.name()).to_owned(),
        reason: info.reason,
        checked,
        interrupted: stop.is_requested(),
    })
}
