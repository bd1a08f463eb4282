//! Batches by id: a slab whose slots have generations, so that the id of a freed batch is an error.

use std::sync::{Arc, Mutex};

use tidewire_core::{BatchId, TransferError};

use super::flight::Flight;
use crate::memory::lock;

/// All batches of an engine.
#[derive(Debug, Default)]
pub struct BatchTable {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Freed with slices in flight; kept until they are settled.
    orphans: Vec<Arc<Flight>>,
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    flight: Option<Arc<Flight>>,
}

impl BatchTable {
    /// Adds the batch that `make` builds for its id.
    pub fn insert(&self, make: impl FnOnce(BatchId) -> Arc<Flight>) -> Arc<Flight> {
        let mut inner = lock(&self.inner);
        let index = match inner.free.pop() {
            Some(index) => index,
            None => {
                inner.slots.push(Slot::default());
                (inner.slots.len() - 1) as u32
            }
        };
        let mut generation = 0;
        if let Some(slot) = inner.slots.get_mut(index as usize) {
            // Generation 0 would read as 1, so it is skipped.
            slot.generation = (slot.generation % 0x7fff_ffff) + 1;
            generation = slot.generation;
        }
        let flight = make(BatchId::new(index, generation));
        if let Some(slot) = inner.slots.get_mut(index as usize) {
            slot.flight = Some(Arc::clone(&flight));
        }
        flight
    }

    /// The batch of this id.
    ///
    /// # Errors
    /// [`TransferError::UnknownBatch`] if it was freed, or never given out.
    pub fn get(&self, id: BatchId) -> Result<Arc<Flight>, TransferError> {
        let inner = lock(&self.inner);
        let slot = inner.slots.get(id.index() as usize).filter(|slot| slot.generation == id.generation());
        slot.and_then(|slot| slot.flight.clone()).ok_or(TransferError::UnknownBatch { batch: id.raw() })
    }

    /// Frees an id. What is in flight goes on, and its deadline still counts.
    ///
    /// # Errors
    /// [`TransferError::UnknownBatch`].
    pub fn remove(&self, id: BatchId) -> Result<(), TransferError> {
        let mut inner = lock(&self.inner);
        let slot = inner.slots.get_mut(id.index() as usize).filter(|slot| slot.generation == id.generation());
        let flight = slot.and_then(|slot| slot.flight.take()).ok_or(TransferError::UnknownBatch { batch: id.raw() })?;
        inner.free.push(id.index());
        flight.free();
        if !flight.core.is_settled() {
            inner.orphans.push(flight);
        }
        Ok(())
    }

    /// Batches with something in flight. Orphans that are settled are let go.
    pub fn in_flight(&self) -> Vec<Arc<Flight>> {
        let mut inner = lock(&self.inner);
        inner.orphans.retain(|flight| !flight.core.is_settled());
        let held = inner.slots.iter().filter_map(|slot| slot.flight.as_ref());
        held.filter(|flight| !flight.core.is_settled()).chain(&inner.orphans).cloned().collect()
    }
}
