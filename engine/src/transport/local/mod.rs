//! `local`: the engine's own segment. Copies between registered regions of this process, on the thread that submits.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tidewire_core::{ByteRange, TransferError};

use super::{Capabilities, Drive, Link, Peer, Slice, Transport, TransportKind, shm::link::wait_settled};
use crate::{
    batch::BatchCore,
    memory::{RegionTable, lock},
    shm::copy_local,
};

/// The transport to the own segment.
#[derive(Debug)]
pub struct LocalTransport {
    regions: Arc<RegionTable>,
    links: Mutex<Vec<std::sync::Weak<LocalLink>>>,
}

impl LocalTransport {
    /// Serves the regions of `regions`.
    pub fn new(regions: Arc<RegionTable>) -> Arc<Self> {
        Arc::new(LocalTransport { regions, links: Mutex::default() })
    }
}

impl Transport for LocalTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Local
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { max_slice_bytes: 16 << 20, synchronous: true, target_checks_range: true }
    }

    fn connect(&self, peer: Arc<Peer>) -> Result<Arc<dyn Link>, TransferError> {
        let link = Arc::new(LocalLink {
            regions: Arc::clone(&self.regions),
            peer,
            closed: AtomicBool::new(false),
            copying: Mutex::default(),
            left: Condvar::new(),
        });
        let mut links = lock(&self.links);
        links.retain(|l| l.strong_count() != 0);
        links.push(Arc::downgrade(&link));
        Ok(link)
    }

    fn shutdown(&self, _drain: Duration) {
        let links = std::mem::take(&mut *lock(&self.links));
        links.iter().filter_map(std::sync::Weak::upgrade).for_each(|link| link.close());
    }
}

/// The link to the own segment.
#[derive(Debug)]
struct LocalLink {
    regions: Arc<RegionTable>,
    peer: Arc<Peer>,
    closed: AtomicBool,
    /// Batches whose slices a thread is copying, one entry per thread.
    copying: Mutex<Vec<Arc<BatchCore>>>,
    left: Condvar,
}

impl LocalLink {
    fn run(&self, slice: Slice) {
        if self.closed.load(Ordering::Acquire) {
            return slice.token.fail(TransferError::ShutDown);
        }
        let pin = self.regions.find(slice.target).and_then(|region| region.pin());
        let copied = pin.as_ref().is_some_and(|pin| copy_local(slice.opcode, slice.local, slice.target, pin));
        drop(pin);
        if copied {
            return slice.token.complete();
        }
        let (segment, peer) = (self.peer.segment.clone(), self.peer.address.clone());
        slice.token.fail(TransferError::OutOfBounds { segment, peer, range: slice.target });
    }

    fn wait_until(&self, idle: impl Fn(&[Arc<BatchCore>]) -> bool) {
        let mut copying = lock(&self.copying);
        while !idle(&copying) {
            copying = self.left.wait(copying).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Link for LocalLink {
    fn kind(&self) -> TransportKind {
        TransportKind::Local
    }

    fn submit(&self, slices: &mut Vec<Slice>) {
        slices.reverse();
        while let Some(batch) = slices.last().and_then(|s| s.token.batch().cloned()) {
            lock(&self.copying).push(Arc::clone(&batch));
            while let Some(slice) = slices.pop_if(|s| s.token.is_of(&batch)) {
                self.run(slice);
            }
            let mut copying = lock(&self.copying);
            if let Some(index) = copying.iter().position(|b| Arc::ptr_eq(b, &batch)) {
                copying.swap_remove(index);
            }
            drop(copying);
            self.left.notify_all();
        }
    }

    fn drive(&self, batch: &Arc<BatchCore>, how: Drive) -> bool {
        wait_settled(batch, how)
    }

    fn cancel(&self, batch: &Arc<BatchCore>, _error: &dyn Fn(ByteRange) -> TransferError) {
        self.wait_until(|copying| !copying.iter().any(|b| Arc::ptr_eq(b, batch)));
    }

    fn open_slices(&self) -> usize {
        lock(&self.copying).len()
    }

    fn failure(&self) -> Option<TransferError> {
        self.closed.load(Ordering::Acquire).then_some(TransferError::ShutDown)
    }

    fn describe(&self) -> String {
        "this process".to_owned()
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.wait_until(<[_]>::is_empty);
    }
}
