//! Tidewire transfer engine: moves registered memory between processes.
//!
//! [`TransferEngine`] is the door. Ownership and IO live here; decisions live in `tidewire-core`.
#![deny(unsafe_code)]

pub mod api;
pub mod batch;
pub mod config;
pub mod control;
pub mod memory;
pub mod metadata;
pub mod observe;
pub mod runtime;
pub mod segment;
pub(crate) mod shm;
pub mod transport;

pub use tidewire_core as core;

pub use api::{Batch, Buffer, EngineBuilder, TransferEngine};
pub use config::Config;
pub use observe::EngineStatus;
pub use segment::{BufferInfo, ListedSegment, SegmentInfo};
pub use tidewire_core::{
    BatchId, BatchStatus, ErrorClass, Generation, Location, Notify, Opcode, SegmentId, TaskState, TaskStatus,
    TransferError, TransferRequest, TransportKind,
};
