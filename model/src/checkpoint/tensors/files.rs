//! Which files a folder's tensors are in, and where in them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::tensor::Metadata;
use serde::Deserialize;

use super::header::{PREFIX, malformed, read_header};
use super::{Tensor, TensorFile, TensorFiles};
use crate::checkpoint::dtype::StoredDtype;
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::mapping::Mapping;
use crate::checkpoint::{open_file, read_text};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 256 << 20;

impl TensorFiles {
    /// What the headers of safetensors files say; the tensors themselves cannot be read. `headers` are file names and
    /// the first bytes of each, up to the end of the header.
    pub(in crate::checkpoint) fn of_headers(headers: Vec<(String, Vec<u8>)>) -> Result<Self, CheckpointError> {
        let mut this = Self::none();
        for (name, bytes) in headers {
            let path = PathBuf::from(name);
            let text = bytes.get(PREFIX..).unwrap_or_default();
            let metadata: Metadata =
                serde_json::from_slice(text).map_err(|error| malformed(&path, text, error.to_string()))?;
            this.insert(path, bytes.len(), &metadata, None)?;
        }
        Ok(this)
    }

    pub(in crate::checkpoint) fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let mut this = Self::none();
        if dir.join(SINGLE).exists() {
            this.add(dir.join(SINGLE))?;
            return Ok(this);
        }
        let index_path = dir.join(INDEX);
        if !index_path.exists() {
            return Err(CheckpointError::NoWeights { dir: dir.to_owned() });
        }
        let malformed = |reason: String| CheckpointError::Index { path: index_path.clone(), reason };
        let text = read_text(&index_path, MAX_INDEX_BYTES)?;
        let index: Index = serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
        let mut shards: BTreeMap<&str, &str> = BTreeMap::new();
        for (tensor, file) in &index.weight_map {
            // A name with a directory in it could make us map a file outside the folder.
            if file.is_empty() || file.contains(['/', '\\', '\0']) || file == "." || file == ".." {
                return Err(malformed(format!("`{tensor}` is said to be in {file:?}, which is not a plain file name")));
            }
            shards.entry(file).or_insert(tensor);
        }
        if shards.is_empty() {
            return Err(malformed("its `weight_map` is empty".into()));
        }
        for (file, tensor) in shards {
            let path = dir.join(file);
            if !path.exists() {
                return Err(CheckpointError::MissingFile { path, tensor: tensor.to_owned() });
            }
            this.add(path)?;
        }
        for (tensor, file) in &index.weight_map {
            let path = dir.join(file);
            let found = this.tensors.get(tensor).or_else(|| this.tensors.get(StoredDtype::without_suffix(tensor)));
            if found.is_none_or(|found| this.files[found.file].path != path) {
                return Err(CheckpointError::NotInShard { path, tensor: tensor.clone() });
            }
        }
        Ok(this)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let map = Arc::new(map(&path)?);
        let (data_start, metadata) = read_header(&path, &map)?;
        self.insert(path, data_start, &metadata, Some(map))
    }

    fn insert(
        &mut self,
        path: PathBuf,
        data_start: usize,
        metadata: &Metadata,
        map: Option<Arc<Mapping>>,
    ) -> Result<(), CheckpointError> {
        let file = self.files.len();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let too_far = || CheckpointError::Overlapping { path: path.clone(), tensor: name.clone() };
            // Only a header whose file was not looked at can overflow.
            let range = data_start + start..data_start.checked_add(end).ok_or_else(too_far)?;
            let (name, dtype, shape) = StoredDtype::of_tensor(&name, info.dtype, &info.shape)?;
            let tensor = Tensor { file, dtype, written: info.dtype, shape, range };
            match self.tensors.entry(name.to_owned()) {
                Entry::Vacant(slot) => slot.insert(tensor),
                Entry::Occupied(slot) => {
                    // Of this file, if it has it under two names.
                    let first = self.files.get(slot.get().file).map_or_else(|| path.clone(), |file| file.path.clone());
                    return Err(CheckpointError::Duplicate { tensor: slot.key().clone(), first, second: path });
                }
            };
        }
        self.files.push(TensorFile { path, map });
        Ok(())
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn map(path: &Path) -> Result<Mapping, CheckpointError> {
    let failed = |source| CheckpointError::Read { path: path.to_owned(), source };
    let file = open_file(path)?;
    let len = file.metadata().map_err(failed)?.len();
    if len < PREFIX as u64 {
        return Err(CheckpointError::Truncated { path: path.to_owned(), expected: PREFIX as u64, found: len });
    }
    Mapping::of(&file).map_err(failed)
}
