//! What a benchmark process holds: an engine and one buffer per NUMA node.

use std::{fs, time::Duration};

use tidewire_core::{Location, Opcode, SegmentId, TransferError, TransferRequest};
use tidewire_engine::{Buffer, BufferInfo, Config, TransferEngine, TransportKind};

use super::{flags::Protocol, span::Span};
use crate::{
    error::CliError,
    pattern::{Mismatch, Pattern},
};

/// Bytes that are copied at a time when a buffer is filled or compared.
const CHUNK: usize = 1 << 20;
/// Fills what nothing has been moved to yet.
const BLANK: u8 = 0xcc;
/// How long open batches get when the engine is shut down.
const DRAIN: Duration = Duration::from_secs(2);

/// How to build a rig.
#[derive(Clone, Debug)]
pub struct RigOptions {
    /// Own segment name.
    pub name: String,
    /// Metadata URI.
    pub metadata: String,
    /// Transports that may be used.
    pub protocol: Protocol,
    /// Bytes per buffer.
    pub buffer_bytes: u64,
    /// Whether official Mooncake peers may connect.
    pub mooncake_port: bool,
    /// How long a waiting thread polls; `None`: what the settings say.
    pub spin: Option<Duration>,
}

/// Engine and buffers.
#[derive(Debug)]
pub struct Rig {
    /// The engine.
    pub engine: TransferEngine,
    /// One buffer per NUMA node. A buffer unregisters itself when dropped.
    pub buffers: Vec<Buffer>,
}

impl Rig {
    /// Starts the engine and touches all its memory.
    ///
    /// # Errors
    /// [`CliError::Transfer`].
    pub fn start(options: &RigOptions) -> Result<Self, CliError> {
        let mut config = Config::from_env();
        if let Some(spin) = options.spin {
            config.spin = spin;
        }
        let mut builder = TransferEngine::builder(&options.name)
            .config(config)
            .metadata(&options.metadata)
            .mooncake_port(options.mooncake_port);
        if let Some(kinds) = transport_kinds(options.protocol) {
            builder = builder.transports(kinds);
        }
        let starting = format!("starting segment {} with {}", options.name, options.metadata);
        let engine = builder.build().map_err(CliError::transfer(starting))?;
        let mut buffers = Vec::new();
        for node in 0..numa_nodes() {
            let buffer = engine
                .allocate(options.buffer_bytes as usize, Location::Cpu(node))
                .map_err(CliError::transfer(format!("allocating {} bytes on node {node}", options.buffer_bytes)))?;
            buffer.fill(BLANK).map_err(CliError::transfer("touching a buffer"))?;
            buffers.push(buffer);
        }
        Ok(Rig { engine, buffers })
    }

    /// The buffer that thread `thread` uses.
    pub fn buffer_of(&self, thread: u32) -> (usize, &Buffer) {
        let index = thread as usize % self.buffers.len().max(1);
        (index, &self.buffers[index])
    }

    /// Makes every block of `span` blank.
    pub fn blank(&self, span: Span) -> Result<(), CliError> {
        let chunk = vec![BLANK; CHUNK];
        self.for_chunks(span, |buffer, offset, len| buffer.write_at(offset, &chunk[..len]))
    }

    /// Fills every block of `span` with what `pattern` has there.
    pub fn fill(&self, span: Span, pattern: Pattern) -> Result<(), CliError> {
        let mut chunk = vec![0; CHUNK];
        self.for_chunks(span, |buffer, offset, len| {
            pattern.fill(offset as u64, &mut chunk[..len]);
            buffer.write_at(offset, &chunk[..len])
        })
    }

    /// Compares every block of `span` with `pattern`; where the first difference is.
    pub fn check(&self, span: Span, pattern: Pattern) -> Result<Option<(String, Mismatch)>, CliError> {
        let mut chunk = vec![0; CHUNK];
        for (thread, request, offset) in span.blocks() {
            let (index, buffer) = self.buffer_of(thread);
            let mut at = offset;
            while at < offset + span.block_size {
                let len = (offset + span.block_size - at).min(CHUNK as u64) as usize;
                buffer.read_at(at as usize, &mut chunk[..len]).map_err(CliError::transfer("reading a buffer"))?;
                if let Some(mismatch) = pattern.check(at, &chunk[..len]) {
                    let place = format!("buffer {index}, block {request} of thread {thread}, which starts at {offset}");
                    return Ok(Some((place, mismatch)));
                }
                at += len as u64;
            }
        }
        Ok(None)
    }

    /// The requests of thread `thread`, from and to `segment` whose buffers are `remote`.
    pub fn requests(
        &self,
        span: Span,
        thread: u32,
        opcode: Opcode,
        segment: SegmentId,
        remote: &[BufferInfo],
    ) -> Vec<TransferRequest> {
        let source = self.buffer_of(thread).1.addr();
        let target = remote.get(thread as usize % remote.len().max(1)).map_or(0, |buffer| buffer.addr);
        let request = |index| {
            let offset = span.offset(thread, index);
            TransferRequest {
                opcode,
                source: source + offset,
                target: segment,
                target_offset: target + offset,
                length: span.block_size,
            }
        };
        (0..span.batch_size).map(request).collect()
    }

    /// Ends the engine in order.
    pub fn shutdown(self) {
        drop(self.buffers);
        self.engine.shutdown(DRAIN);
    }

    fn for_chunks(
        &self,
        span: Span,
        mut each: impl FnMut(&Buffer, usize, usize) -> Result<(), TransferError>,
    ) -> Result<(), CliError> {
        for buffer in &self.buffers {
            let mut offset = 0;
            while offset < span.bytes() {
                let len = (span.bytes() - offset).min(CHUNK as u64) as usize;
                each(buffer, offset as usize, len).map_err(CliError::transfer("writing a buffer"))?;
                offset += len as u64;
            }
        }
        Ok(())
    }
}

/// The transports that stand for `protocol`; `None`: all.
pub fn transport_kinds(protocol: Protocol) -> Option<&'static [TransportKind]> {
    match protocol {
        Protocol::Auto => None,
        Protocol::Tcp => Some(&[TransportKind::Tcp, TransportKind::MooncakeTcp]),
        Protocol::Shm => Some(&[TransportKind::Shm]),
        Protocol::Cma => Some(&[TransportKind::Cma]),
        Protocol::MooncakeTcp => Some(&[TransportKind::MooncakeTcp]),
    }
}

/// NUMA nodes of this host with memory, at least 1.
///
/// # Source
/// `/sys/devices/system/node/has_memory`, a list such as `0-1,3` (kernel documentation, `sysfs-devices-node`).
fn numa_nodes() -> u32 {
    let text = fs::read_to_string("/sys/devices/system/node/has_memory").unwrap_or_default();
    count_list(text.trim()).max(1)
}

fn count_list(text: &str) -> u32 {
    let count = |part: &str| {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        Some(high.parse::<u32>().ok()?.checked_sub(low.parse().ok()?)? + 1)
    };
    text.split(',').filter_map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_nodes_are_counted() {
        for (text, count) in [("0", 1), ("0-3", 4), ("0-1,4,6-7", 5), ("", 0), ("x", 0), ("3-1", 0)] {
            assert_eq!(count_list(text), count, "{text:?}");
        }
    }
}
