//! The public door: [`TransferEngine`], its builder, batches and buffers.
//!
//! * [`builder`] assembles an engine, `transports` starts what moves bytes;
//! * [`engine`] and [`memory`] are the methods of [`TransferEngine`], [`buffer`] is memory that the engine allocates;
//! * [`batch`] is the caller's handle of a batch, `flight` its state while something is in flight, `submit` checks and
//!   cuts requests, `table` finds batches by id, `ticker` keeps the deadlines of those that nobody waits for;
//! * `inbox` answers peers on the control port.
//!
//! Nothing here touches registered memory; links do.

pub mod batch;
pub mod buffer;
pub mod builder;
pub mod engine;
pub(crate) mod flight;
pub(crate) mod inbox;
pub mod memory;
pub(crate) mod submit;
pub(crate) mod table;
pub(crate) mod ticker;
pub(crate) mod transports;

pub use batch::{Batch, Settled};
pub use buffer::Buffer;
pub use builder::EngineBuilder;
pub use engine::TransferEngine;
