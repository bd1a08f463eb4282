//! Tidewire transfer engine: moves registered memory between processes.
//!
//! [`TransferEngine`] is the door. Ownership and IO live here; decisions live in `tidewire-core`.
#![deny(unsafe_code)]

pub mod batch;
pub mod memory;
pub mod metadata;
pub(crate) mod shm;
pub mod transport;

pub use tidewire_core as core;
