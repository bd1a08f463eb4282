//! Follows the store where it can be watched: a descriptor that vanished or changed marks its segment.
//!
//! The store is not believed alone, because a frozen or restarted store must cost no transfer in flight: when a descriptor
//! vanishes its owner is asked for a sign of life, and only if it gives none are the open slices ended.

use std::sync::{Arc, Weak};

use tidewire_core::SegmentId;

use super::{discovery::Discovery, remote::Segment, table::SegmentTable};
use crate::metadata::WatchEvent;

/// Follows the store until it is closed or the table is gone. Ends at once where the store cannot be watched.
pub async fn follow(discovery: Arc<Discovery>, table: Weak<SegmentTable>) {
    if !discovery.store.capabilities().watch {
        return;
    }
    let mut events = match discovery.store.watch(discovery.keys.prefix()).await {
        Ok(events) => events,
        Err(error) => {
            tracing::warn!(%error, "segments are not watched; a lost peer is noticed by its link");
            return;
        }
    };
    while let Some(event) = events.recv().await {
        let Some(table) = table.upgrade() else { return };
        match event {
            WatchEvent::Put(entry) => note_put(&discovery, &table, &entry.key, &entry.value),
            WatchEvent::Removed { key } => note_removed(&discovery, &table, &key),
        }
    }
}

fn note_put(discovery: &Discovery, table: &SegmentTable, key: &str, value: &[u8]) {
    let Some(segment) = open_peer(discovery, table, key) else { return };
    let Ok(seen) = serde_json::from_slice::<Life>(value) else { return };
    let known = segment.resolved().descriptor;
    if seen.tidewire.map(|native| native.generation) != known.tidewire.as_ref().map(|native| native.generation.clone())
    {
        tracing::info!(segment = %segment.name(), "segment was published by a new process");
        segment.mark_stale();
    }
}

/// The part of a descriptor that tells one life of a segment from the next; reading it costs less than the buffers do.
#[derive(serde::Deserialize)]
struct Life {
    tidewire: Option<NativeLife>,
}

#[derive(serde::Deserialize)]
struct NativeLife {
    generation: String,
}

/// The open segment of a peer that `key` is about. The own one is nobody's news.
fn open_peer(discovery: &Discovery, table: &SegmentTable, key: &str) -> Option<Arc<Segment>> {
    let segment = table.by_name(discovery.keys.segment_of(key)?)?;
    (segment.id() != SegmentId::LOCAL).then_some(segment)
}

fn note_removed(discovery: &Arc<Discovery>, table: &SegmentTable, key: &str) {
    let Some(segment) = open_peer(discovery, table, key) else { return };
    segment.mark_stale();
    if segment.present_links().is_none() {
        return;
    }
    let discovery = Arc::clone(discovery);
    tokio::spawn(async move {
        let address = segment.resolved().address;
        match discovery.client.probe(&address).await {
            Ok(()) => tracing::warn!(segment = %segment.name(), peer = %address,
                "descriptor vanished from the store, but the peer is there"),
            Err(error) => {
                tracing::warn!(segment = %segment.name(), peer = %address, error = %error.chain(),
                    "descriptor vanished from the store and the peer does not answer");
                segment.close(false);
            }
        }
    });
}
