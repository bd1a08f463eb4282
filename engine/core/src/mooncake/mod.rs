//! Mooncake's formats: segment descriptors, metadata keys, control frames, TCP data headers, host names.
//!
//! Decoders never panic and never allocate more than the bytes they were given justify.

pub mod control;
pub mod data;
pub mod descriptor;
pub mod host;
pub mod keys;
pub mod rpc_meta;

use std::fmt;

/// Why bytes are not the metadata they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Not the JSON expected.
    #[error("{what} is not valid: {reason}")]
    Json {
        /// Which document.
        what: &'static str,
        /// What the parser said, with line and column.
        reason: String,
    },
    /// A field holds something no peer can work with.
    #[error("field {field} of the descriptor of {segment} {rule}")]
    Field {
        /// Name in the descriptor.
        segment: String,
        /// Path of the field, like `buffers[3].addr`.
        field: FieldPath,
        /// The rule it breaks.
        rule: &'static str,
    },
}

/// Where in a descriptor: a field, or a field of the n-th entry of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldPath {
    /// List, empty for a top-level field.
    pub list: &'static str,
    /// Entry of the list.
    pub index: usize,
    /// Field.
    pub field: &'static str,
}

impl FieldPath {
    fn top(field: &'static str) -> Self {
        FieldPath { list: "", index: 0, field }
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.list {
            "" => f.write_str(self.field),
            list => write!(f, "{list}[{}].{}", self.index, self.field),
        }
    }
}

/// Decodes a JSON document that may end with white space.
fn from_json<T: serde::de::DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, DecodeError> {
    serde_json::from_slice(bytes).map_err(|e| DecodeError::Json { what, reason: e.to_string() })
}

/// Encodes compactly. The types of this module have string keys only, so encoding them cannot fail.
fn to_json<T: serde::Serialize>(value: &T) -> Vec<u8> {
    let encoded = serde_json::to_vec(value);
    debug_assert!(encoded.is_ok(), "plain data always encodes");
    encoded.unwrap_or_default()
}
