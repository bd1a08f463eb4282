//! Waits for a batch among other descriptors, with `poll`.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tidewire_engine::{Location, Opcode, TransferEngine, TransferError, TransferRequest, TransportKind};

const LEN: usize = 32 << 20;

fn main() -> Result<(), TransferError> {
    let kinds = [TransportKind::Tcp];
    let target = TransferEngine::builder("127.0.0.1").transports(&kinds).build()?;
    let engine = TransferEngine::builder("127.0.0.1").transports(&kinds).build()?;
    let there = target.allocate(LEN, Location::Cpu(0))?;
    let here = engine.allocate(LEN, Location::Cpu(0))?;
    let segment = engine.open_segment(target.segment_name())?;

    let batch = engine.allocate_batch(1)?;
    batch.submit(&[TransferRequest {
        opcode: Opcode::Read,
        source: here.addr(),
        target: segment,
        target_offset: there.addr(),
        length: LEN as u64,
    }])?;

    // An event loop would add this descriptor to the ones it has.
    let settled = batch.event_fd()?;
    let mut descriptors = [PollFd::new(&settled, PollFlags::IN)];
    let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
    let ready = poll(&mut descriptors, Some(&limit)).map_err(|e| TransferError::os("poll", &e.into()))?;
    println!("{ready} descriptor is readable, {} bytes were read", batch.status().into_result()?.transferred_bytes);
    Ok(())
}
