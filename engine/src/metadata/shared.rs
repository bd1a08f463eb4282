//! A [`Table`] that several tasks use, and the signal that it changed.
//!
//! Invariants:
//! * the lock is never held across an await;
//! * the revision is announced under the lock, so it never steps back.

use std::sync::Mutex;

use tokio::sync::watch;

use super::table::{Limits, Table};
use crate::memory::lock;

/// A table behind a lock.
#[derive(Debug)]
pub(crate) struct SharedTable {
    table: Mutex<Table>,
    revision: watch::Sender<u64>,
}

impl SharedTable {
    /// An empty table whose first change gets the revision after `base`.
    pub(crate) fn new(base: u64, limits: Limits) -> Self {
        SharedTable { table: Mutex::new(Table::new(base, limits)), revision: watch::Sender::new(base) }
    }

    /// Uses the table and wakes who waits for a change, if there was one.
    pub(crate) fn with<T>(&self, action: impl FnOnce(&mut Table) -> T) -> T {
        let mut table = lock(&self.table);
        let result = action(&mut table);
        let revision = table.revision();
        self.revision.send_if_modified(|seen| std::mem::replace(seen, revision) != revision);
        result
    }

    /// Wakes at every change from now on.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }
}
