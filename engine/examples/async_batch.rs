//! Several batches at once from asynchronous code. The futures belong to no runtime; this one is tokio's.

use std::time::Duration;

use tidewire_engine::{Location, Opcode, TaskState, TransferEngine, TransferError, TransferRequest, TransportKind};

const BLOCK: u64 = 1 << 20;
const BLOCKS: u64 = 8;

fn main() -> Result<(), TransferError> {
    // Building, registering, opening and connecting block, so they come before the runtime.
    let kinds = [TransportKind::Tcp];
    let target = TransferEngine::builder("127.0.0.1").transports(&kinds).build()?;
    let engine = TransferEngine::builder("127.0.0.1").transports(&kinds).build()?;
    let there = target.allocate((BLOCK * BLOCKS) as usize, Location::Cpu(0))?;
    let here = engine.allocate((BLOCK * BLOCKS) as usize, Location::Cpu(0))?;
    here.fill(42)?;
    let segment = engine.open_segment(target.segment_name())?;
    engine.connect(segment)?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .map_err(|e| TransferError::os("tokio", &e))?;
    runtime.block_on(async {
        let mut batches = Vec::new();
        for block in 0..BLOCKS {
            let batch = engine.allocate_batch(1)?;
            batch.submit(&[TransferRequest {
                opcode: Opcode::Write,
                source: here.addr() + block * BLOCK,
                target: segment,
                target_offset: there.addr() + block * BLOCK,
                length: BLOCK,
            }])?;
            batches.push(batch);
        }
        for batch in &batches {
            // A future that is dropped cancels nothing; ending the transfer is a call of its own.
            match tokio::time::timeout(Duration::from_secs(10), batch.settled()).await {
                Ok(status) if status.state == TaskState::Completed => println!("{} bytes", status.transferred_bytes),
                Ok(status) => return status.into_result().map(drop),
                Err(_) => batch.cancel(),
            }
        }
        Ok(())
    })?;

    let mut last = [0];
    there.read_at((BLOCK * BLOCKS) as usize - 1, &mut last)?;
    println!("the last byte is {}", last[0]);
    Ok(())
}
