//! One opened segment: what discovery said, and the links that were made to it.
//!
//! The first submit makes the link, on the caller's thread; submits that come meanwhile wait for that attempt and share
//! its result. A lost link is dropped, the descriptor is read again once, and a new link is made by the next submit. What
//! was handed to a link is settled by that link alone and never sent twice.
//!
//! Invariants:
//! * one attempt at a time per segment, and never under the lock;
//! * a segment whose generation changed refuses every submit until it is opened again, so that no request made for the
//!   old process's addresses reaches the new one.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use tidewire_core::{ByteRange, SegmentId, TransferError, TransportKind};

use super::{SegmentInfo, connect::Connector, discovery::Resolved};
use crate::{
    memory::lock,
    observe::PeerStatus,
    transport::{Capabilities, Link},
};

/// A link with what its transport takes.
#[derive(Clone, Debug)]
pub struct Path {
    /// The link.
    pub link: Arc<dyn Link>,
    /// What it takes.
    pub capabilities: Capabilities,
}

/// The links of one segment, best first.
#[derive(Debug)]
pub struct Links {
    /// Made so far; at least one.
    pub paths: Vec<Path>,
    /// What can be tried for ranges that none of them takes.
    pub rest: Vec<TransportKind>,
    /// Why the first was chosen.
    pub reason: String,
}

/// One opened segment.
#[derive(Debug)]
pub struct Segment {
    id: SegmentId,
    name: String,
    state: Mutex<State>,
    changed: Condvar,
    bytes: AtomicU64,
    errors: AtomicU64,
}

#[derive(Debug)]
struct State {
    resolved: Resolved,
    links: Option<Arc<Links>>,
    /// An attempt is going on; its number is `attempt`.
    connecting: bool,
    attempt: u64,
    /// Why the last attempt failed.
    failed: Option<(u64, TransferError)>,
    /// The descriptor is to be read again before the next attempt.
    stale: bool,
    /// Text of a generation change that the caller has not taken note of.
    restarted: Option<String>,
    last_error: Option<String>,
    closed: bool,
}

impl Segment {
    /// A segment without links.
    pub fn new(id: SegmentId, resolved: Resolved) -> Arc<Self> {
        let name = resolved.name.clone();
        let state = State {
            resolved,
            links: None,
            connecting: false,
            attempt: 0,
            failed: None,
            stale: false,
            restarted: None,
            last_error: None,
            closed: false,
        };
        let (bytes, errors) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Segment { id, name, state: Mutex::new(state), changed: Condvar::new(), bytes, errors })
    }

    /// Its id.
    pub fn id(&self) -> SegmentId {
        self.id
    }

    /// Its name, as opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What discovery said last.
    pub fn resolved(&self) -> Resolved {
        lock(&self.state).resolved.clone()
    }

    /// Counts bytes handed to a link.
    pub fn count_bytes(&self, bytes: u64) {
        // Relaxed: a sum for people.
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The links, made if need be. Blocks while they are being made, at most until `deadline`.
    ///
    /// # Errors
    /// [`TransferError::UnknownSegment`] once closed; [`TransferError::PeerDown`] if the segment was restarted since it
    /// was opened; what the attempt gave otherwise.
    pub fn links(&self, connector: &Connector, deadline: Instant) -> Result<Arc<Links>, TransferError> {
        let mut state = lock(&self.state);
        loop {
            self.check(&state)?;
            match &state.links {
                Some(links) => match broken(links) {
                    None => return Ok(Arc::clone(links)),
                    Some(error) => self.drop_links(&mut state, &error),
                },
                None if !state.connecting => break,
                None => {
                    let awaited = state.attempt;
                    state = self.wait_for_attempt(state, deadline)?;
                    if let Some((attempt, error)) = &state.failed
                        && *attempt == awaited
                    {
                        return Err(error.clone());
                    }
                }
            }
        }
        state.connecting = true;
        state.attempt += 1;
        let (resolved, stale) = (state.resolved.clone(), state.stale);
        drop(state);
        let outcome = connector.connect(resolved, stale);
        self.settle_attempt(outcome)
    }

    /// The links with one more path, for ranges that the given ones do not take; or what somebody else made meanwhile.
    ///
    /// # Errors
    /// [`TransferError::NoTransport`] if the links were lost meanwhile.
    pub fn extend(&self, connector: &Connector, links: &Arc<Links>) -> Result<Arc<Links>, TransferError> {
        let extended = Arc::new(connector.extend(&self.resolved(), links));
        let present = {
            let mut state = lock(&self.state);
            match &state.links {
                Some(present) if Arc::ptr_eq(present, links) => {
                    state.links = Some(Arc::clone(&extended));
                    return Ok(extended);
                }
                present => present.clone(),
            }
        };
        // Somebody else was faster, or the links are gone: nobody knows of the path just made.
        for path in extended.paths.iter().skip(links.paths.len()) {
            path.link.close();
        }
        let lost =
            || TransferError::NoTransport { segment: self.name.clone(), reasons: "the link was lost".to_owned() };
        present.ok_or_else(lost)
    }

    fn check(&self, state: &State) -> Result<(), TransferError> {
        if state.closed {
            return Err(TransferError::UnknownSegment { segment: self.id });
        }
        let Some(reason) = &state.restarted else { return Ok(()) };
        Err(TransferError::PeerDown {
            segment: self.name.clone(),
            peer: state.resolved.address.to_string(),
            range: whole_address_space(),
            reason: reason.clone(),
        })
    }

    fn wait_for_attempt<'a>(
        &self,
        state: std::sync::MutexGuard<'a, State>,
        deadline: Instant,
    ) -> Result<std::sync::MutexGuard<'a, State>, TransferError> {
        let Some(left) = deadline.checked_duration_since(Instant::now()) else {
            return Err(TransferError::Unreachable {
                segment: self.name.clone(),
                peer: state.resolved.address.to_string(),
                transport: "any",
                reason: "another attempt to connect is still going on".to_owned(),
            });
        };
        Ok(self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0)
    }

    fn drop_links(&self, state: &mut State, error: &TransferError) {
        tracing::warn!(segment = %self.name, %error, "link is lost, the next transfer makes a new one");
        self.errors.fetch_add(1, Ordering::Relaxed);
        state.last_error = Some(error.to_string());
        state.links = None;
        state.stale = true;
    }

    fn settle_attempt(&self, outcome: super::connect::Outcome) -> Result<Arc<Links>, TransferError> {
        let mut state = lock(&self.state);
        state.connecting = false;
        if let Some(fresh) = outcome.fresh {
            if fresh.generation != state.resolved.generation && state.resolved.generation.is_some() {
                state.restarted = Some("segment was restarted since it was opened; open it again".to_owned());
            }
            state.resolved = fresh;
            state.stale = false;
        }
        self.changed.notify_all();
        if let Err(error) = self.check(&state) {
            drop(state);
            if let Ok(links) = outcome.links {
                links.paths.iter().for_each(|path| path.link.close());
            }
            return Err(error);
        }
        match outcome.links {
            Ok(links) => {
                let links = Arc::new(links);
                state.links = Some(Arc::clone(&links));
                state.failed = None;
                Ok(links)
            }
            Err(error) => {
                self.errors.fetch_add(1, Ordering::Relaxed);
                state.last_error = Some(error.to_string());
                state.failed = Some((state.attempt, error.clone()));
                state.stale = true;
                Err(error)
            }
        }
    }

    /// Takes note of a fresh descriptor at the caller's wish: a restarted segment can be used again, over new links.
    pub fn renew(&self, fresh: Resolved) {
        let old = {
            let mut state = lock(&self.state);
            let restarted = state.restarted.take().is_some() || fresh.generation != state.resolved.generation;
            state.resolved = fresh;
            state.stale = false;
            if restarted { state.links.take() } else { None }
        };
        if let Some(links) = old {
            links.paths.iter().for_each(|path| path.link.close());
        }
    }

    /// Whether the segment was restarted, or its link lost, since it was opened.
    pub fn is_stale(&self) -> bool {
        let state = lock(&self.state);
        state.stale || state.restarted.is_some() || state.links.as_ref().is_some_and(|links| broken(links).is_some())
    }

    /// Has the descriptor read again before the next link is made.
    pub fn mark_stale(&self) {
        lock(&self.state).stale = true;
    }

    /// The links there are.
    pub fn present_links(&self) -> Option<Arc<Links>> {
        lock(&self.state).links.clone()
    }

    /// Closes the links, which ends their open slices, and with `for_good` the segment.
    pub fn close(&self, for_good: bool) {
        let links = {
            let mut state = lock(&self.state);
            state.closed |= for_good;
            state.stale = true;
            state.links.take()
        };
        self.changed.notify_all();
        if let Some(links) = links {
            links.paths.iter().for_each(|path| path.link.close());
        }
    }

    /// For [`crate::TransferEngine::segment_info`].
    pub fn info(&self) -> SegmentInfo {
        let state = lock(&self.state);
        let first = state.links.as_ref().and_then(|links| links.paths.first());
        SegmentInfo {
            name: self.name.clone(),
            address: state.resolved.address.to_string(),
            generation: state.resolved.generation.map(|g| g.to_string()).unwrap_or_default(),
            buffers: state.resolved.buffers(),
            transport: first.map(|path| path.link.kind()),
            reason: reason(&state),
        }
    }

    /// For [`crate::TransferEngine::status`].
    pub fn status(&self) -> PeerStatus {
        let state = lock(&self.state);
        let paths = state.links.as_ref().map(|links| links.paths.as_slice()).unwrap_or_default();
        PeerStatus {
            segment: self.name.clone(),
            address: state.resolved.address.to_string(),
            generation: state.resolved.generation.map(|g| g.to_string()).unwrap_or_default(),
            transport: paths.first().map(|path| path.link.kind()),
            reason: reason(&state),
            link: paths.iter().map(|path| path.link.describe()).collect::<Vec<_>>().join("; "),
            open_slices: paths.iter().map(|path| path.link.open_slices()).sum(),
            bytes: self.bytes.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            last_error: state.last_error.clone(),
        }
    }
}

fn reason(state: &State) -> String {
    match (&state.links, &state.last_error) {
        (Some(links), _) => links.reason.clone(),
        (None, Some(error)) => format!("no link: {error}"),
        (None, None) => "no transfer yet".to_owned(),
    }
}

fn broken(links: &Links) -> Option<TransferError> {
    links.paths.iter().find_map(|path| path.link.failure())
}

/// Stands for "any range" in an error that concerns none in particular.
fn whole_address_space() -> ByteRange {
    ByteRange::MAX
}
