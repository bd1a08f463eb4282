//! The link to one same-host peer, as the engine sees it.

use std::{sync::Arc, time::Instant};

use tidewire_core::{ByteRange, TransferError};

use super::client::Client;
use crate::{
    batch::BatchCore,
    transport::{Drive, Link, Slice, TransportKind},
};

/// Link of kind `shm` or `cma`; closes its connection when dropped.
#[derive(Debug)]
pub(super) struct SameHostLink {
    client: Arc<Client>,
}

impl SameHostLink {
    pub(super) fn new(client: Arc<Client>) -> Self {
        SameHostLink { client }
    }
}

impl Link for SameHostLink {
    fn kind(&self) -> TransportKind {
        self.client.kind()
    }

    fn accepts(&self, target: ByteRange) -> bool {
        self.client.accepts(target)
    }

    fn submit(&self, slices: &mut Vec<Slice>) {
        self.client.submit(slices);
    }

    fn drive(&self, batch: &Arc<BatchCore>, how: Drive) -> bool {
        wait_settled(batch, how)
    }

    fn cancel(&self, batch: &Arc<BatchCore>, error: &dyn Fn(ByteRange) -> TransferError) {
        self.client.cancel(batch, error);
    }

    fn open_slices(&self) -> usize {
        self.client.open_slices()
    }

    fn failure(&self) -> Option<TransferError> {
        self.client.failure()
    }

    fn describe(&self) -> String {
        self.client.describe()
    }

    fn close(&self) {
        self.client.close();
    }
}

impl Drop for SameHostLink {
    fn drop(&mut self) {
        // The last reference may go on a thread that settles a slice of this link, so nothing is waited for.
        self.client.detach();
    }
}

/// Waits for `batch` where other threads make the progress: spins for a while, then sleeps.
pub(in crate::transport) fn wait_settled(batch: &Arc<BatchCore>, how: Drive) -> bool {
    if batch.is_settled() {
        return true;
    }
    let spin_until = (Instant::now() + how.spin).min(how.deadline);
    while Instant::now() < spin_until {
        if batch.is_settled() {
            return true;
        }
        std::hint::spin_loop();
    }
    while !batch.park(how.deadline) {
        if Instant::now() >= how.deadline {
            return batch.is_settled();
        }
    }
    true
}
