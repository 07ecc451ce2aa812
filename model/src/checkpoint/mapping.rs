//! Bytes of a file in memory.

use std::fmt::Debug;
use std::fs::File;
use std::ops::Deref;

use memmap2::Mmap;

/// A whole file, mapped read-only.
#[derive(Debug)]
pub struct Mapping {
    map: Mmap,
    _guard: Option<Box<dyn Debug + Send + Sync>>,
}

impl Mapping {
    /// Maps all of `file`, which must not be truncated while the mapping lives.
    ///
    /// # Errors
    /// What the system says.
    pub fn of(file: &File) -> std::io::Result<Self> {
        // SAFETY: the mapping is read-only; the file must stay as it is, as documented here and at `Checkpoint`.
        let map = unsafe { Mmap::map(file) }?;
        Ok(Self { map, _guard: None })
    }

    /// Like [`Mapping::of`]; `guard` lives as long as the mapping, and keeps the file from being changed.
    ///
    /// # Errors
    /// What the system says.
    pub fn guarded(file: &File, guard: impl Debug + Send + Sync + 'static) -> std::io::Result<Self> {
        Ok(Self { _guard: Some(Box::new(guard)), ..Self::of(file)? })
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}
