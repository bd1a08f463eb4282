//! The measured loop: each thread allocates a batch, submits it full, waits, frees it, and counts.

use std::{
    thread,
    time::{Duration, Instant},
};

use tidewire_core::{Opcode, SegmentId, TaskState, TransferRequest};
use tidewire_engine::{BufferInfo, TransferEngine};

use super::{rig::Rig, span::Span};
use crate::{cpu, error::CliError, histogram::Histogram, stop::Stop};

/// How often the end of the measurement looks whether a worker failed.
const TICK: Duration = Duration::from_millis(20);

/// The target as the initiator sees it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its id here.
    pub segment: SegmentId,
    /// Its name.
    pub name: String,
    /// Its buffers that the benchmark uses.
    pub buffers: Vec<BufferInfo>,
}

/// What a measurement counted.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Completed batches.
    pub batches: u64,
    /// Whether every thread completed at least one.
    pub every_thread: bool,
    /// Time of each batch.
    pub latency: Histogram,
    /// From before the first submit to after the last completion.
    pub elapsed: Duration,
    /// CPU time of this process in that time, in seconds.
    pub cpu_s: f64,
}

/// Runs `span.threads` workers for `run_time`, or until `stop`.
///
/// # Errors
/// The first worker's, after all workers ended.
pub fn measure(
    rig: &Rig,
    target: &Target,
    span: Span,
    opcode: Opcode,
    run_time: Duration,
    patience: Duration,
    stop: &Stop,
) -> Result<Tally, CliError> {
    let halt = Stop::new();
    let cpu_before = cpu::process_seconds();
    let started = Instant::now();
    let results = thread::scope(|scope| {
        let workers: Vec<_> = (0..span.threads)
            .map(|number| {
                let requests = rig.requests(span, number, opcode, target.segment, &target.buffers);
                let halt = &halt;
                scope.spawn(move || {
                    let result = repeat(&rig.engine, &requests, patience, halt);
                    if result.is_err() {
                        halt.request();
                    }
                    eprintln!("Worker {number} stopped!");
                    result
                })
            })
            .collect();
        let deadline = started + run_time;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            if halt.is_requested() || stop.wait(left.min(TICK)) {
                break;
            }
        }
        halt.request();
        workers.into_iter().map(|worker| worker.join()).collect::<Vec<_>>()
    });
    let mut tally = Tally {
        every_thread: true,
        elapsed: started.elapsed(),
        cpu_s: cpu::process_seconds() - cpu_before,
        ..Tally::default()
    };
    for result in results {
        let (batches, latency) = result.map_err(|_| CliError::Target {
            segment: target.name.clone(),
            reason: "a worker thread panicked".to_owned(),
        })??;
        tally.batches += batches;
        tally.every_thread &= batches > 0;
        tally.latency.merge(&latency);
    }
    Ok(tally)
}

fn repeat(
    engine: &TransferEngine,
    requests: &[TransferRequest],
    patience: Duration,
    halt: &Stop,
) -> Result<(u64, Histogram), CliError> {
    let (mut batches, mut latency) = (0, Histogram::default());
    while !halt.is_requested() {
        let before = Instant::now();
        run_batch(engine, requests, patience)?;
        latency.record(before.elapsed());
        batches += 1;
    }
    Ok((batches, latency))
}

/// Moves `requests` as one batch.
///
/// # Errors
/// The engine's, also when the batch ended otherwise than completed.
pub fn run_batch(engine: &TransferEngine, requests: &[TransferRequest], patience: Duration) -> Result<(), CliError> {
    let batch = engine.allocate_batch(requests.len()).map_err(CliError::transfer("allocating a batch"))?;
    batch.submit(requests).map_err(CliError::transfer("submitting a batch"))?;
    let status = batch.wait(patience).map_err(CliError::transfer("waiting for a batch"))?;
    match (status.state, status.error) {
        (TaskState::Completed, _) => Ok(()),
        (_, Some(source)) => Err(CliError::Transfer { doing: "moving a batch".to_owned(), source }),
        (_, None) => Err(CliError::Transfer {
            doing: "moving a batch".to_owned(),
            source: tidewire_core::TransferError::Cancelled,
        }),
    }
}
