//! Bytes of a file in memory.

use std::fs::File;
use std::ops::Deref;

use memmap2::Mmap;

/// A whole file, mapped read-only. The file stays open, so that a lock held on it lasts as long as the mapping.
#[derive(Debug)]
pub struct Mapping {
    map: Mmap,
    _file: File,
}

impl Mapping {
    /// Maps all of `file`, which must not be truncated while the mapping lives.
    ///
    /// # Errors
    /// What the system says.
    pub fn of(file: File) -> std::io::Result<Self> {
        // SAFETY: the mapping is read-only; the file must stay as it is, as documented here and at `Checkpoint`.
        let map = unsafe { Mmap::map(&file) }?;
        Ok(Self { map, _file: file })
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}
