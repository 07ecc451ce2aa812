//! Blobs on disk, by hash. Several processes may share the folder.
//!
//! `blobs/<hash>` is a whole blob: it was compared with its hash before it got that name. `blobs/<hash>.part` is one that is
//! being fetched, and `blobs/<hash>.tree` the chaining values of its groups, by which what is there already is told from
//! holes and rubbish after a crash. A process that fetches holds an exclusive lock on the part; one that uses a blob says so
//! in `users/`, and nobody removes what is in use. Locks vanish with their process.

mod part;
mod room;
mod users;

use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use hanse_protocol::{Blob, BlobHash};

pub use part::PartFile;
use room::Promises;
pub use users::Pin;
use users::Users;

/// Blobs by hash, with a limit to their total size.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
    limit_bytes: u64,
    users: Arc<Users>,
    promises: Arc<Mutex<Promises>>,
}

/// A blob in the cache. It stays there as long as `pin` lives.
#[derive(Debug)]
pub struct Opened {
    /// All of it.
    pub file: File,
    /// Says that it is in use.
    pub pin: Pin,
}

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// A file or folder cannot be used.
    #[error("cannot use {} in the cache", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// No space is left on the disk. What has been fetched is kept, and fetching goes on from there.
    #[error("the disk is full: {} could not be written; make room and start again, what is there is kept", path.display())]
    DiskFull {
        /// The file that was written.
        path: PathBuf,
    },
    /// The limit leaves no room, even with everything removed that is not in use.
    #[error(
        "the cache may have {limit_bytes} bytes, of which {used_bytes} are in use, and {needed_bytes} more are needed: raise --cache-size"
    )]
    TooSmall {
        /// The limit.
        limit_bytes: u64,
        /// What cannot be removed.
        used_bytes: u64,
        /// What should be added.
        needed_bytes: u64,
    },
}

impl CacheError {
    /// What failed with a file or folder of the cache.
    pub(super) fn of(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        let path = path.into();
        if is_full(&source) { Self::DiskFull { path } } else { Self::Io { path, source } }
    }
}

/// Whether there is no room where something was written.
fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
}

/// How fetching of a blob begins.
#[derive(Debug)]
pub enum Begin {
    /// The blob is there.
    Present,
    /// Another process, or another task of this one, fetches it at present.
    Elsewhere,
    /// It is ours to fetch.
    Ours(PartFile),
}

/// A file of the cache and what is known of it.
struct Entry {
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

impl Cache {
    /// The cache in `dir`, which is created where it is missing. All blobs together have at most `limit_bytes` bytes.
    ///
    /// # Errors
    /// `Io` if the folder cannot be created.
    pub fn new(dir: &Path, limit_bytes: u64) -> Result<Self, CacheError> {
        let (blobs, users) = (dir.join("blobs"), dir.join("users"));
        std::fs::create_dir_all(&blobs).map_err(|source| CacheError::of(blobs, source))?;
        let users = Users::new(&users).map_err(|source| CacheError::of(users, source))?;
        Ok(Self { dir: dir.to_owned(), limit_bytes, users, promises: Arc::default() })
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn blobs(&self) -> PathBuf {
        self.dir.join("blobs")
    }

    fn path(&self, hash: BlobHash) -> PathBuf {
        self.blobs().join(hash.to_string())
    }

    /// Whether the blob is there.
    #[must_use]
    pub fn has(&self, blob: &Blob) -> bool {
        std::fs::metadata(self.path(blob.hash)).is_ok_and(|metadata| metadata.len() == blob.bytes)
    }

    /// Opens a blob that is there, says that it is in use, and marks it as used now.
    ///
    /// # Errors
    /// `Io`.
    pub fn open(&self, blob: &Blob) -> Result<Option<Opened>, CacheError> {
        let path = self.path(blob.hash);
        let failed = |source| CacheError::of(path.clone(), source);
        // Said before it is opened: whoever did not hear of it removes a name, but not the file under a mapping.
        let pin = self.users.pin(blob.hash).map_err(failed)?;
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        if file.metadata().map_err(failed)?.len() != blob.bytes {
            return Ok(None);
        }
        // The time decides what is removed first; not being able to set it costs nothing else.
        let _ = file.set_modified(SystemTime::now());
        Ok(Some(Opened { file, pin }))
    }

    /// Removes a blob whose content turned out to be wrong.
    pub fn remove(&self, hash: BlobHash) {
        // If it cannot be removed it is found wrong again.
        let _ = std::fs::remove_file(self.path(hash));
    }

    /// Begins to fetch a blob, or goes on where an earlier attempt ended, and makes room for it.
    ///
    /// # Errors
    /// `Io`, and `TooSmall`.
    pub fn begin(&self, blob: Blob) -> Result<Begin, CacheError> {
        let path = self.path(blob.hash).with_extension("part");
        let failed = |source| CacheError::of(path.clone(), source);
        loop {
            if self.has(&blob) {
                return Ok(Begin::Present);
            }
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
            let file = file.map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(Begin::Elsewhere),
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
            // Between opening and locking another process may have finished and renamed it, or removed it.
            if !is_at(&file, &path) {
                continue;
            }
            // Held until the promise is made: those who begin at the same time count each other.
            let mut promises = self.promises.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = self.make_room(&blob, &path, &mut promises) {
                // Nothing of it is there yet, or what is there is kept for another time.
                if file.metadata().is_ok_and(|metadata| metadata.len() == 0) {
                    let _ = std::fs::remove_file(&path);
                }
                return Err(error);
            }
            let promise = promises.promise(&blob, &self.promises);
            return Ok(Begin::Ours(PartFile::new(file, path, self.path(blob.hash), blob, promise)));
        }
    }

    fn entries(&self) -> Result<Vec<Entry>, CacheError> {
        let failed = |source| CacheError::of(self.blobs(), source);
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(self.blobs()).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // One that vanishes meanwhile takes no room.
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_file() {
                let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                entries.push(Entry { path: entry.path(), bytes: metadata.len(), used });
            }
        }
        Ok(entries)
    }

    /// Bytes of all that is in the cache.
    ///
    /// # Errors
    /// `Io`.
    pub fn used_bytes(&self) -> Result<u64, CacheError> {
        Ok(self.entries()?.iter().map(|entry| entry.bytes).sum())
    }
}

/// Whether `file` is what the name stands for now.
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let (Ok(opened), Ok(named)) = (file.metadata(), std::fs::metadata(path)) else { return false };
    opened.dev() == named.dev() && opened.ino() == named.ino()
}
