//! What the pages hold: bytes that depend on layer, page and plane, or the bytes of a file.

use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::layout::Layout;
use crate::{error::CliError, pattern::Pattern};

/// Where content comes from; both processes are told the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContentSpec {
    /// Generated.
    Pattern {
        /// Seed of the bytes.
        seed: u64,
    },
    /// A file that both processes can read.
    File {
        /// Its path.
        path: PathBuf,
    },
}

/// Content that can be read block by block.
#[derive(Debug)]
pub enum Content {
    /// Generated.
    Pattern(Pattern),
    /// From a file.
    File(File, PathBuf),
}

impl Content {
    /// Opens what `spec` names.
    ///
    /// # Errors
    /// [`CliError::Io`] when the file cannot be read.
    pub fn open(spec: &ContentSpec) -> Result<Self, CliError> {
        match spec {
            ContentSpec::Pattern { seed } => Ok(Content::Pattern(Pattern::new(*seed))),
            ContentSpec::File { path } => {
                let file = File::open(path).map_err(CliError::io(format!("opening {}", path.display())))?;
                Ok(Content::File(file, path.clone()))
            }
        }
    }

    /// Writes the bytes of one block into `out`.
    ///
    /// # Errors
    /// [`CliError::Io`] when the file got shorter.
    pub fn read(&self, layout: &Layout, layer: u32, plane: u32, page: u32, out: &mut [u8]) -> Result<(), CliError> {
        match self {
            Content::Pattern(pattern) => {
                pattern.part(layer.into()).part(plane.into()).part(page.into()).fill(0, out);
                Ok(())
            }
            Content::File(file, path) => {
                let read: io::Result<()> = file.read_exact_at(out, u64::from(page) * layout.block_bytes);
                read.map_err(CliError::io(format!("reading {}", path.display())))
            }
        }
    }
}
