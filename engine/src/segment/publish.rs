//! Writes the own descriptor to the store, coalesced: however many changes wait, one write carries them all.
//!
//! Invariants:
//! * at most one write is in flight;
//! * a change counts as published only by a write that began after it;
//! * what is written comes from this process alone, so a predecessor's buffers are never inherited;
//! * of engines that start under one name, one gets it, where the store has guarded puts;
//! * nothing is written after [`Publisher::withdraw`], nor while it removes the keys.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tidewire_core::{
    TransferError,
    mooncake::{host::HostPort, rpc_meta::RpcMeta},
};
use tokio::sync::Notify;

use super::{discovery::Discovery, own::OwnSegment};
use crate::{
    memory::lock,
    metadata::{Expect, Lifetime, take_over},
    observe::Counters,
    runtime::ctl::Ctl,
};

/// Buffers up to which who registers one waits until the store has it. Each write carries the whole descriptor, so beyond
/// that registering one by one would cost the square of their number.
pub const WAIT_BUFFERS: usize = 256;

/// With more buffers than that, the writer rests this many times as long as the last write took.
const REST: u32 = 8;

/// Looks at the name before it counts as somebody else's: another engine may get it between a look and the put.
const CLAIM_TRIES: usize = 2;

/// Writer of the own descriptor.
#[derive(Debug)]
pub struct Publisher {
    own: Arc<OwnSegment>,
    discovery: Arc<Discovery>,
    ctl: Arc<Ctl>,
    counters: Arc<Counters>,
    progress: Mutex<Progress>,
    changed: Condvar,
    /// Ends the writer's rest: a caller waits, or the keys are withdrawn.
    urgent: Notify,
    /// Whether the keys of the name are this engine's.
    announced: AtomicBool,
    /// Held while keys are written or removed; whether they were withdrawn.
    withdrawn: tokio::sync::Mutex<bool>,
}

#[derive(Debug, Default)]
struct Progress {
    wanted: u64,
    /// Every change up to here was written, or failed.
    done: u64,
    /// The last failure, and up to which change it reaches.
    failed: Option<(u64, TransferError)>,
    running: bool,
}

impl Publisher {
    /// A writer; nothing is written yet.
    pub fn new(own: Arc<OwnSegment>, discovery: Arc<Discovery>, ctl: Arc<Ctl>, counters: Arc<Counters>) -> Arc<Self> {
        Arc::new(Publisher {
            own,
            discovery,
            ctl,
            counters,
            progress: Mutex::default(),
            changed: Condvar::new(),
            urgent: Notify::new(),
            announced: AtomicBool::new(false),
            withdrawn: tokio::sync::Mutex::default(),
        })
    }

    /// Publishes the present state of the region table. With `p2p` that is no more than marking the text as old.
    ///
    /// With `wait` the call returns after the store has it, or gave an error; else that follows in the background. Native
    /// peers need no list of buffers, since the target judges ranges.
    ///
    /// # Errors
    /// [`TransferError::Metadata`].
    pub fn publish(self: &Arc<Self>, wait: bool) -> Result<(), TransferError> {
        self.own.touch();
        if self.discovery.p2p {
            return Ok(());
        }
        let mut progress = lock(&self.progress);
        progress.wanted += 1;
        let mine = progress.wanted;
        if !progress.running {
            progress.running = true;
            let publisher = Arc::clone(self);
            self.ctl.spawn(async move { publisher.write_until_done().await });
        }
        if !wait {
            return Ok(());
        }
        self.urgent.notify_one();
        // Two writes may be needed: the one in flight and the one with this change.
        let deadline = Instant::now() + 2 * self.discovery.timeout + Duration::from_secs(1);
        while progress.done < mine {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Err(self.late());
            };
            progress = self.changed.wait_timeout(progress, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        match &progress.failed {
            Some((reaches, error)) if *reaches >= mine => Err(error.clone()),
            _ => Ok(()),
        }
    }

    async fn write_until_done(self: Arc<Self>) {
        loop {
            let target = {
                let mut progress = lock(&self.progress);
                if progress.done >= progress.wanted {
                    progress.running = false;
                    return;
                }
                progress.wanted
            };
            let started = Instant::now();
            let result = self.write().await;
            let took = started.elapsed();
            if let Err(error) = &result {
                tracing::warn!(segment = %self.own.identity().segment, %error, "descriptor was not published");
            }
            {
                let mut progress = lock(&self.progress);
                progress.done = target;
                progress.failed = result.err().map(|error| (target, error));
                self.changed.notify_all();
            }
            if self.own.buffers() > WAIT_BUFFERS {
                let _ = tokio::time::timeout(took * REST, self.urgent.notified()).await;
            }
        }
    }

    async fn write(&self) -> Result<(), TransferError> {
        let withdrawn = self.withdrawn.lock().await;
        if *withdrawn {
            return Ok(());
        }
        let name = &self.own.identity().segment;
        let guarded = self.discovery.store.capabilities().compare_and_put;
        if !guarded
            && let Some(owner) = self.discovery.control_address(name).await?
            && owner != self.own.control
        {
            let reason = format!("{name} belongs to the engine at {owner} now");
            return Err(TransferError::Metadata { store: self.discovery.store.describe(), reason });
        }
        let Some(json) = self.own.json() else {
            return Err(TransferError::Internal { reason: "published before the endpoints were known" });
        };
        let key = self.discovery.keys.ram(name);
        self.put(&key, &json).await?;
        Counters::add(&self.counters.publications, 1);
        Ok(())
    }

    /// Writes the control address of the own name. A predecessor that left its entry behind is replaced; one that still
    /// answers only with `replace_living`.
    ///
    /// # Errors
    /// [`TransferError::Setting`] naming the live owner; [`TransferError::Metadata`].
    pub async fn announce(&self, replace_living: bool) -> Result<(), TransferError> {
        if self.discovery.p2p {
            return Ok(());
        }
        let mut claimed = false;
        for _ in 0..CLAIM_TRIES {
            claimed = self.claim(replace_living).await?;
            if claimed {
                break;
            }
        }
        if !claimed {
            return Err(self.name_is_taken("an engine that started at the same time"));
        }
        self.announced.store(true, Ordering::Release);
        self.write().await
    }

    /// Puts the control address under the name; whether nobody else did so since this call looked at it.
    async fn claim(&self, replace_living: bool) -> Result<bool, TransferError> {
        let name = &self.own.identity().segment;
        let seen = self.discovery.control_entry(name).await?;
        if let Some((_, owner)) = &seen {
            if !replace_living
                && let Some(owner) = owner.as_ref().filter(|owner| **owner != self.own.control)
                && self.discovery.client.probe(owner).await.is_ok()
            {
                return Err(self.name_is_taken(&format!("the engine that answers at {owner}")));
            }
            let peer = owner.as_ref().map(HostPort::to_string);
            tracing::warn!(segment = %name, peer, "entry of a former owner is replaced");
        }
        let meta = RpcMeta { ip_or_host_name: self.own.control.host.clone(), rpc_port: self.own.control.port };
        let (key, value) = (self.discovery.keys.rpc_meta(name), self.value_of(&meta.encode()));
        let store = self.discovery.store.as_ref();
        let claimed = if store.capabilities().compare_and_put {
            let expect = seen.map_or(Expect::Absent, |(revision, _)| Expect::Revision(revision));
            store.compare_and_put(&key, expect, &value, Lifetime::Session).await.map(|revision| revision.is_some())
        } else {
            take_over(store, &key, &value, Lifetime::Session).await.map(|_| true)
        };
        claimed.map_err(|error| self.discovery.failed(&error))
    }

    fn name_is_taken(&self, owner: &str) -> TransferError {
        let name = &self.own.identity().segment;
        let reason = format!("{name} belongs to {owner} (TIDEWIRE_TAKE_OVER replaces it)");
        TransferError::Setting { name: "local name".to_owned(), reason }
    }

    /// Removes both keys, control address first, unless they are somebody else's by now.
    ///
    /// # Errors
    /// [`TransferError::Metadata`].
    pub async fn withdraw(&self) -> Result<(), TransferError> {
        if self.discovery.p2p || !self.announced.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.urgent.notify_one();
        // A write that is on its way ends first: dropped, it could still arrive after the removal.
        let mut withdrawn = self.withdrawn.lock().await;
        *withdrawn = true;
        let name = &self.own.identity().segment;
        if self.discovery.control_address(name).await?.is_some_and(|owner| owner != self.own.control) {
            return Ok(());
        }
        for key in [self.discovery.keys.rpc_meta(name), self.discovery.keys.ram(name)] {
            self.discovery.store.remove(&key).await.map_err(|error| self.discovery.failed(&error))?;
        }
        Ok(())
    }

    async fn put(&self, key: &str, json: &[u8]) -> Result<(), TransferError> {
        let value = self.value_of(json);
        let put = self.discovery.store.put(key, &value, Lifetime::Session);
        let result = tokio::time::timeout(self.discovery.timeout, put).await;
        result.map_err(|_| self.late())?.map(drop).map_err(|error| self.discovery.failed(&error))
    }

    fn value_of(&self, json: &[u8]) -> Vec<u8> {
        let newline: &[u8] = if self.discovery.newline { b"\n" } else { b"" };
        [json, newline].concat()
    }

    fn late(&self) -> TransferError {
        TransferError::Metadata {
            store: self.discovery.store.describe(),
            reason: "the descriptor was not written in time".to_owned(),
        }
    }
}
