//! Tidewire transfer engine: moves registered memory between processes.
//!
//! [`TransferEngine`] is the door. Ownership and IO live here; decisions live in `tidewire-core`.
//!
//! Two engines, here in one process, and a write from the memory of one into that of the other:
//!
//! ```
//! use std::time::Duration;
//! use tidewire_engine::{Location, Opcode, TransferEngine, TransferRequest};
//!
//! # fn main() -> Result<(), tidewire_engine::TransferError> {
//! let target = TransferEngine::builder("127.0.0.1").build()?;
//! let there = target.allocate(4096, Location::Any)?;
//!
//! let engine = TransferEngine::builder("127.0.0.1").build()?;
//! let here = engine.allocate(4096, Location::Any)?;
//! here.write_at(0, b"hello")?;
//! let segment = engine.open_segment(target.segment_name())?;
//! let write = TransferRequest {
//!     opcode: Opcode::Write,
//!     source: here.addr(),
//!     target: segment,
//!     target_offset: there.addr(),
//!     length: 4096,
//! };
//! engine.transfer_sync(&[write], Duration::from_secs(10))?;
//!
//! let mut bytes = [0; 5];
//! there.read_at(0, &mut bytes)?;
//! assert_eq!(&bytes, b"hello");
//! # Ok(())
//! # }
//! ```
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
