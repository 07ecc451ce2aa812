//! Keeping the cache within its limit, though parts are only about to become as large as their blobs.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hanse_protocol::{Blob, BlobHash};

use super::{Cache, CacheError, Entry, Users};

/// All files are counted again after this, in case other processes have added some: counting takes long where there are many.
const COUNTED_FOR: Duration = Duration::from_secs(2);

/// What this process is about to add to the cache.
#[derive(Debug, Default)]
pub(super) struct Promises {
    /// Bytes that the parts will have which are being fetched.
    parts: HashMap<BlobHash, u64>,
    /// When all files were counted last, and how many bytes there are at most, with what was promised since.
    counted: Option<(Instant, u64)>,
}

impl Promises {
    /// Counts the blob as if all of it were there, as long as what is returned lives.
    pub(super) fn promise(&mut self, blob: &Blob, promises: &Arc<Mutex<Self>>) -> Promise {
        self.parts.insert(blob.hash, blob.bytes);
        Promise { promises: promises.clone(), hash: blob.hash }
    }
}

/// A blob that is being fetched is counted as long as this lives.
#[derive(Debug)]
pub(super) struct Promise {
    promises: Arc<Mutex<Promises>>,
    hash: BlobHash,
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.promises.lock().unwrap_or_else(PoisonError::into_inner).parts.remove(&self.hash);
    }
}

impl Cache {
    /// Removes blobs that nobody uses, the longest unused first, until `blob` fits.
    pub(super) fn make_room(&self, blob: &Blob, except: &Path, promises: &mut Promises) -> Result<(), CacheError> {
        if self.limit_bytes == u64::MAX {
            return Ok(());
        }
        if let Some((at, most)) = &mut promises.counted {
            let with_it = most.saturating_add(blob.bytes);
            if at.elapsed() < COUNTED_FOR && with_it <= self.limit_bytes {
                *most = with_it;
                return Ok(());
            }
        }
        let mut entries = self.entries()?;
        entries.retain(|entry| entry.path != except);
        let promised_of = |entry: &Entry| {
            let is_part = entry.path.extension().is_some_and(|extension| extension == "part");
            hash_of(entry).filter(|_| is_part).and_then(|hash| promises.parts.get(&hash)).copied().unwrap_or(0)
        };
        entries.iter_mut().for_each(|entry| entry.bytes = entry.bytes.max(promised_of(entry)));
        let mut used_bytes: u64 = entries.iter().map(|entry| entry.bytes).sum();
        if used_bytes.saturating_add(blob.bytes) <= self.limit_bytes {
            promises.counted = Some((Instant::now(), used_bytes + blob.bytes));
            return Ok(());
        }
        entries.sort_by_key(|entry| entry.used);
        let users = self.dir.join("users");
        let in_use = Users::in_use(&users).map_err(|source| CacheError::of(users, source))?;
        for entry in entries {
            if used_bytes.saturating_add(blob.bytes) <= self.limit_bytes {
                break;
            }
            if hash_of(&entry).is_some_and(|hash| in_use.contains(&hash)) {
                continue;
            }
            let Ok(file) = File::open(&entry.path) else { continue };
            // A part that is being fetched is locked. A tree has no lock of its own: it goes with its part.
            let is_tree = entry.path.extension().is_some_and(|extension| extension == "tree");
            if is_tree || file.try_lock().is_err() || std::fs::remove_file(&entry.path).is_err() {
                continue;
            }
            tracing::debug!(path = %entry.path.display(), "removed from the cache");
            let _ = std::fs::remove_file(entry.path.with_extension("tree"));
            used_bytes = used_bytes.saturating_sub(entry.bytes);
        }
        if used_bytes.saturating_add(blob.bytes) <= self.limit_bytes {
            return Ok(());
        }
        Err(CacheError::TooSmall { limit_bytes: self.limit_bytes, used_bytes, needed_bytes: blob.bytes })
    }
}

/// The blob that a file of the cache belongs to.
fn hash_of(entry: &Entry) -> Option<BlobHash> {
    entry.path.file_stem()?.to_str()?.parse().ok()
}
