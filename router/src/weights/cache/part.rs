//! A blob that is being fetched.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use hanse_protocol::{Blob, GROUP_BYTES, GroupTree, TreeBuilder, group_count};

use super::CacheError;
use super::room::Promise;

/// A blob that is being fetched, locked for this process. Dropped, it stays for another time.
#[derive(Debug)]
pub struct PartFile {
    file: File,
    path: PathBuf,
    whole: PathBuf,
    blob: Blob,
    _promise: Promise,
}

impl PartFile {
    pub(super) fn new(file: File, path: PathBuf, whole: PathBuf, blob: Blob, promise: Promise) -> Self {
        Self { file, path, whole, blob, _promise: promise }
    }

    /// What is fetched.
    #[must_use]
    pub fn blob(&self) -> Blob {
        self.blob
    }

    fn failed(&self, source: std::io::Error) -> CacheError {
        CacheError::of(&self.path, source)
    }

    /// Bytes there are, holes included.
    ///
    /// # Errors
    /// `Io`.
    pub fn length(&self) -> Result<u64, CacheError> {
        Ok(self.file.metadata().map_err(|e| self.failed(e))?.len())
    }

    /// The tree that an earlier attempt left; it proves itself.
    #[must_use]
    pub fn tree(&self) -> Option<GroupTree> {
        let Blob { hash, bytes } = self.blob;
        GroupTree::single(hash, bytes).or_else(|| {
            let list = std::fs::read(self.path.with_extension("tree")).ok()?;
            GroupTree::verified(hash, bytes, &list)
        })
    }

    /// Keeps the tree for a later attempt.
    ///
    /// # Errors
    /// `Io`, `DiskFull`.
    pub fn keep_tree(&self, tree: &GroupTree) -> Result<(), CacheError> {
        let list = tree.list();
        std::fs::write(self.path.with_extension("tree"), list).map_err(|e| self.failed(e))
    }

    /// The groups that are not there, or not as they should be.
    ///
    /// # Errors
    /// `Io`.
    pub fn missing(&self, tree: &GroupTree) -> Result<Vec<u64>, CacheError> {
        let length = self.length()?;
        let mut missing = Vec::new();
        let mut buffer = vec![0; GROUP_BYTES.min(self.blob.bytes) as usize];
        for group in 0..group_count(self.blob.bytes) {
            let start = group * GROUP_BYTES;
            let bytes = GROUP_BYTES.min(self.blob.bytes - start);
            let data = &mut buffer[..bytes as usize];
            let there = start + bytes <= length;
            if there {
                self.file.read_exact_at(data, start).map_err(|e| self.failed(e))?;
            }
            if !there || !tree.fits(group, data) {
                missing.push(group);
            }
        }
        Ok(missing)
    }

    /// Writes bytes at their place.
    ///
    /// # Errors
    /// `Io`, `DiskFull`.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), CacheError> {
        self.file.write_all_at(data, offset).map_err(|e| self.failed(e))
    }

    /// Whether all of the file has the blob's hash.
    ///
    /// # Errors
    /// `Io`.
    pub fn is_right(&self) -> Result<bool, CacheError> {
        if self.length()? != self.blob.bytes {
            return Ok(false);
        }
        let mut builder = TreeBuilder::new();
        let mut buffer = vec![0; GROUP_BYTES.min(self.blob.bytes) as usize];
        let mut at = 0;
        while at < self.blob.bytes {
            let step = (self.blob.bytes - at).min(GROUP_BYTES);
            let data = &mut buffer[..step as usize];
            self.file.read_exact_at(data, at).map_err(|e| self.failed(e))?;
            builder.update(data);
            at += step;
        }
        Ok(builder.finish().hash() == self.blob.hash)
    }

    /// Gives the blob its name, for all to use. The caller has seen that all of it is right.
    ///
    /// # Errors
    /// `Io`, `DiskFull`.
    pub fn finish(self) -> Result<(), CacheError> {
        let failed = |source| self.failed(source);
        // An earlier attempt may have written beyond the end.
        self.file.set_len(self.blob.bytes).map_err(failed)?;
        // Only what is on the disk gets the name: after a power loss a blob is whole or not there.
        self.file.sync_all().map_err(failed)?;
        std::fs::rename(&self.path, &self.whole).map_err(failed)?;
        let _ = std::fs::remove_file(self.path.with_extension("tree"));
        if let Some(folder) = self.path.parent() {
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
        }
        Ok(())
    }

    /// Throws away what is there: it is wrong, and nobody knows where.
    ///
    /// # Errors
    /// `Io`.
    pub fn clear(&self) -> Result<(), CacheError> {
        self.file.set_len(0).map_err(|e| self.failed(e))
    }
}
