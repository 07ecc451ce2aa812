//! Which blobs are in use, by this process and by others that share the cache.
//!
//! Each process has one file in `users/`, locked as long as it lives, with a line for each blob that it uses. So a blob costs
//! no open file, and what a dead process used is free at once.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use hanse_protocol::BlobHash;

/// 64 digits and the end of the line.
const LINE: usize = 65;
/// Bytes of a user's file that are read at most: 1 million blobs.
const MAX_FILE: u64 = (LINE as u64) << 20;

/// This process's file.
#[derive(Debug)]
pub(super) struct Users {
    file: File,
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The line of each blob and how often it is used.
    lines: HashMap<BlobHash, (u64, usize)>,
    free: Vec<u64>,
    next: u64,
}

/// A blob is in use as long as this lives.
#[derive(Debug)]
pub struct Pin {
    users: Arc<Users>,
    hash: BlobHash,
}

impl Users {
    pub(super) fn new(dir: &Path) -> std::io::Result<Arc<Self>> {
        std::fs::create_dir_all(dir)?;
        loop {
            let path = dir.join(format!("{}-{:016x}", std::process::id(), fresh_number()));
            let opened = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
            let file = match opened {
                Ok(file) => file,
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            };
            file.lock()?;
            // Somebody who cleaned up may have taken it for a dead one's before it was locked.
            if path.exists() {
                return Ok(Arc::new(Self { file, path, state: Mutex::default() }));
            }
        }
    }

    pub(super) fn pin(self: &Arc<Self>, hash: BlobHash) -> std::io::Result<Pin> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, count)) = state.lines.get_mut(&hash) {
            *count += 1;
        } else {
            let line = state.free.pop().unwrap_or(state.next);
            match self.file.write_all_at(format!("{hash}\n").as_bytes(), line * LINE as u64) {
                // What is there can be used on a full disk too. At worst others remove the name, but not the file under it.
                Err(error) if !super::is_full(&error) => return Err(error),
                _ => {}
            }
            state.next = state.next.max(line + 1);
            state.lines.insert(hash, (line, 1));
        }
        Ok(Pin { users: self.clone(), hash })
    }

    /// All blobs that living processes use. Files of dead ones are removed.
    pub(super) fn in_use(dir: &Path) -> std::io::Result<HashSet<BlobHash>> {
        let mut hashes = HashSet::new();
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            // One that vanishes meanwhile uses nothing any more.
            let Ok(file) = File::open(&path) else { continue };
            if file.try_lock().is_ok() {
                let _ = std::fs::remove_file(&path);
                continue;
            }
            let mut text = Vec::new();
            file.take(MAX_FILE).read_to_end(&mut text)?;
            for line in text.chunks(LINE) {
                let digits = std::str::from_utf8(line).unwrap_or_default().trim_end();
                hashes.extend(digits.parse::<BlobHash>().ok());
            }
        }
        Ok(hashes)
    }
}

/// Different for each call, also over processes.
fn fresh_number() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::time::SystemTime::now())
}

impl Drop for Users {
    fn drop(&mut self) {
        // What stays is removed by the next who makes room.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut state = self.users.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((line, count)) = state.lines.get_mut(&self.hash) else { return };
        *count -= 1;
        if *count > 0 {
            return;
        }
        let line = *line;
        state.lines.remove(&self.hash);
        state.free.push(line);
        // If it fails the blob only stays in the cache for longer.
        let _ = self.users.file.write_all_at(&[b' '; LINE], line * LINE as u64);
    }
}
