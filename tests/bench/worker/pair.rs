//! One end of a measured pair.

use std::{
    error::Error,
    io::{self, BufRead},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tidewire_engine::{Buffer, Location, Opcode, SegmentId, TransferEngine, TransferRequest, TransportKind};

/// How long one batch may take.
const BATCH_TIMEOUT: Duration = Duration::from_secs(30);
/// Places in the region that batches walk over.
const MAX_PLACES: u64 = 16;

/// Where the target's memory is.
#[derive(Serialize, Deserialize)]
struct Hello {
    segment: String,
    address: u64,
}

/// One measurement.
#[derive(Deserialize)]
struct Ask {
    operation: String,
    block: u64,
    batch: u64,
    seconds: f64,
}

/// What it gave.
#[derive(Serialize)]
struct Measured {
    bytes: u64,
    seconds: f64,
    p50_us: f64,
    p99_us: f64,
    cpu_s: f64,
}

/// Memory of one end; it stays registered while this lives.
enum Memory {
    Engine(Buffer),
    Plain(Vec<u8>),
}

impl Memory {
    fn make(engine: &TransferEngine, kind: &str, region: usize, fill: u8) -> Result<Self, Box<dyn Error>> {
        match kind {
            "engine" => {
                let buffer = engine.allocate(region, Location::Cpu(0))?;
                buffer.fill(fill)?;
                Ok(Memory::Engine(buffer))
            }
            "plain" => {
                let mut bytes = vec![fill; region];
                // SAFETY: the vector is neither resized nor freed before the engine that registered it is gone: both live
                // until the end of this process.
                unsafe { engine.register_memory(bytes.as_mut_ptr(), region, Location::Cpu(0))? };
                Ok(Memory::Plain(bytes))
            }
            other => Err(format!("memory {other}").into()),
        }
    }

    fn addr(&self) -> u64 {
        match self {
            Memory::Engine(buffer) => buffer.addr(),
            Memory::Plain(bytes) => bytes.as_ptr() as u64,
        }
    }
}

fn engine(transport: &str) -> Result<TransferEngine, Box<dyn Error>> {
    let kind = match transport {
        "tcp" => TransportKind::Tcp,
        "shm" => TransportKind::Shm,
        "cma" => TransportKind::Cma,
        other => return Err(format!("transport {other}").into()),
    };
    Ok(TransferEngine::builder("127.0.0.1").transports(&[kind]).build()?)
}

/// The target: says where its memory is and lives until its input ends.
pub fn serve(region: usize, transport: &str, memory: &str) -> Result<(), Box<dyn Error>> {
    let engine = engine(transport)?;
    let memory = Memory::make(&engine, memory, region, 7)?;
    println!(
        "{}",
        serde_json::to_string(&Hello { segment: engine.segment_name().to_owned(), address: memory.addr() })?
    );
    for line in io::stdin().lock().lines() {
        line?;
    }
    Ok(())
}

/// The initiator: one JSON line per request.
pub fn initiate(region: usize, transport: &str, memory: &str) -> Result<(), Box<dyn Error>> {
    let engine = engine(transport)?;
    let memory = Memory::make(&engine, memory, region, 9)?;
    let mut lines = io::stdin().lock().lines();
    let hello: Hello = serde_json::from_str(&lines.next().ok_or("no target")??)?;
    let initiator = Initiator {
        segment: engine.open_segment(&hello.segment)?,
        local: memory.addr(),
        remote: hello.address,
        region: region as u64,
        engine,
    };
    initiator.run(&initiator.requests(Opcode::Write, 8, 1, 0))?;
    let chosen = initiator.engine.segment_info(initiator.segment)?;
    println!("{}", serde_json::json!({ "ready": true, "reason": chosen.reason }));
    for line in lines {
        let ask: Ask = serde_json::from_str(&line?)?;
        match initiator.measure(&ask) {
            Ok(measured) => println!("{}", serde_json::to_string(&measured)?),
            Err(error) => println!("{}", serde_json::json!({ "error": error.to_string() })),
        }
    }
    Ok(())
}

struct Initiator {
    engine: TransferEngine,
    segment: SegmentId,
    local: u64,
    remote: u64,
    region: u64,
}

impl Initiator {
    fn requests(&self, opcode: Opcode, block: u64, batch: u64, place: u64) -> Vec<TransferRequest> {
        (0..batch)
            .map(|i| (place * batch + i) * block)
            .map(|offset| TransferRequest {
                opcode,
                source: self.local + offset,
                target: self.segment,
                target_offset: self.remote + offset,
                length: block,
            })
            .collect()
    }

    fn run(&self, requests: &[TransferRequest]) -> Result<(), Box<dyn Error>> {
        let batch = self.engine.allocate_batch(requests.len())?;
        batch.submit(requests)?;
        let status = batch.wait(BATCH_TIMEOUT)?;
        match status.error {
            None => Ok(()),
            Some(error) => Err(error.into()),
        }
    }

    fn measure(&self, ask: &Ask) -> Result<Measured, Box<dyn Error>> {
        let opcode = match ask.operation.as_str() {
            "write" => Opcode::Write,
            "read" => Opcode::Read,
            other => return Err(format!("operation {other}").into()),
        };
        let places = (self.region / (ask.block * ask.batch)).clamp(1, MAX_PLACES);
        let sets: Vec<_> = (0..places).map(|place| self.requests(opcode, ask.block, ask.batch, place)).collect();
        for set in &sets {
            self.run(set)?;
        }
        let mut times_us = Vec::new();
        let cpu = cpu_s();
        let begin = Instant::now();
        let mut then = begin;
        for set in sets.iter().cycle() {
            self.run(set)?;
            let now = Instant::now();
            times_us.push((now - then).as_secs_f64() * 1e6);
            then = now;
            if (now - begin).as_secs_f64() >= ask.seconds {
                break;
            }
        }
        let (cpu, seconds) = (cpu_s() - cpu, (then - begin).as_secs_f64());
        times_us.sort_by(f64::total_cmp);
        Ok(Measured {
            bytes: times_us.len() as u64 * ask.block * ask.batch,
            seconds,
            p50_us: times_us[times_us.len() / 2],
            p99_us: times_us[times_us.len() * 99 / 100],
            cpu_s: cpu,
        })
    }
}

/// User plus system seconds of this process, in ticks of 10 ms (`proc_pid_stat(5)`).
fn cpu_s() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("procfs");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("a name").split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().expect("utime") + fields[12].parse::<u64>().expect("stime");
    ticks as f64 / 100.0
}
