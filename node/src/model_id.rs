//! A folder's model id, computed once and remembered.
//!
//! The id is the hash of all weights, which takes a while for a large folder, so it is kept in the cache folder under
//! a name made of the folder's files, their sizes and times of change.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use hanse_model::Checkpoint;
use hanse_protocol::ModelId;

use crate::output;
use crate::paths;

/// The model id of an open checkpoint; shows a progress bar while it is computed.
pub(crate) fn of(checkpoint: &Checkpoint) -> anyhow::Result<ModelId> {
    // Remembering is a convenience: whatever fails in it, the id is computed.
    let remembered = remembered_at(checkpoint.dir());
    if let Some(id) = remembered.as_deref().and_then(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok()) {
        return Ok(id);
    }
    let bar = output::byte_bar("reading weights");
    let digest = checkpoint.digest(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let id = ModelId(digest.context("cannot compute the model's id")?);
    if let Some(path) = remembered {
        remember(&path, id);
    }
    Ok(id)
}

fn remembered_at(dir: &Path) -> Option<PathBuf> {
    use std::time::UNIX_EPOCH;
    let dir = dir.canonicalize().ok()?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(dir.as_os_str().as_encoded_bytes());
    let mut entries: Vec<_> = std::fs::read_dir(&dir).ok()?.collect::<Result<_, _>>().ok()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let metadata = std::fs::metadata(entry.path()).ok()?;
        let changed = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        hasher.update(entry.file_name().as_encoded_bytes());
        hasher.update(&[0]);
        hasher.update(&metadata.len().to_le_bytes());
        hasher.update(&changed.as_nanos().to_le_bytes());
    }
    Some(paths::cache_dir()?.join("model-ids").join(hasher.finalize().to_hex().as_str()))
}

fn remember(path: &Path, id: ModelId) {
    let Some(folder) = path.parent() else { return };
    if std::fs::create_dir_all(folder).is_err() {
        return;
    }
    // Written under another name and moved, so that nobody reads half an id.
    let Ok(mut file) = tempfile::NamedTempFile::new_in(folder) else { return };
    if std::io::Write::write_all(&mut file, id.to_string().as_bytes()).is_ok() {
        let _ = file.persist(path);
    }
}
