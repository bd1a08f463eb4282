//! Decisions of the Tidewire transfer engine.
//!
//! Everything here is a pure function or a plain data type: no threads, no sockets, no clock (time comes in as an
//! argument) and no `unsafe`. The `tidewire-engine` crate acts on what this crate decides.
#![forbid(unsafe_code)]

pub mod error;
pub mod id;
pub mod local;
pub mod location;
pub mod mooncake;
pub mod native;
pub mod range;
pub mod request;
pub mod select;

pub use error::{ErrorClass, TransferError};
pub use id::{BatchId, Generation, SegmentId};
pub use location::Location;
pub use range::ByteRange;
pub use request::{BatchStatus, Notify, Opcode, TaskState, TaskStatus, TransferRequest};
pub use select::TransportKind;
