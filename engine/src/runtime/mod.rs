//! Threads of the engine that are not on the data path.

pub mod ctl;
