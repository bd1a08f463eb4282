//! Writes the own descriptor to the store, coalesced: however many changes wait, one write carries them all.
//!
//! Invariants:
//! * at most one write is in flight;
//! * a change counts as published only by a write that began after it;
//! * what is written comes from this process alone, so a predecessor's buffers are never inherited.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tidewire_core::{TransferError, mooncake::rpc_meta::RpcMeta};

use super::{discovery::Discovery, own::OwnSegment};
use crate::{
    memory::lock,
    metadata::{Lifetime, take_over},
    observe::Counters,
    runtime::ctl::Ctl,
};

/// Buffers up to which a caller waits until the store has its change. Each write carries the whole descriptor, so beyond
/// that registering one by one would cost the square of their number.
const WAIT_BUFFERS: usize = 256;

/// With more buffers than that, the writer rests this many times as long as the last write took.
const REST: u32 = 8;

/// Writer of the own descriptor.
#[derive(Debug)]
pub struct Publisher {
    own: Arc<OwnSegment>,
    discovery: Arc<Discovery>,
    ctl: Arc<Ctl>,
    counters: Arc<Counters>,
    progress: Mutex<Progress>,
    changed: Condvar,
    /// Whether the keys of the name are this engine's.
    announced: AtomicBool,
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
        let (progress, changed, announced) = (Mutex::default(), Condvar::new(), AtomicBool::new(false));
        Arc::new(Publisher { own, discovery, ctl, counters, progress, changed, announced })
    }

    /// Publishes the present state of the region table. With `p2p` that is no more than marking the text as old.
    ///
    /// With `wait` the call returns after the store has it, or gave an error; not with more than 256 buffers, whose
    /// descriptor follows in the background. Native peers need no list of buffers, since the target judges ranges.
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
        if !wait || self.own.buffers() > WAIT_BUFFERS {
            return Ok(());
        }
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
                tokio::time::sleep(took * REST).await;
            }
        }
    }

    async fn write(&self) -> Result<(), TransferError> {
        let Some(json) = self.own.json() else {
            return Err(TransferError::Internal { reason: "published before the endpoints were known" });
        };
        let key = self.discovery.keys.ram(&self.own.identity().segment);
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
        let name = &self.own.identity().segment;
        let key = self.discovery.keys.rpc_meta(name);
        if let Some(owner) = self.discovery.control_address(name).await? {
            if owner != self.own.control && !replace_living && self.discovery.client.probe(&owner).await.is_ok() {
                return Err(TransferError::Setting {
                    name: "local name".to_owned(),
                    reason: format!(
                        "{name} belongs to the engine that answers at {owner} (TIDEWIRE_TAKE_OVER replaces it)"
                    ),
                });
            }
            tracing::warn!(segment = %name, peer = %owner, "entry of a former owner is replaced");
        }
        let meta = RpcMeta { ip_or_host_name: self.own.control.host.clone(), rpc_port: self.own.control.port };
        let value = self.value_of(&meta.encode());
        let put = take_over(self.discovery.store.as_ref(), &key, &value, Lifetime::Session);
        put.await.map_err(|error| self.discovery.failed(&error))?;
        self.announced.store(true, Ordering::Release);
        self.write().await
    }

    /// Removes both keys, control address first, unless they are somebody else's by now.
    ///
    /// # Errors
    /// [`TransferError::Metadata`].
    pub async fn withdraw(&self) -> Result<(), TransferError> {
        if self.discovery.p2p || !self.announced.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
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
