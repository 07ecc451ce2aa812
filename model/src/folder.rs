//! Writing a model folder: safetensors files of bounded size, tensor after tensor, under another name until all is there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::json;

use crate::checkpoint::StoredDtype;

/// Bytes of a safetensors file, unless a single tensor has more.
const MAX_SHARD_BYTES: u64 = 4 << 30;
/// Bytes that are collected before they are written.
const BUFFER: usize = 1 << 20;

/// A tensor to be written.
#[derive(Debug, Clone)]
pub(crate) struct NewTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl NewTensor {
    /// A tensor of the model that is stored so; `None` if it cannot be, as rows are no whole blocks or have scales elsewhere.
    pub(crate) fn stored(name: String, stored: StoredDtype, mut shape: Vec<usize>) -> Option<Self> {
        if let Some(dtype) = stored.plain() {
            return Some(Self { name, dtype, shape });
        }
        let columns = shape.last_mut()?;
        *columns = stored.bytes(*columns)?;
        Some(Self { name: name + stored.suffix()?, dtype: Dtype::U8, shape })
    }

    fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.bitsize() as u64 / 8
    }
}

/// Why a model folder could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// Something is there already. It is left alone.
    #[error("{} exists: give another folder, or remove it", path.display())]
    Exists {
        /// What is there.
        path: PathBuf,
    },
    /// The system refused, or the disk is full.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A tensor had another number of bytes than was said.
    #[error("tensor `{tensor}` has {found} bytes instead of {expected}")]
    Bytes {
        /// The tensor.
        tensor: String,
        /// What dtype and shape call for.
        expected: u64,
        /// What was written.
        found: u64,
    },
}

/// A folder that is being written. Dropped before [`NewFolder::finish`], it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct NewFolder {
    out: PathBuf,
    /// Where the files are until all is there.
    temporary: PathBuf,
}

impl NewFolder {
    /// # Errors
    /// `Exists`, or what the system says.
    pub(crate) fn create(out: &Path) -> Result<Self, WriteError> {
        if out.symlink_metadata().is_ok() {
            return Err(WriteError::Exists { path: out.to_owned() });
        }
        let mut name = std::ffi::OsString::from(".");
        name.push(out.file_name().ok_or_else(|| WriteError::Exists { path: out.to_owned() })?);
        name.push(format!(".{}.new", std::process::id()));
        let temporary = out.with_file_name(name);
        fs::create_dir(&temporary).map_err(failed(&temporary))?;
        Ok(Self { out: out.to_owned(), temporary })
    }

    /// Where it is until it is finished.
    pub(crate) fn path(&self) -> &Path {
        &self.temporary
    }

    /// Writes a small file.
    pub(crate) fn file(&self, name: &str, content: &[u8]) -> Result<(), WriteError> {
        let path = self.temporary.join(name);
        let write = || {
            let mut file = File::create(&path)?;
            file.write_all(content)?;
            file.sync_all()
        };
        write().map_err(failed(&path))
    }

    /// Copies a file, if it is there.
    pub(crate) fn copy(&self, from: &Path, name: &str) -> Result<(), WriteError> {
        let source = from.join(name);
        if source.is_file() {
            // Not its permissions: a source that nobody may write would give a folder that nobody can remove.
            let mut to = File::create(self.temporary.join(name)).map_err(failed(&source))?;
            File::open(&source).and_then(|mut from| io::copy(&mut from, &mut to)).map_err(failed(&source))?;
            to.sync_all().map_err(failed(&source))?;
        }
        Ok(())
    }

    /// Writes tensors; `fill` writes the bytes of the one whose number in `tensors` it is told.
    pub(crate) fn tensors<E: From<WriteError>>(
        &self,
        tensors: &[NewTensor],
        mut fill: impl FnMut(usize, &mut dyn Write) -> Result<(), Filling<E>>,
    ) -> Result<(), E> {
        let shards = shards(tensors, MAX_SHARD_BYTES);
        let mut index = BTreeMap::new();
        for (number, shard) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => "model.safetensors".to_owned(),
                all => format!("model-{:05}-of-{all:05}.safetensors", number + 1),
            };
            let path = self.temporary.join(&name);
            let mut file = BufWriter::with_capacity(BUFFER, File::create(&path).map_err(failed(&path))?);
            file.write_all(&header(tensors, shard)).map_err(failed(&path))?;
            for &number in shard {
                let tensor = &tensors[number];
                let mut counted = Counted { file: &mut file, bytes: 0 };
                fill(number, &mut counted).map_err(|error| match error {
                    Filling::Write(source) => WriteError::Write { path: path.clone(), source }.into(),
                    Filling::Other(error) => error,
                })?;
                let (expected, found) = (tensor.bytes(), counted.bytes);
                if found != expected {
                    return Err(WriteError::Bytes { tensor: tensor.name.clone(), expected, found }.into());
                }
                index.insert(tensor.name.as_str(), name.clone());
            }
            let file = file.into_inner().map_err(io::IntoInnerError::into_error).map_err(failed(&path))?;
            file.sync_all().map_err(failed(&path))?;
        }
        if shards.len() > 1 {
            let bytes: u64 = tensors.iter().map(NewTensor::bytes).sum();
            let text = json!({ "metadata": { "total_size": bytes }, "weight_map": index });
            self.file("model.safetensors.index.json", format!("{text:#}\n").as_bytes())?;
        }
        Ok(())
    }

    /// Gives the folder its name.
    pub(crate) fn finish(self) -> Result<(), WriteError> {
        let sync = |path: &Path| File::open(path)?.sync_all();
        sync(&self.temporary).map_err(failed(&self.temporary))?;
        // A rename would replace an empty folder.
        if self.out.symlink_metadata().is_ok() {
            return Err(WriteError::Exists { path: self.out.clone() });
        }
        fs::rename(&self.temporary, &self.out).map_err(failed(&self.out))?;
        let parent = self.out.parent().filter(|parent| !parent.as_os_str().is_empty());
        sync(parent.unwrap_or(Path::new("."))).map_err(failed(&self.out))
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        // Gone if it was finished. If it cannot be removed, its name says what it is.
        let _ = fs::remove_dir_all(&self.temporary);
    }
}

/// Why a tensor's bytes were not written.
#[derive(Debug)]
pub(crate) enum Filling<E> {
    /// The file takes no more.
    Write(io::Error),
    /// They cannot be had.
    Other(E),
}

impl<E> From<io::Error> for Filling<E> {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}

struct Counted<'a> {
    file: &'a mut BufWriter<File>,
    bytes: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> WriteError + use<> {
    let path = path.to_owned();
    move |source| WriteError::Write { path, source }
}

/// Which tensors each file holds. In a file those with the largest values are first, so that all are aligned.
fn shards(tensors: &[NewTensor], most: u64) -> Vec<Vec<usize>> {
    let (mut shards, mut bytes) = (vec![Vec::new()], 0);
    for (number, tensor) in tensors.iter().enumerate() {
        if bytes > 0 && bytes + tensor.bytes() > most {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += tensor.bytes();
        if let Some(last) = shards.last_mut() {
            last.push(number);
        }
    }
    for shard in &mut shards {
        shard.sort_by_key(|number| std::cmp::Reverse(tensors[*number].dtype.bitsize()));
    }
    shards
}

/// Length and text of a file's header.
fn header(tensors: &[NewTensor], shard: &[usize]) -> Vec<u8> {
    let mut entries = serde_json::Map::new();
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut start = 0;
    for &number in shard {
        let NewTensor { name, dtype, shape } = &tensors[number];
        let end = start + tensors[number].bytes();
        entries.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] }));
        start = end;
    }
    let mut text = serde_json::Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_end_where_the_limit_is_and_larger_values_are_first() {
        let tensor = |name: &str, dtype, len| NewTensor { name: name.to_owned(), dtype, shape: vec![len] };
        let tensors = [
            tensor("a", Dtype::F16, 3),
            tensor("b", Dtype::F32, 2),
            tensor("c", Dtype::F32, 9),
            tensor("d", Dtype::F16, 1),
        ];
        assert_eq!(shards(&tensors, 14), [vec![1, 0], vec![2], vec![3]]);
        let parsed: serde_json::Value = serde_json::from_slice(&header(&tensors, &[1, 0])[8..]).unwrap();
        assert_eq!(parsed["a"], json!({ "dtype": "F16", "shape": [3], "data_offsets": [8, 14] }));
    }

    #[test]
    fn a_folder_that_is_not_finished_leaves_nothing_and_one_that_is_there_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model");
        let folder = NewFolder::create(&out).unwrap();
        folder.file("config.json", b"{}").unwrap();
        drop(folder);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let folder = NewFolder::create(&out).unwrap();
        fs::create_dir(&out).unwrap();
        assert!(matches!(folder.finish(), Err(WriteError::Exists { .. })));
        assert!(matches!(NewFolder::create(&out), Err(WriteError::Exists { .. })));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_tensor_with_too_few_bytes_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = NewFolder::create(&dir.path().join("model")).unwrap();
        let tensor = NewTensor { name: "a".to_owned(), dtype: Dtype::F32, shape: vec![2] };
        let error = folder.tensors::<WriteError>(&[tensor], |_, out| Ok(out.write_all(&[0; 7])?)).unwrap_err();
        assert_eq!(error.to_string(), "tensor `a` has 7 bytes instead of 8");
    }
}
