//! [`TransferEngine`]: segments, batches, notifications, status, shutdown. Memory is in [`super::memory`].

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tidewire_core::{
    BatchId, BatchStatus, Generation, Notify, SegmentId, TransferError, TransferRequest, TransportKind,
    mooncake::host::HostPort,
};

use super::{
    batch::Batch,
    builder::EngineBuilder,
    flight::{Flight, Limits},
    inbox::Inbox,
    table::BatchTable,
    ticker::Ticker,
};
use crate::{
    config::Config,
    control::ControlServer,
    memory::{RegionTable, lock},
    observe::{Counters, EngineStatus, UnavailableTransport},
    runtime::ctl::Ctl,
    segment::{
        ListedSegment, SegmentInfo, connect::Connector, discovery::Discovery, own::OwnSegment, publish::Publisher,
        table::SegmentTable,
    },
    transport::shm::SameHost,
};

/// Moves registered memory between processes. One per process is enough; several do not disturb each other.
///
/// All methods may be called from any thread. They block where their description says so, and must then not be called
/// inside an asynchronous task.
///
/// Dropping it ends it as [`TransferEngine::shutdown`] does, with the configured drain time.
#[derive(Debug)]
pub struct TransferEngine {
    inner: Arc<EngineInner>,
}

/// What handles of an engine share.
#[derive(Debug)]
pub(crate) struct EngineInner {
    pub config: Config,
    /// Cores of this host.
    pub cores: usize,
    pub own: Arc<OwnSegment>,
    pub regions: Arc<RegionTable>,
    pub connector: Arc<Connector>,
    pub unavailable: Vec<(TransportKind, String)>,
    pub same_host: Option<Arc<SameHost>>,
    pub ctl: Arc<Ctl>,
    pub discovery: Arc<Discovery>,
    pub publisher: Arc<Publisher>,
    pub segments: Arc<SegmentTable>,
    pub batches: Arc<BatchTable>,
    pub inbox: Arc<Inbox>,
    pub counters: Arc<Counters>,
    pub ticker: Ticker,
    pub control: Mutex<Option<ControlServer>>,
    /// Set once: nothing new is taken.
    pub gate: AtomicBool,
}

impl TransferEngine {
    /// Starts to build an engine. See [`EngineBuilder`] for the meaning of `local_name`.
    pub fn builder(local_name: impl Into<String>) -> EngineBuilder {
        EngineBuilder::new(local_name.into())
    }

    pub(crate) fn from_inner(inner: Arc<EngineInner>) -> Self {
        TransferEngine { inner }
    }

    pub(crate) fn inner(&self) -> &Arc<EngineInner> {
        &self.inner
    }

    /// Name of the own segment, as peers open it.
    pub fn segment_name(&self) -> &str {
        &self.inner.own.identity().segment
    }

    /// Port of the control listener.
    pub fn rpc_port(&self) -> u16 {
        self.inner.own.control.port
    }

    /// This life of the own segment.
    pub fn generation(&self) -> Generation {
        self.inner.own.identity().generation
    }

    /// The settings in force.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Opens a segment. The same name gives the same id until it is closed; the own name gives [`SegmentId::LOCAL`].
    ///
    /// What discovery said is kept. A segment that was restarted, or whose link was lost, is looked up again by this call.
    /// Blocks within the limits of the store.
    ///
    /// # Errors
    /// [`TransferError::SegmentNotFound`], [`TransferError::Metadata`], [`TransferError::ShutDown`].
    pub fn open_segment(&self, name: &str) -> Result<SegmentId, TransferError> {
        self.inner.open(name, false)
    }

    /// Like [`TransferEngine::open_segment`], but looks the segment up in any case.
    ///
    /// # Errors
    /// As [`TransferEngine::open_segment`].
    pub fn open_segment_no_cache(&self, name: &str) -> Result<SegmentId, TransferError> {
        self.inner.open(name, true)
    }

    /// Closes a segment: its links end, and with them what is in flight. The id is not used again.
    ///
    /// # Errors
    /// [`TransferError::UnknownSegment`]; the own segment cannot be closed.
    pub fn close_segment(&self, id: SegmentId) -> Result<(), TransferError> {
        self.inner.segments.remove(id)?.close(true);
        Ok(())
    }

    /// What is known about an open segment: its buffers, the transport in use and why.
    ///
    /// # Errors
    /// [`TransferError::UnknownSegment`].
    pub fn segment_info(&self, id: SegmentId) -> Result<SegmentInfo, TransferError> {
        let segment = self.inner.segments.get(id)?;
        if id == SegmentId::LOCAL {
            self.inner.refresh_own();
        }
        Ok(segment.info())
    }

    /// Makes the link to a segment now rather than at the first submit; the transport that was chosen. Blocks for the
    /// connect timeout.
    ///
    /// # Errors
    /// As [`Batch::submit`], where it concerns the segment.
    pub fn connect(&self, id: SegmentId) -> Result<TransportKind, TransferError> {
        self.inner.check_gate()?;
        let segment = self.inner.segments.get(id)?;
        let deadline = Instant::now() + self.inner.config.tcp_connect_timeout + self.inner.config.control_timeout;
        let links = segment.links(&self.inner.connector, deadline)?;
        let internal = TransferError::Internal { reason: "links without a link" };
        links.paths.first().map(|path| path.link.kind()).ok_or(internal)
    }

    /// Makes a batch for at most `capacity` entries.
    ///
    /// # Errors
    /// [`TransferError::ShutDown`].
    pub fn allocate_batch(&self, capacity: usize) -> Result<Batch, TransferError> {
        let inner = &self.inner;
        inner.check_gate()?;
        // On one core, whoever polls keeps the peer from answering.
        let spin = if inner.cores > 1 { inner.config.spin } else { Duration::ZERO };
        let limits = Limits { without_progress: inner.config.batch_timeout, spin };
        let flight = inner.batches.insert(|id| Flight::new(id, capacity, limits, Arc::clone(&inner.counters)));
        Counters::add(&inner.counters.batches, 1);
        Ok(Batch::new(Arc::clone(inner), flight, true))
    }

    /// The batch of an id; dropping this handle does not free it.
    ///
    /// # Errors
    /// [`TransferError::UnknownBatch`] if it was freed, or never given out.
    pub fn batch(&self, id: BatchId) -> Result<Batch, TransferError> {
        Ok(Batch::new(Arc::clone(&self.inner), self.inner.batches.get(id)?, false))
    }

    /// Frees a batch that was given up for its id. What is in flight goes on.
    ///
    /// # Errors
    /// [`TransferError::UnknownBatch`].
    pub fn free_batch(&self, id: BatchId) -> Result<(), TransferError> {
        self.inner.batches.remove(id)
    }

    /// Submits `requests` and waits for them. Blocks.
    ///
    /// # Errors
    /// Those of [`Batch::submit`] and [`Batch::wait`], and the first error of a request.
    pub fn transfer_sync(&self, requests: &[TransferRequest], timeout: Duration) -> Result<BatchStatus, TransferError> {
        let batch = self.allocate_batch(requests.len())?;
        batch.submit(requests)?;
        batch.wait(timeout)?.into_result()
    }

    /// Notifications that came since the last call, in order of arrival; each is given out once.
    pub fn take_notifications(&self) -> Vec<Notify> {
        self.inner.inbox.take()
    }

    /// Sends a notification that belongs to no batch. Blocks for the control timeout; one attempt is made.
    ///
    /// # Errors
    /// [`TransferError::UnknownSegment`], [`TransferError::NotifyFailed`].
    pub fn send_notify(&self, segment: SegmentId, notify: Notify) -> Result<(), TransferError> {
        self.inner.send_notify(segment, notify)
    }

    /// Asks the engine at a control address `host:port` for a sign of life. Blocks for the control timeout.
    ///
    /// # Errors
    /// [`TransferError::Unreachable`].
    pub fn probe(&self, address: &str) -> Result<(), TransferError> {
        let (discovery, target) = (Arc::clone(&self.inner.discovery), HostPort::parse(address));
        let call = async move { discovery.client.probe(&target).await.map_err(|error| error.chain()) };
        let result = self.inner.ctl.run(self.inner.config.control_timeout + Duration::from_secs(1), call);
        result.unwrap_or_else(|error| Err(error.to_string())).map_err(|reason| TransferError::Unreachable {
            segment: address.to_owned(),
            peer: address.to_owned(),
            transport: "control",
            reason,
        })
    }

    /// Everybody the metadata store lists. Blocks within the limits of the store.
    ///
    /// # Errors
    /// [`TransferError::Metadata`], also where the store cannot list (`p2p`).
    pub fn segments(&self) -> Result<Vec<ListedSegment>, TransferError> {
        let discovery = Arc::clone(&self.inner.discovery);
        let result = self.inner.ctl.run(self.inner.store_limit(), async move { discovery.list().await });
        result.unwrap_or_else(|error| Err(self.inner.store_failed(error.to_string())))
    }

    /// State of the engine now.
    pub fn status(&self) -> EngineStatus {
        let inner = &self.inner;
        let regions = inner.regions.snapshot();
        let endpoints = inner.own.endpoints().cloned().unwrap_or_default();
        let unavailable = inner.unavailable.iter();
        EngineStatus {
            segment: self.segment_name().to_owned(),
            generation: self.generation().to_string(),
            store: inner.discovery.store.describe(),
            control_address: inner.own.control.to_string(),
            data_port: endpoints.data_port,
            mooncake_port: endpoints.mooncake_port,
            buffers: regions.len(),
            buffer_bytes: regions.iter().map(|region| region.range().len()).sum(),
            transports: inner.connector.offered.clone(),
            unavailable: unavailable
                .map(|(transport, reason)| UnavailableTransport { transport: *transport, reason: reason.clone() })
                .collect(),
            peers: inner.segments.snapshot().iter().map(|segment| segment.status()).collect(),
            open_batches: inner.batches.in_flight().len(),
            waiting_notifications: inner.inbox.len(),
            counters: inner.counters.values(),
        }
    }

    /// Ends the engine: nothing new is taken, open batches get `drain` to end, then they are ended; the segment is
    /// withdrawn from the store and all threads stop. A second call does nothing. Blocks.
    pub fn shutdown(&self, drain: Duration) {
        self.inner.shutdown(drain);
    }
}

impl Drop for TransferEngine {
    fn drop(&mut self) {
        self.inner.shutdown(self.inner.config.drain_timeout);
    }
}

impl EngineInner {
    /// Whether work is taken.
    pub fn check_gate(&self) -> Result<(), TransferError> {
        if self.gate.load(Ordering::Acquire) { Err(TransferError::ShutDown) } else { Ok(()) }
    }

    fn open(&self, name: &str, fresh: bool) -> Result<SegmentId, TransferError> {
        self.check_gate()?;
        if name == self.own.identity().segment {
            return Ok(SegmentId::LOCAL);
        }
        let known = self.segments.by_name(name);
        if let Some(segment) = known.as_ref().filter(|segment| !fresh && !segment.is_stale()) {
            return Ok(segment.id());
        }
        let resolved = self.connector.resolve(name)?;
        if let Some(segment) = known {
            segment.renew(resolved);
            return Ok(segment.id());
        }
        Ok(self.segments.insert(resolved).id())
    }

    /// Brings the own segment's entry up to date, for those who look at it.
    fn refresh_own(&self) {
        let (Ok(segment), Some(descriptor)) = (self.segments.get(SegmentId::LOCAL), self.own.current()) else { return };
        let mut resolved = segment.resolved();
        resolved.descriptor = Arc::new(descriptor);
        segment.renew(resolved);
    }

    fn send_notify(&self, id: SegmentId, notify: Notify) -> Result<(), TransferError> {
        self.check_gate()?;
        let segment = self.segments.get(id)?;
        let failed = |reason: String| TransferError::NotifyFailed { segment: segment.name().to_owned(), reason };
        if notify.message.is_empty() {
            return Err(failed("the message is empty".to_owned()));
        }
        if id == SegmentId::LOCAL {
            self.inbox.push(notify).map_err(|error| failed(error.to_string()))?;
        } else {
            let (discovery, target) = (Arc::clone(&self.discovery), segment.resolved());
            let call = async move { discovery.notify(&target.name, &target.address, &notify).await };
            let limit = self.config.control_connect_timeout + self.config.control_timeout + Duration::from_secs(1);
            self.ctl.run(limit, call).unwrap_or_else(|error| Err(failed(error.to_string())))?;
        }
        Counters::add(&self.counters.notifications_sent, 1);
        Ok(())
    }

    /// Limit of a sequence of store calls.
    pub fn store_limit(&self) -> Duration {
        2 * self.config.store_timeout + Duration::from_secs(1)
    }

    fn store_failed(&self, reason: String) -> TransferError {
        TransferError::Metadata { store: self.discovery.store.describe(), reason }
    }

    /// Gate, drain, teardown.
    pub fn shutdown(&self, drain: Duration) {
        if self.gate.swap(true, Ordering::AcqRel) {
            return;
        }
        let deadline = super::batch::deadline_after(drain);
        self.withdraw();
        for flight in self.batches.in_flight() {
            flight.detach();
            flight.core.park_settled(deadline);
        }
        for flight in self.batches.in_flight() {
            flight.abort(&|_, _| TransferError::Cancelled);
        }
        self.ticker.stop();
        self.inbox.close();
        for segment in self.segments.snapshot() {
            segment.close(true);
        }
        for transport in &self.connector.transports {
            transport.shutdown(deadline.saturating_duration_since(Instant::now()));
        }
        self.release_regions(deadline);
        if let Some(host) = &self.same_host {
            host.stop();
        }
        let (store, control) = (Arc::clone(&self.discovery.store), lock(&self.control).take());
        let left = deadline.saturating_duration_since(Instant::now());
        let teardown = async move {
            if let Some(control) = control {
                control.stop(left).await;
            }
            store.close().await
        };
        match self.ctl.run(self.store_limit() + left, teardown) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "metadata store was not closed in order"),
            Err(error) => tracing::warn!(%error, "control thread did not end in order"),
        }
        self.ctl.stop();
    }

    /// Takes every buffer out of use, so that a same-host peer that is slow to notice the end touches nothing.
    fn release_regions(&self, deadline: Instant) {
        for region in self.regions.snapshot() {
            let drain = deadline.saturating_duration_since(Instant::now()).min(self.config.unregister_drain);
            if let Err(error) = self.regions.unregister(region.range().addr(), drain, |region| self.evict(region)) {
                tracing::error!(%error, "a buffer is in use after the end of its engine");
            }
        }
    }

    /// Takes the segment out of the store, so that nobody finds it any more.
    fn withdraw(&self) {
        let publisher = Arc::clone(&self.publisher);
        let result = self.ctl.run(self.store_limit(), async move { publisher.withdraw().await });
        if let Err(error) = result.unwrap_or_else(|error| Err(self.store_failed(error.to_string()))) {
            tracing::warn!(%error, "segment was not withdrawn; its lease ends it where the store has leases");
        }
    }
}
