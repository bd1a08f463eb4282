//! Memory that two processes touch: control pages, mappings of a peer's memory, and the copies themselves.
//!
//! The only code of the same-host transports that uses raw pointers; [`crate::transport::shm`] builds on what is here.
//!
//! Invariants:
//! * bytes of a peer's region are touched only between [`ControlPage::enter`] and the drop of its [`Access`];
//! * a mapping is made only over a file that is sealed against shrinking and long enough, so that no access faults.
#![allow(unsafe_code, reason = "maps memory shared with other processes and copies by address")]

mod control;
mod copy;
mod credentials;
mod mapping;
mod remote;

pub(crate) use control::{Access, ControlPage, SLOTS};
pub(crate) use copy::{copy_forward, copy_local};
pub(crate) use credentials::peer_credentials;
pub(crate) use mapping::{FileMapping, PeerMapping};
pub(crate) use remote::{RemoteCopy, RemoteProcess};
