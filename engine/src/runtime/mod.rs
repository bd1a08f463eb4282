//! What an engine needs of its process: the control thread, descriptors.

pub mod ctl;
pub mod descriptors;
