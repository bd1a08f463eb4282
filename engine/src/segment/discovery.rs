//! Finds the descriptor and the control address of a segment.
//!
//! With `p2p` the name is the control address and the peer itself answers; with a store, `rpc_meta` gives the address and
//! `ram` the descriptor, under Mooncake's keys.

use std::{sync::Arc, time::Duration};

use tidewire_core::{
    Generation, Location, Notify, TransferError,
    mooncake::{
        descriptor::{NativeExtension, SegmentDescriptor},
        host::HostPort,
        keys::KeySpace,
        rpc_meta::RpcMeta,
    },
};

use super::{BufferInfo, ListedSegment};
use crate::{
    control::{ControlClient, ControlError},
    metadata::{Entry, MetadataStore, StoreError},
};

/// What discovery said about a segment at one moment.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// Segment name, as opened.
    pub name: String,
    /// Control address.
    pub address: HostPort,
    /// The descriptor.
    pub descriptor: Arc<SegmentDescriptor>,
    /// Which life of the segment; `None` for an official Mooncake peer, which does not say.
    pub generation: Option<Generation>,
}

impl Resolved {
    /// Puts together what was found.
    pub fn new(name: &str, address: HostPort, descriptor: SegmentDescriptor) -> Self {
        let generation = descriptor.tidewire.as_ref().and_then(generation_of);
        Resolved { name: name.to_owned(), address, descriptor: Arc::new(descriptor), generation }
    }

    /// The published buffers with their locations.
    pub fn buffers(&self) -> Vec<BufferInfo> {
        let locations = self.descriptor.tidewire.as_ref().map(|native| native.locations.as_slice()).unwrap_or_default();
        let location = |index: usize| -> Location {
            locations.get(index).map_or(Location::Any, |text| match text.parse() {
                Ok(location) => location,
                Err(never) => match never {},
            })
        };
        let buffers = self.descriptor.buffers.iter().enumerate();
        buffers.map(|(i, b)| BufferInfo { addr: b.addr, len: b.length, location: location(i) }).collect()
    }
}

fn generation_of(native: &NativeExtension) -> Option<Generation> {
    u64::from_str_radix(&native.generation, 16).ok().map(Generation)
}

/// The store, the keys and the control client of one engine.
#[derive(Debug)]
pub struct Discovery {
    /// The store.
    pub store: Arc<dyn MetadataStore>,
    /// Whether the store is `p2p`: names are addresses and nothing has to be published.
    pub p2p: bool,
    /// Whether values end with a newline, as Mooncake's do in etcd.
    pub newline: bool,
    /// Mooncake's keys of the cluster.
    pub keys: KeySpace,
    /// For notifications and probes.
    pub client: ControlClient,
    /// Limit of one call to the store.
    pub timeout: Duration,
}

impl Discovery {
    /// Looks a segment up.
    ///
    /// # Errors
    /// [`TransferError::SegmentNotFound`] if the store does not know it, or the peer does not answer (`p2p`);
    /// [`TransferError::Metadata`] if the store does not answer.
    pub async fn resolve(&self, name: &str) -> Result<Resolved, TransferError> {
        let missing = |reason: String| TransferError::SegmentNotFound {
            segment: name.to_owned(),
            store: self.store.describe(),
            reason,
        };
        let key = self.keys.ram(name);
        let entry = match self.get(&key).await {
            Err(error) if self.p2p => return Err(missing(error.to_string())),
            other => other.map_err(|error| self.failed(&error))?,
        };
        let entry = entry.ok_or_else(|| missing(format!("no key {key}")))?;
        let descriptor = SegmentDescriptor::decode(&entry.value)
            .map_err(|error| missing(format!("descriptor under {key} cannot be used: {error}")))?;
        let address = match self.p2p {
            true => HostPort::parse(name),
            false => self
                .control_address(name)
                .await?
                .ok_or_else(|| missing(format!("no key {}, although {key} is there", self.keys.rpc_meta(name))))?,
        };
        Ok(Resolved::new(name, address, descriptor))
    }

    /// The control address that the store has for a server name.
    ///
    /// # Errors
    /// [`TransferError::Metadata`].
    pub async fn control_address(&self, name: &str) -> Result<Option<HostPort>, TransferError> {
        Ok(self.control_entry(name).await?.and_then(|(_, address)| address))
    }

    /// The revision of that entry, and its address unless it cannot be read.
    ///
    /// # Errors
    /// [`TransferError::Metadata`].
    pub async fn control_entry(&self, name: &str) -> Result<Option<(u64, Option<HostPort>)>, TransferError> {
        let entry = self.get(&self.keys.rpc_meta(name)).await.map_err(|error| self.failed(&error))?;
        Ok(entry.map(|entry| (entry.revision, address_of(&entry))))
    }

    /// Everybody who is published.
    ///
    /// # Errors
    /// [`TransferError::Metadata`], also for stores that cannot list.
    pub async fn list(&self) -> Result<Vec<ListedSegment>, TransferError> {
        let entries = self.store.list(self.keys.prefix()).await.map_err(|error| self.failed(&error))?;
        let mut segments = Vec::new();
        for entry in &entries {
            let Some(name) = self.keys.segment_of(&entry.key) else { continue };
            let Ok(descriptor) = SegmentDescriptor::decode(&entry.value) else { continue };
            let server_key = self.keys.rpc_meta(name);
            let address = entries.iter().find(|other| other.key == server_key).and_then(address_of);
            segments.push(ListedSegment {
                name: name.to_owned(),
                address: address.map(|address| address.to_string()),
                descriptor,
                leased: entry.leased,
                ttl: entry.ttl,
            });
        }
        Ok(segments)
    }

    /// Delivers a notification; one attempt, because a second one could deliver it twice.
    ///
    /// # Errors
    /// [`TransferError::NotifyFailed`].
    pub async fn notify(&self, segment: &str, address: &HostPort, notify: &Notify) -> Result<(), TransferError> {
        let failed =
            |error: ControlError| TransferError::NotifyFailed { segment: segment.to_owned(), reason: error.chain() };
        self.client.notify(address, notify).await.map_err(failed)
    }

    /// Wraps a failure of the store.
    pub fn failed(&self, error: &StoreError) -> TransferError {
        TransferError::Metadata { store: self.store.describe(), reason: error.to_string() }
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        match tokio::time::timeout(self.timeout, self.store.get(key)).await {
            Ok(result) => result,
            Err(_) => Err(StoreError::Unreachable {
                store: self.store.describe(),
                reason: format!("no answer within {} ms", self.timeout.as_millis()),
            }),
        }
    }
}

fn address_of(entry: &Entry) -> Option<HostPort> {
    let meta = RpcMeta::decode(&entry.value).ok()?;
    Some(HostPort::new(&meta.ip_or_host_name, meta.rpc_port))
}
