//! `fake`: a transport whose links do what a script says, for tests of everything above transports.
//!
//! The target is memory of the same process: a completed slice moves its bytes, under the same range checks as elsewhere.
//! What the script does not say, completes. Held slices stay open until the test releases them, so that a test needs no
//! clock. A fake proves logic, never speed or hardware.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
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

/// What becomes of the next slice.
#[derive(Clone, Debug)]
pub enum Step {
    /// Moves the bytes and completes.
    Complete,
    /// Fails at once.
    Fail(TransferError),
    /// Moves the first bytes, then fails.
    FailAfter {
        /// How many.
        bytes: u64,
        /// With what.
        error: TransferError,
    },
    /// Stays open until [`FakeTransport::release`], a cancellation or the end of the link.
    Hold,
    /// Is not taken, this time: back-pressure.
    Refuse,
    /// Its token is dropped, as a transport with a defect would.
    DropToken,
}

/// A scripted transport.
#[derive(Debug)]
pub struct FakeTransport {
    regions: Arc<RegionTable>,
    state: Arc<Mutex<State>>,
    next_link: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    script: VecDeque<Step>,
    held: Vec<Held>,
    capacity: Option<usize>,
    connect_error: Option<TransferError>,
    failure: Option<TransferError>,
    submitted: u64,
}

#[derive(Debug)]
struct Held {
    link: u64,
    slice: Slice,
}

impl FakeTransport {
    /// A transport whose targets are the regions of `regions`.
    pub fn new(regions: Arc<RegionTable>) -> Arc<Self> {
        Arc::new(FakeTransport { regions, state: Arc::default(), next_link: AtomicU64::new(0) })
    }

    /// Appends to the script.
    pub fn script(&self, steps: impl IntoIterator<Item = Step>) {
        lock(&self.state).script.extend(steps);
    }

    /// Lets every slice wait, and at most `capacity` of them; the others stay with the caller. `None` ends that.
    pub fn hold_all(&self, capacity: Option<usize>) {
        lock(&self.state).capacity = capacity;
    }

    /// Makes the next connects fail; `None` ends that.
    pub fn refuse_connects(&self, error: Option<TransferError>) {
        lock(&self.state).connect_error = error;
    }

    /// Slices taken so far.
    pub fn submitted(&self) -> u64 {
        lock(&self.state).submitted
    }

    /// Slices that are held.
    pub fn held(&self) -> usize {
        lock(&self.state).held.len()
    }

    /// Completes the first `count` held slices, in order.
    pub fn release(&self, count: usize) {
        let slices: Vec<_> = {
            let mut state = lock(&self.state);
            let count = count.min(state.held.len());
            state.held.drain(..count).collect()
        };
        slices.into_iter().for_each(|held| complete(&self.regions, held.slice));
    }

    /// The peer goes down: every held slice fails, as does every later one.
    pub fn go_down(&self, reason: &str) {
        let slices = {
            let mut state = lock(&self.state);
            let (segment, peer) = ("fake".to_owned(), "fake".to_owned());
            let reason = reason.to_owned();
            state.failure = Some(TransferError::Unreachable { segment, peer, transport: "fake", reason });
            std::mem::take(&mut state.held)
        };
        slices.into_iter().for_each(|held| fail_down(held.slice, reason));
    }
}

fn fail_down(slice: Slice, reason: &str) {
    let (segment, peer) = ("fake".to_owned(), "fake".to_owned());
    slice.token.fail(TransferError::PeerDown { segment, peer, range: slice.target, reason: reason.to_owned() });
}

fn complete(regions: &RegionTable, slice: Slice) {
    let pin = regions.find(slice.target).and_then(|region| region.pin());
    let copied = pin.as_ref().is_some_and(|pin| copy_local(slice.opcode, slice.local, slice.target, pin));
    drop(pin);
    if copied {
        return slice.token.complete();
    }
    let (segment, peer) = ("fake".to_owned(), "fake".to_owned());
    slice.token.fail(TransferError::OutOfBounds { segment, peer, range: slice.target });
}

impl Transport for FakeTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Fake
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { max_slice_bytes: 1 << 20, synchronous: false, target_checks_range: true }
    }

    fn connect(&self, peer: Arc<Peer>) -> Result<Arc<dyn Link>, TransferError> {
        if let Some(error) = lock(&self.state).connect_error.clone() {
            return Err(error);
        }
        let id = self.next_link.fetch_add(1, Ordering::Relaxed);
        let (regions, state) = (Arc::clone(&self.regions), Arc::clone(&self.state));
        Ok(Arc::new(FakeLink { id, peer, regions, state, closed: Mutex::new(false) }))
    }

    fn shutdown(&self, _drain: Duration) {
        let slices = std::mem::take(&mut lock(&self.state).held);
        drop(slices);
    }
}

/// A link of the fake.
#[derive(Debug)]
struct FakeLink {
    id: u64,
    peer: Arc<Peer>,
    regions: Arc<RegionTable>,
    state: Arc<Mutex<State>>,
    closed: Mutex<bool>,
}

impl FakeLink {
    fn run(&self, step: Step, slice: Slice) -> Option<Slice> {
        match step {
            Step::Complete => complete(&self.regions, slice),
            Step::Fail(error) => slice.token.fail(error),
            Step::FailAfter { bytes, error } => {
                let part = ByteRange::new(slice.target.addr(), bytes.min(slice.target.len()));
                let pin = self.regions.find(slice.target).and_then(|region| region.pin());
                if let (Some(part), Some(pin)) = (part, &pin) {
                    copy_local(slice.opcode, slice.local, part, pin);
                }
                drop(pin);
                slice.token.fail(error);
            }
            Step::Hold => lock(&self.state).held.push(Held { link: self.id, slice }),
            Step::Refuse => return Some(slice),
            Step::DropToken => drop(slice),
        }
        None
    }

    fn take_held(&self, of: impl Fn(&Slice) -> bool) -> Vec<Slice> {
        let mut state = lock(&self.state);
        state.held.extract_if(.., |h| h.link == self.id && of(&h.slice)).map(|h| h.slice).collect()
    }
}

impl Link for FakeLink {
    fn kind(&self) -> TransportKind {
        TransportKind::Fake
    }

    fn submit(&self, slices: &mut Vec<Slice>) {
        slices.reverse();
        while let Some(slice) = slices.pop() {
            let (step, failure) = {
                let mut state = lock(&self.state);
                let step = match (state.script.pop_front(), state.capacity) {
                    (Some(step), _) => step,
                    (None, Some(capacity)) if state.held.len() < capacity => Step::Hold,
                    (None, Some(_)) => Step::Refuse,
                    (None, None) => Step::Complete,
                };
                state.submitted += u64::from(!matches!(step, Step::Refuse));
                (step, state.failure.clone())
            };
            if *lock(&self.closed) {
                slice.token.fail(TransferError::ShutDown);
            } else if failure.is_some() {
                fail_down(slice, "went down before");
            } else if let Some(slice) = self.run(step, slice) {
                slices.push(slice);
                break;
            }
        }
        slices.reverse();
    }

    fn drive(&self, batch: &Arc<BatchCore>, how: Drive) -> bool {
        wait_settled(batch, how)
    }

    fn cancel(&self, batch: &Arc<BatchCore>, error: &dyn Fn(ByteRange) -> TransferError) {
        for slice in self.take_held(|s| s.token.is_of(batch)) {
            let error = error(slice.target);
            slice.token.fail(error);
        }
    }

    fn open_slices(&self) -> usize {
        lock(&self.state).held.iter().filter(|h| h.link == self.id).count()
    }

    fn failure(&self) -> Option<TransferError> {
        let closed = lock(&self.closed).then_some(TransferError::ShutDown);
        closed.or_else(|| lock(&self.state).failure.clone())
    }

    fn describe(&self) -> String {
        format!("scripted, to {}", self.peer.segment)
    }

    fn close(&self) {
        *lock(&self.closed) = true;
        self.take_held(|_| true).into_iter().for_each(|slice| slice.token.fail(TransferError::ShutDown));
    }
}
