//! Writes into the memory of another engine and tells it so.
//!
//! Alone, it runs both ends in one process. In two terminals:
//!
//! ```text
//! cargo run --example p2p_write -- serve
//! cargo run --example p2p_write -- send 127.0.0.1:15321
//! ```

use std::time::Duration;

use tidewire_engine::{Location, Notify, Opcode, TransferEngine, TransferError, TransferRequest};

const LEN: usize = 16 << 20;

/// Allocates memory and waits until somebody has written it.
fn serve(engine: &TransferEngine) -> Result<(), TransferError> {
    let buffer = engine.allocate(LEN, Location::Cpu(0))?;
    println!("send to {}", engine.segment_name());
    let note = loop {
        match engine.take_notifications().pop() {
            Some(note) => break note,
            None => std::thread::park_timeout(Duration::from_millis(10)),
        }
    };
    let mut first = [0; 5];
    buffer.read_at(0, &mut first)?;
    println!("{} says {:?}; the memory begins with {:?}", note.name, note.message, String::from_utf8_lossy(&first));
    Ok(())
}

/// Writes the first buffer of the segment.
fn send(engine: &TransferEngine, segment_name: &str) -> Result<(), TransferError> {
    let source = engine.allocate(LEN, Location::Cpu(0))?;
    source.write_at(0, b"hello")?;
    let segment = engine.open_segment(segment_name)?;
    let info = engine.segment_info(segment)?;
    let Some(target) = info.buffers.first() else { return Err(TransferError::UnknownSegment { segment }) };

    let request = TransferRequest {
        opcode: Opcode::Write,
        source: source.addr(),
        target: segment,
        target_offset: target.addr,
        length: target.len.min(LEN as u64),
    };
    let batch = engine.allocate_batch(1)?;
    let note = Notify { name: engine.segment_name().to_owned(), message: "all bytes are in place".to_owned() };
    batch.submit_with_notify(&[request], note)?;
    let status = batch.wait(Duration::from_secs(30))?.into_result()?;

    let info = engine.segment_info(segment)?;
    let transport = info.transport.map_or("none", |transport| transport.name());
    println!("{} bytes over {transport} ({})", status.transferred_bytes, info.reason);
    Ok(())
}

fn main() -> Result<(), TransferError> {
    let engine = TransferEngine::builder("127.0.0.1").build()?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["serve"] => serve(&engine),
        ["send", name] => send(&engine, name),
        _ => {
            let target = TransferEngine::builder("127.0.0.1").build()?;
            let memory = target.allocate(LEN, Location::Cpu(0))?;
            send(&engine, target.segment_name())?;
            let mut first = [0; 5];
            memory.read_at(0, &mut first)?;
            println!(
                "{:?} arrived, {} notification",
                String::from_utf8_lossy(&first),
                target.take_notifications().len()
            );
            Ok(())
        }
    }
}
