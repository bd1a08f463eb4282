//! Keeper of a store's session: one lease, kept alive, and the keys put under it.
//!
//! A key put with [`Lifetime::Session`](super::Lifetime::Session) hangs on the lease of its store. [`Keeper`] renews the
//! lease every third of its time to live. When the server lost the lease (it ran out while the server or this process was
//! frozen, or the server lost its memory) the keeper takes a new one and puts every key again, fenced: a key that
//! somebody else has taken since is left alone, and later puts of it are refused until it is removed or put with a guard.
//! A put that failed, but may be applied, is repeated in the background, fenced as well.
//!
//! Invariants:
//! * one write of a session key is in flight at a time, a fenced one included;
//! * a key that was ours under a lost lease is put by nothing but a fenced write;
//! * after [`Keeper::close`] no key is put any more;
//! * the background task ends with the store's stop signal.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::Arc,
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::{Mutex, Notify},
    time::timeout,
};

use super::{Expect, StoreError, stop::StopSignal};

/// Most leases of the past that are remembered as ours.
const MAX_PAST: usize = 16;
/// Shortest and longest wait after a failed renewal.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// Identity of a lease; a new one means that the keys of the old one are gone or going.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lease(pub(crate) u64);

/// What a write under a lease came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// Applied, at this revision.
    At(u64),
    /// The guard did not hold; for a reclaim: somebody else has the key.
    Mismatch,
    /// The server does not know the lease.
    LeaseLost,
}

/// A key of this session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owned {
    /// Value as put.
    pub(crate) value: Vec<u8>,
    /// Revision of our last put, 0 if its answer never came.
    pub(crate) revision: u64,
}

/// What a keeper needs from its store. Every call ends within the store's timeouts.
pub(crate) trait SessionBackend: Send + Sync + 'static {
    /// Store and address.
    fn describe(&self) -> String;
    /// Keeps `known` alive and returns it, or opens a lease where it is lost or `None`.
    fn renew(&self, known: Option<Lease>) -> impl Future<Output = Result<Lease, StoreError>> + Send;
    /// Puts under a lease.
    fn write(
        &self,
        lease: Lease,
        key: &str,
        value: &[u8],
        guard: Option<Expect>,
    ) -> impl Future<Output = Result<Written, StoreError>> + Send;
    /// Puts an owned key again unless somebody else has it. `past` are leases that were ours.
    fn reclaim(
        &self,
        lease: Lease,
        key: &str,
        owned: &Owned,
        past: &[Lease],
    ) -> impl Future<Output = Result<Written, StoreError>> + Send;
}

/// Keeps one session.
#[derive(Debug)]
pub(crate) struct Keeper<B> {
    backend: Arc<B>,
    ttl: Duration,
    state: Mutex<State>,
    kick: Notify,
    stop: StopSignal,
    runtime: Handle,
}

#[derive(Debug, Default)]
struct State {
    lease: Option<Lease>,
    past: Vec<Lease>,
    owned: BTreeMap<String, Owned>,
    /// Owned keys that are not yet under the current lease, or whose last put may not be applied.
    pending: BTreeSet<String>,
    /// Keys that were ours until somebody else had them.
    taken: BTreeSet<String>,
    running: bool,
    closed: bool,
}

impl<B: SessionBackend> Keeper<B> {
    /// A keeper without a lease: the first put opens it and starts the task on `runtime`.
    pub(crate) fn new(backend: Arc<B>, ttl: Duration, stop: StopSignal, runtime: Handle) -> Arc<Self> {
        let (state, kick) = (Mutex::new(State::default()), Notify::new());
        Arc::new(Keeper { backend, ttl, state, kick, stop, runtime })
    }

    /// Puts a key under the session's lease; `None` if the guard did not hold. Without a guard a key that somebody else
    /// took from us is [`StoreError::Exists`].
    pub(crate) async fn put(
        self: &Arc<Self>,
        key: &str,
        value: &[u8],
        guard: Option<Expect>,
    ) -> Result<Option<u64>, StoreError> {
        let mut state = self.state.lock().await;
        if guard.is_none() && state.taken.contains(key) {
            return Err(self.exists(key));
        }
        let before = state.owned.get(key).cloned();
        let mut owned = Owned { value: value.to_vec(), revision: before.as_ref().map_or(0, |owned| owned.revision) };
        // A key that never was there is not fenced: there is nobody who could have taken it from us.
        let had = guard.is_none() && owned.revision != 0;
        let was_pending = state.pending.contains(key);
        let mut fenced = had && was_pending;
        let mut repeat = Repeat { kick: &self.kick, armed: guard.is_none() };
        if guard.is_none() {
            // Noted before the call, because a put that times out may or may not be applied.
            state.owned.insert(key.to_owned(), owned.clone());
            state.pending.insert(key.to_owned());
        }
        let mut lost = 0;
        loop {
            let lease = self.lease(&mut state).await?;
            let written = match fenced {
                true => self.backend.reclaim(lease, key, &owned, &state.past).await,
                false => self.backend.write(lease, key, value, guard).await,
            };
            match written {
                Ok(Written::At(revision)) => {
                    owned.revision = revision;
                    state.owned.insert(key.to_owned(), owned);
                    state.pending.remove(key);
                    state.taken.remove(key);
                    repeat.armed = false;
                    return Ok(Some(revision));
                }
                Ok(Written::Mismatch) if fenced => {
                    repeat.armed = false;
                    self.leave(&mut state, key);
                    return Err(self.exists(key));
                }
                Ok(Written::Mismatch) => return Ok(None),
                Ok(Written::LeaseLost) if lost < 2 => {
                    lost += 1;
                    fenced = had;
                    state.lose_lease();
                    self.kick.notify_one();
                }
                Ok(Written::LeaseLost) => {
                    let reason = "the session lease is lost again and again".to_owned();
                    return Err(StoreError::Unreachable { store: self.backend.describe(), reason });
                }
                Err(error) => {
                    if guard.is_none() && matches!(error, StoreError::Refused { .. }) {
                        repeat.armed = false;
                        state.restore(key, before, was_pending || lost > 0);
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Forgets a key, because it is removed or put for good.
    pub(crate) async fn forget(&self, key: &str) {
        let mut state = self.state.lock().await;
        state.owned.remove(key);
        state.pending.remove(key);
        state.taken.remove(key);
    }

    /// Gives up a key that is not at our value, to whoever has it.
    fn leave(&self, state: &mut State, key: &str) {
        state.pending.remove(key);
        let owned = state.owned.remove(key);
        if owned.is_some_and(|owned| owned.revision != 0) {
            state.taken.insert(key.to_owned());
        }
        tracing::warn!(store = self.backend.describe(), key, "key was taken by another owner, it is left");
    }

    fn exists(&self, key: &str) -> StoreError {
        StoreError::Exists { store: self.backend.describe(), key: key.to_owned() }
    }

    /// Forgets everything and gives the lease away, to be revoked.
    pub(crate) async fn close(&self) -> Option<Lease> {
        let mut state = self.state.lock().await;
        state.closed = true;
        state.owned.clear();
        state.pending.clear();
        state.taken.clear();
        state.lease.take()
    }

    async fn lease(self: &Arc<Self>, state: &mut State) -> Result<Lease, StoreError> {
        if state.closed {
            return Err(StoreError::Closed { store: self.backend.describe() });
        }
        let lease = match state.lease {
            Some(lease) => lease,
            None => self.backend.renew(None).await?,
        };
        state.hold_lease(lease);
        if !state.running {
            state.running = true;
            self.runtime.spawn(run(self.clone()));
        }
        Ok(lease)
    }

    /// Renews the lease and puts the keys that are not under it.
    async fn tend(&self) -> Result<(), StoreError> {
        let mut state = self.state.lock().await;
        if state.closed {
            return Ok(());
        }
        let lease = self.backend.renew(state.lease).await?;
        state.hold_lease(lease);
        drop(state);
        loop {
            let mut state = self.state.lock().await;
            let Some(key) = state.pending.first().cloned() else { return Ok(()) };
            let (Some(lease), Some(owned)) = (state.lease, state.owned.get(&key).cloned()) else {
                state.pending.remove(&key);
                continue;
            };
            match self.backend.reclaim(lease, &key, &owned, &state.past).await? {
                Written::At(revision) => {
                    state.owned.insert(key.clone(), Owned { revision, ..owned });
                    state.pending.remove(&key);
                }
                Written::Mismatch => self.leave(&mut state, &key),
                Written::LeaseLost => {
                    state.lose_lease();
                    self.kick.notify_one();
                    return Ok(());
                }
            }
        }
    }
}

impl State {
    fn hold_lease(&mut self, lease: Lease) {
        if self.lease == Some(lease) {
            return;
        }
        self.lose_lease();
        self.lease = Some(lease);
    }

    fn lose_lease(&mut self) {
        if let Some(old) = self.lease.take() {
            if self.past.len() == MAX_PAST {
                self.past.remove(0);
            }
            self.past.push(old);
            self.pending = self.owned.keys().cloned().collect();
        }
    }

    /// Undoes the note of a put that the server refused.
    fn restore(&mut self, key: &str, before: Option<Owned>, pending: bool) {
        if before.is_none() || !pending {
            self.pending.remove(key);
        }
        match before {
            Some(owned) => self.owned.insert(key.to_owned(), owned),
            None => self.owned.remove(key),
        };
    }
}

/// Wakes the task of a keeper when a put ends without an answer, a dropped one included.
struct Repeat<'a> {
    kick: &'a Notify,
    armed: bool,
}

impl Drop for Repeat<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.kick.notify_one();
        }
    }
}

/// Background task of a keeper.
async fn run<B: SessionBackend>(keeper: Arc<Keeper<B>>) {
    let mut stop = keeper.stop.clone();
    let period = keeper.ttl / 3;
    let mut wait = period;
    let mut failing = false;
    loop {
        tokio::select! {
            () = stop.stopped() => return,
            _ = timeout(wait, keeper.kick.notified()) => {}
        }
        let outcome = tokio::select! {
            () = stop.stopped() => return,
            outcome = keeper.tend() => outcome,
        };
        match outcome {
            Ok(()) => {
                if failing {
                    tracing::info!(store = keeper.backend.describe(), "session lease is kept again");
                }
                (failing, wait) = (false, period);
            }
            Err(error) => {
                if !failing {
                    tracing::warn!(store = keeper.backend.describe(), %error, "session lease could not be renewed");
                }
                (failing, wait) = (true, (keeper.ttl / 10).clamp(RETRY.0, RETRY.1));
            }
        }
    }
}

#[cfg(test)]
mod tests;
