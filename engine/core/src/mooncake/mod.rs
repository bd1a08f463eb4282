//! Mooncake's formats: segment descriptors, metadata keys, control frames, TCP data headers, host names.
//!
//! Decoders never panic and never allocate more than the bytes they were given justify.

pub mod descriptor;
