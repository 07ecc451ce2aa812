//! Writing a model folder: safetensors files of bounded size, tensor after tensor, under another name until all is there. One that is to go on
//! where it was left is written by [`quantise`](crate::quantise), with the same [`shards`].

pub(crate) mod shards;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

pub(crate) use shards::NewTensor;

/// Bytes of a safetensors file, unless a single tensor has more.
const MAX_SHARD_BYTES: u64 = 4 << 30;
/// Bytes that are collected before they are written.
const BUFFER: usize = 1 << 20;

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
        let shards = shards::cut(tensors, MAX_SHARD_BYTES);
        let mut index = Vec::with_capacity(tensors.len());
        for (number, shard) in shards.iter().enumerate() {
            let name = shards::name(number, shards.len());
            let path = self.temporary.join(&name);
            let mut file = BufWriter::with_capacity(BUFFER, File::create(&path).map_err(failed(&path))?);
            file.write_all(&shards::header(shard.iter().map(|&number| &tensors[number]))).map_err(failed(&path))?;
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
                index.push((tensor, name.clone()));
            }
            let file = file.into_inner().map_err(io::IntoInnerError::into_error).map_err(failed(&path))?;
            file.sync_all().map_err(failed(&path))?;
        }
        if shards.len() > 1 {
            self.file(shards::INDEX, shards::index(index).as_bytes())?;
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

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;

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
