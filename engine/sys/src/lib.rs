//! Foreign declarations: libraries opened at run time, and system calls that have no safe wrapper elsewhere.

pub mod library;
pub mod process_vm;
