//! The open segments of an engine, by id and by name.
//!
//! The same name gives the same id for as long as it is open; an id is never used again for another name.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use tidewire_core::{SegmentId, TransferError};

use super::{discovery::Resolved, remote::Segment};

/// Open segments. Index 0 is the own one.
#[derive(Debug, Default)]
pub struct SegmentTable {
    inner: RwLock<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    slots: Vec<Option<Arc<Segment>>>,
    by_name: HashMap<String, SegmentId>,
}

impl SegmentTable {
    /// A table with the own segment.
    pub fn new(own: Resolved) -> Self {
        let table = SegmentTable::default();
        table.insert(own);
        table
    }

    /// The segment with this id.
    ///
    /// # Errors
    /// [`TransferError::UnknownSegment`].
    pub fn get(&self, id: SegmentId) -> Result<Arc<Segment>, TransferError> {
        let inner = self.read();
        let slot = inner.slots.get(id.0 as usize).and_then(Option::as_ref);
        slot.cloned().ok_or(TransferError::UnknownSegment { segment: id })
    }

    /// Whether a segment with this id is open.
    ///
    /// # Errors
    /// [`TransferError::UnknownSegment`] if not.
    pub fn check(&self, id: SegmentId) -> Result<(), TransferError> {
        let known = self.read().slots.get(id.0 as usize).is_some_and(Option::is_some);
        if known { Ok(()) } else { Err(TransferError::UnknownSegment { segment: id }) }
    }

    /// The open segment of this name.
    pub fn by_name(&self, name: &str) -> Option<Arc<Segment>> {
        let inner = self.read();
        let id = inner.by_name.get(name)?;
        inner.slots.get(id.0 as usize)?.clone()
    }

    /// Adds a segment, or gives the one of this name that was added meanwhile.
    pub fn insert(&self, resolved: Resolved) -> Arc<Segment> {
        let mut inner = self.write();
        let present = inner.by_name.get(&resolved.name).and_then(|id| inner.slots.get(id.0 as usize)?.clone());
        if let Some(present) = present {
            return present;
        }
        let id = SegmentId(inner.slots.len() as u32);
        inner.by_name.insert(resolved.name.clone(), id);
        let segment = Segment::new(id, resolved);
        inner.slots.push(Some(Arc::clone(&segment)));
        segment
    }

    /// Takes a segment out. The own one stays.
    ///
    /// # Errors
    /// [`TransferError::UnknownSegment`].
    pub fn remove(&self, id: SegmentId) -> Result<Arc<Segment>, TransferError> {
        let unknown = TransferError::UnknownSegment { segment: id };
        if id == SegmentId::LOCAL {
            return Err(unknown);
        }
        let mut inner = self.write();
        let segment = inner.slots.get_mut(id.0 as usize).and_then(Option::take).ok_or(unknown)?;
        inner.by_name.remove(segment.name());
        Ok(segment)
    }

    /// All open segments, in order of opening.
    pub fn snapshot(&self) -> Vec<Arc<Segment>> {
        self.read().slots.iter().flatten().cloned().collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}
