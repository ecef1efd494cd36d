//! A file in memory only as far as it is being read.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};
use safetensors::SafeTensorError;

use crate::error::{ModelError, Result};

/// How much of a file is hashed before its pages are let go.
const CHUNK: usize = 64 << 20;

/// A file that is mapped read-only.
#[derive(Debug)]
pub(super) struct Mapped {
    file: PathBuf,
    map: Mmap,
}

impl Mapped {
    /// Maps `path`.
    ///
    /// # Errors
    /// It is missing, unreadable, or a pickle.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(ModelError::MissingFile { file: path.into(), expected: "a safetensors file".into() });
            }
            Err(source) => return Err(ModelError::Unreadable { file: path.into(), source }),
        };
        // SAFETY: the map is read-only and private to this process. Model files are written whole and renamed into
        // place, never changed under a reader; ella itself keeps to that in `save`.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| ModelError::Unreadable { file: path.into(), source })?;
        // A zip archive or a bare pickle under a wrong name: torch.save's two formats.
        if map.starts_with(b"PK\x03\x04") || map.starts_with(b"\x80\x02") {
            return Err(ModelError::Pickle { file: path.into() });
        }
        Ok(Mapped { file: path.into(), map })
    }

    /// Which file it is.
    pub(super) fn path(&self) -> &Path {
        &self.file
    }

    /// Lets go the pages under `bytes`, which would else count as this process's memory; they are read anew when they are wanted.
    pub(super) fn release(&self, bytes: Range<usize>) {
        // SAFETY: the map is of a file and read-only, so a page that is let go comes back with the same content, for other threads
        // that read it at this moment too. The range lies inside the map: it was sliced by it.
        let advised = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
        // Refused advice costs memory and nothing else.
        drop(advised);
    }

    /// Gives all bytes to `take`, part by part.
    pub(super) fn each_chunk(&self, mut take: impl FnMut(&[u8])) {
        for start in (0..self.map.len()).step_by(CHUNK) {
            let range = start..self.map.len().min(start + CHUNK);
            take(&self.map[range.clone()]);
            self.release(range);
        }
    }

    /// What a header that cannot be read says about the file.
    pub(super) fn broken(&self, error: SafeTensorError) -> ModelError {
        let cut = |rule| ModelError::Truncated { file: self.file.clone(), rule, found: self.map.len() as u64 };
        match error {
            SafeTensorError::HeaderTooSmall => cut("expected at least the 8 bytes of the header's length"),
            SafeTensorError::InvalidHeaderLength => cut("expected the length that its first 8 bytes give for the header"),
            SafeTensorError::MetadataIncompleteBuffer => cut("expected the length that its header gives for the tensors"),
            other => ModelError::NotSafetensors { file: self.file.clone(), reason: other.to_string() },
        }
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}
