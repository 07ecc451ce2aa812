//! The hash that names a model: the same for the same `config.json` and tensors, however they are cut into files.

use std::io::{Read, Seek, SeekFrom};

use super::error::CheckpointError;
use super::{Checkpoint, open_file, tensors::Tensor};

const CHUNK_BYTES: usize = 1 << 20;

impl Checkpoint {
    /// BLAKE3 over `config.json` and the name, dtype, shape and content hash of every tensor in the files, in the
    /// order of names.
    ///
    /// The files are read, not touched through the mapping, so that resident memory does not grow. `progress` is told
    /// bytes done and bytes in all, at least once for each mebibyte.
    ///
    /// # Errors
    /// `Read` if a file cannot be read to its end.
    pub fn digest(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<[u8; 32], CheckpointError> {
        let files = &self.inner.tensors;
        let total: u64 = files.tensors.values().map(|tensor| tensor.bytes() as u64).sum();
        let mut done = 0;
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut hasher = blake3::Hasher::new_derive_key("hanse/model/1");
        add_field(&mut hasher, self.inner.config_text.as_bytes());
        let mut hashes = vec![None; files.tensors.len()];
        for (number, file) in files.files.iter().enumerate() {
            let failed = |source| CheckpointError::Read { path: file.path.clone(), source };
            let mut reader = open_file(&file.path)?;
            let mut here: Vec<(usize, &Tensor)> =
                files.tensors.values().enumerate().filter(|(_, tensor)| tensor.file == number).collect();
            // In the order of the file, so that the disk reads straight on.
            here.sort_by_key(|(_, tensor)| tensor.range.start);
            for (index, tensor) in here {
                reader.seek(SeekFrom::Start(tensor.range.start as u64)).map_err(failed)?;
                let mut content = blake3::Hasher::new();
                let mut left = tensor.bytes();
                while left > 0 {
                    let part = &mut chunk[..left.min(CHUNK_BYTES)];
                    reader.read_exact(part).map_err(failed)?;
                    content.update(part);
                    left -= part.len();
                    done += part.len() as u64;
                    progress(done, total);
                }
                hashes[index] = Some(content.finalize());
            }
        }
        for ((name, tensor), hash) in files.tensors.iter().zip(hashes) {
            add_field(&mut hasher, name.as_bytes());
            add_field(&mut hasher, format!("{:?}", tensor.dtype).as_bytes());
            hasher.update(&(tensor.shape.len() as u64).to_le_bytes());
            for size in &tensor.shape {
                hasher.update(&(*size as u64).to_le_bytes());
            }
            let hash = hash.unwrap_or(blake3::Hash::from_bytes([0; 32]));
            hasher.update(hash.as_bytes());
        }
        Ok(*hasher.finalize().as_bytes())
    }
}

/// The length goes first, so that no two lists of fields give the same bytes.
fn add_field(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}
