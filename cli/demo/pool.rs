//! One process of the demo: an engine, a pool of pages scattered over it, and the sequence in the pool.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
    time::{Duration, Instant},
};

use tidewire_core::{Location, Notify, Opcode, SegmentId, TaskState, TransferError, TransferRequest};
use tidewire_engine::{Batch, Buffer, Config, TransferEngine};

use super::{
    content::Content,
    layout::Layout,
    protocol::{Direction, Pages, Reply, Setup},
};
use crate::{
    bench::rig::transport_kinds,
    bench::worker::run_batch,
    error::CliError,
    histogram::Histogram,
    pattern::{Mismatch, compare, permutation},
};

/// What a page holds that nothing was moved to.
const BLANK: u8 = 0xa5;
/// Batches (one per layer and plane) in flight.
const WINDOW: usize = 4;
/// Longest batch of a file, in blocks.
const MAX_BATCH: usize = 512;
/// How long open batches get when the engine is shut down.
const DRAIN: Duration = Duration::from_secs(2);

/// Engine, memory and page table.
#[derive(Debug)]
pub struct Pool {
    engine: TransferEngine,
    layers: Vec<Buffer>,
    layout: Layout,
    table: Vec<u32>,
    content: Content,
    timeout: Duration,
}

impl Pool {
    /// Starts the engine, and fills all memory: with the content, or blank.
    ///
    /// # Errors
    /// The engine's, or that of reading the content.
    pub fn start(setup: &Setup) -> Result<Self, CliError> {
        let layout = setup.layout;
        let mut builder = TransferEngine::builder(&setup.name).config(Config::from_env()).metadata(&setup.metadata);
        if let Some(kinds) = transport_kinds(setup.protocol) {
            builder = builder.transports(kinds);
        }
        let engine = builder.build().map_err(CliError::transfer(format!("starting segment {}", setup.name)))?;
        let mut layers = Vec::new();
        for layer in 0..layout.layers {
            let buffer = engine.allocate(layout.layer_bytes() as usize, Location::Cpu(0));
            layers.push(buffer.map_err(CliError::transfer(format!("allocating the pages of layer {layer}")))?);
        }
        let mut table = permutation(setup.seed, layout.pool_pages);
        table.truncate(layout.pages as usize);
        let content = Content::open(&setup.content)?;
        let timeout = Duration::from_millis(setup.timeout_ms);
        let pool = Pool { engine, layers, layout, table, content, timeout };
        pool.wipe()?;
        if setup.filled {
            pool.fill()?;
        }
        Ok(pool)
    }

    /// What the peer needs to know.
    pub fn pages(&self) -> Pages {
        Pages {
            segment: self.engine.segment_name().to_owned(),
            bases: self.layers.iter().map(Buffer::addr).collect(),
            table: self.table.clone(),
        }
    }

    /// Makes all memory blank.
    ///
    /// # Errors
    /// The engine's.
    pub fn wipe(&self) -> Result<(), CliError> {
        self.layers.iter().try_for_each(|buffer| buffer.fill(BLANK)).map_err(CliError::transfer("wiping the pages"))
    }

    fn fill(&self) -> Result<(), CliError> {
        let mut block = vec![0; self.layout.block_bytes as usize];
        self.each_block(|layer, plane, page, buffer, offset, len| {
            self.content.read(&self.layout, layer, plane, page, &mut block[..len])?;
            buffer.write_at(offset, &block[..len]).map_err(CliError::transfer("filling a page"))
        })
    }

    /// Moves `blocks` blocks, spread over the sequence, one batch each; every one is timed.
    ///
    /// # Errors
    /// The engine's.
    pub fn sample(&self, peer: &Pages, direction: Direction, blocks: u32) -> Result<Reply, CliError> {
        let segment = self.open(peer)?;
        let batches = self.batches(peer, segment, direction);
        let requests: Vec<TransferRequest> = batches.into_iter().flatten().collect();
        // The first one also connects; it is not counted.
        let first = requests.first().into_iter();
        let step = (requests.len() / blocks.max(1) as usize).max(1);
        let mut latency = Histogram::default();
        for (number, request) in first.chain(requests.iter().step_by(step).take(blocks as usize)).enumerate() {
            let before = Instant::now();
            run_batch(&self.engine, std::slice::from_ref(request), self.timeout)?;
            if number > 0 {
                latency.record(before.elapsed());
            }
        }
        let quantile = |of| latency.quantile_us(of).unwrap_or_default();
        Ok(Reply::Sampled { blocks: latency.count(), p50_us: quantile(0.5), p99_us: quantile(0.99) })
    }

    /// Moves every block, one batch per layer and plane with a few in flight, and notifies the peer with the last one.
    ///
    /// # Errors
    /// The engine's.
    pub fn transfer(
        &self,
        peer: &Pages,
        direction: Direction,
        message: &str,
        mut progress: impl FnMut(u64) -> Result<(), CliError>,
    ) -> Result<Reply, CliError> {
        let segment = self.open(peer)?;
        let mut batches = self.batches(peer, segment, direction);
        let last = batches.pop().unwrap_or_default();
        let bytes_of = |requests: &[TransferRequest]| requests.iter().map(|request| request.length).sum::<u64>();
        let mut open = std::collections::VecDeque::<(Batch, u64)>::new();
        let (mut moved, started) = (0, Instant::now());
        for requests in &batches {
            let batch = self.engine.allocate_batch(requests.len()).map_err(CliError::transfer("allocating a batch"))?;
            batch.submit(requests).map_err(CliError::transfer("submitting a batch"))?;
            open.push_back((batch, bytes_of(requests)));
            if open.len() >= WINDOW {
                moved += self.finish(open.pop_front())?;
                progress(moved)?;
            }
        }
        while let Some(oldest) = open.pop_front() {
            moved += self.finish(Some(oldest))?;
        }
        // Alone at the end: a notification tells of its own batch only.
        let batch = self.engine.allocate_batch(last.len()).map_err(CliError::transfer("allocating a batch"))?;
        let notify = Notify { name: self.engine.segment_name().to_owned(), message: message.to_owned() };
        batch.submit_with_notify(&last, notify).map_err(CliError::transfer("submitting the last batch"))?;
        moved += self.finish(Some((batch, bytes_of(&last))))?;
        let seconds = started.elapsed().as_secs_f64();
        progress(moved)?;
        let info = self.engine.segment_info(segment).map_err(CliError::transfer("looking at the peer"))?;
        let transport = info.transport.map_or("none", |kind| kind.name()).to_owned();
        Ok(Reply::Moved { bytes: moved, seconds, transport, reason: info.reason })
    }

    fn finish(&self, batch: Option<(Batch, u64)>) -> Result<u64, CliError> {
        let Some((batch, bytes)) = batch else { return Ok(0) };
        let status = batch.wait(self.timeout).map_err(CliError::transfer("moving pages"))?;
        match (status.state, status.error) {
            (TaskState::Completed, _) => Ok(bytes),
            (_, error) => Err(CliError::transfer("moving pages")(error.unwrap_or(TransferError::Cancelled))),
        }
    }

    /// Messages that have arrived since the last call.
    pub fn notifications(&self) -> Vec<String> {
        self.engine.take_notifications().into_iter().map(|notify| notify.message).collect()
    }

    /// Compares every byte of the pool: the sequence with its content, the rest with blank. The checksum is that of the
    /// sequence, layer by layer, K before V, page by page.
    ///
    /// # Errors
    /// That of reading memory or the content; a wrong byte is a result.
    pub fn verify(&self) -> Result<(u32, Option<(String, Mismatch)>), CliError> {
        let (mut crc, mut wrong) = (0, None);
        let mut expected = vec![0; self.layout.block_bytes as usize];
        let mut found = expected.clone();
        self.each_block(|layer, plane, page, buffer, offset, len| {
            buffer.read_at(offset, &mut found[..len]).map_err(CliError::transfer("reading a page"))?;
            crc = crc32c::crc32c_append(crc, &found[..len]);
            self.content.read(&self.layout, layer, plane, page, &mut expected[..len])?;
            if wrong.is_none() {
                let slot = self.table[page as usize];
                let place = || format!("{} (slot {slot} of the pool)", self.layout.name_of(layer, plane, page));
                wrong = compare(&expected[..len], &found[..len]).map(|mismatch| (place(), mismatch));
            }
            Ok(())
        })?;
        if wrong.is_none() {
            wrong = self.stray()?;
        }
        Ok((crc, wrong))
    }

    /// The first byte outside the sequence that is not blank.
    fn stray(&self) -> Result<Option<(String, Mismatch)>, CliError> {
        let layout = &self.layout;
        let mut owner = vec![None; layout.pool_pages as usize];
        for (page, slot) in self.table.iter().enumerate() {
            owner[*slot as usize] = Some(page as u32);
        }
        let expected = vec![BLANK; layout.block_bytes as usize];
        let mut found = expected.clone();
        for (layer, buffer) in self.layers.iter().enumerate() {
            for plane in 0..layout.planes {
                for (slot, page) in owner.iter().enumerate() {
                    let used = page.map_or(0, |page| layout.block_len(page)) as usize;
                    let offset = layout.block_offset(plane, slot as u32) + used as u64;
                    let rest = &mut found[used..];
                    buffer.read_at(offset as usize, rest).map_err(CliError::transfer("reading a page"))?;
                    if let Some(mismatch) = compare(&expected[used..], rest) {
                        let place = format!("layer {layer}, plane {plane}, slot {slot}, outside the sequence");
                        return Ok(Some((place, mismatch)));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Writes the sequence to `path`.
    ///
    /// # Errors
    /// [`CliError::Io`].
    pub fn save(&self, path: &Path) -> Result<(), CliError> {
        let saving = || CliError::io(format!("writing {}", path.display()));
        let mut file = BufWriter::new(File::create(path).map_err(saving())?);
        let mut block = vec![0; self.layout.block_bytes as usize];
        self.each_block(|_, _, _, buffer, offset, len| {
            buffer.read_at(offset, &mut block[..len]).map_err(CliError::transfer("reading a page"))?;
            file.write_all(&block[..len]).map_err(saving())
        })?;
        file.flush().map_err(saving())
    }

    /// Ends the engine in order.
    pub fn shutdown(self) {
        drop(self.layers);
        self.engine.shutdown(DRAIN);
    }

    fn open(&self, peer: &Pages) -> Result<SegmentId, CliError> {
        self.engine.open_segment(&peer.segment).map_err(CliError::transfer(format!("opening segment {}", peer.segment)))
    }

    /// One request per block, in batches of one layer and plane (and of at most [`MAX_BATCH`] blocks).
    fn batches(&self, peer: &Pages, target: SegmentId, direction: Direction) -> Vec<Vec<TransferRequest>> {
        let opcode = match direction {
            Direction::Write => Opcode::Write,
            Direction::Read => Opcode::Read,
        };
        let mut batches = Vec::new();
        for (own, base) in self.layers.iter().zip(&peer.bases) {
            for plane in 0..self.layout.planes {
                let slots = self.table.iter().zip(&peer.table).zip(0..);
                let requests: Vec<TransferRequest> = slots
                    .map(|((here, there), page)| TransferRequest {
                        opcode,
                        source: own.addr() + self.layout.block_offset(plane, *here),
                        target,
                        target_offset: base + self.layout.block_offset(plane, *there),
                        length: self.layout.block_len(page),
                    })
                    .collect();
                batches.extend(requests.chunks(MAX_BATCH).map(<[_]>::to_vec));
            }
        }
        batches
    }

    /// Calls `each` with every block of the sequence, in order: layer, plane, page, buffer, offset, length.
    fn each_block(
        &self,
        mut each: impl FnMut(u32, u32, u32, &Buffer, usize, usize) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        for (layer, buffer) in (0..).zip(&self.layers) {
            for plane in 0..self.layout.planes {
                for (page, slot) in (0..).zip(&self.table) {
                    let offset = self.layout.block_offset(plane, *slot) as usize;
                    each(layer, plane, page, buffer, offset, self.layout.block_len(page) as usize)?;
                }
            }
        }
        Ok(())
    }
}
