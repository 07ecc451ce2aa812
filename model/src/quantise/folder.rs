//! Writing a model folder again with weights in fewer bits: shard by shard, with a few rows in memory, and going on where it was left.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Value, json};

use super::{QuantiseError, quantise};
use crate::checkpoint::{
    Checkpoint, CheckpointError, LoadError, StoredDtype, StoredTensor, WrittenMatrix, WrittenTensor, quantization,
};
use crate::folder::{NewTensor, shards};
use crate::linear::Matrix;

/// What a folder is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Precision {
    /// The routed experts' matrices.
    pub experts: StoredDtype,
    /// The trunk's matrices save the routers'; `None` leaves the trunk as it is.
    pub trunk: Option<StoredDtype>,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// Matrices of experts.
    pub matrices: usize,
    /// Those of them that are in q8_0 instead of q4_k, since their rows are not multiples of 256 values.
    pub fell_back: usize,
    /// Shards, and those of them that were there.
    pub shards: usize,
    /// Shards that an earlier call had finished.
    pub kept: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// Why a folder cannot be written again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FolderError {
    /// The model cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A tensor cannot be written so.
    #[error("tensor `{tensor}`")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// Why not.
        source: QuantiseError,
    },
    /// The family keeps experts in a form that has no such dtype.
    #[error("the experts of `{family}` are not quantised: it is published in MXFP4, which is read as it is")]
    Family {
        /// The family.
        family: &'static str,
    },
    /// Something else is in the folder.
    #[error("{} holds something else already", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
    },
    /// A file cannot be written or read.
    #[error("cannot write {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
}

impl From<CheckpointError> for FolderError {
    fn from(error: CheckpointError) -> Self {
        Self::Load(error.into())
    }
}

/// Says what an unfinished folder is made of, until it is finished.
const UNFINISHED: &str = "unfinished.json";
/// Rows that are quantised together.
const ROWS: usize = 256;

/// One tensor of a shard.
struct Planned<'a> {
    /// Without what says how it is stored.
    name: String,
    /// In values.
    shape: Vec<usize>,
    content: Content<'a>,
    dtype: StoredDtype,
    file: NewTensor,
}

impl<'a> Planned<'a> {
    fn new(name: String, shape: Vec<usize>, content: Content<'a>, dtype: StoredDtype) -> Result<Self, FolderError> {
        let Some(file) = NewTensor::stored(&name, dtype, shape.clone()) else {
            let values = shape.last().copied().unwrap_or(0);
            let source = QuantiseError::Blocks { values, block: dtype.block().0, dtype };
            return Err(FolderError::Tensor { tensor: name, source });
        };
        Ok(Self { name, shape, content, dtype, file })
    }
}

enum Content<'a> {
    /// As it is.
    Copied,
    /// A matrix of the trunk.
    Trunk,
    /// Matrices of experts, one after another.
    Experts { layer: usize, matrices: &'a [WrittenMatrix] },
}

/// Writes the model's trunk and experts, and a multi-token-prediction head if it has one, to the folder `to`, and a `config.json` that says how, and
/// of which model by its id, `of`; `files` are
/// names of small files that are copied where they are there, such as the tokenizer. `progress` is told bytes written and bytes in all.
///
/// Shards appear whole under their names, and `config.json` last. A call that was interrupted is continued by the same call: shards
/// that are there are kept.
///
/// # Errors
/// [`FolderError`], as its variants say.
pub fn quantise_folder(
    checkpoint: &Checkpoint,
    precision: Precision,
    of: &str,
    files: &[&str],
    to: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, FolderError> {
    let with_head = checkpoint.with_draft_head().ok();
    let checkpoint = with_head.as_ref().map_or(checkpoint, |(with_head, _)| with_head);
    let spec = checkpoint.spec();
    let mut written = Written::default();
    let mut shards = vec![trunk(checkpoint, precision)?];
    let layers: Vec<(usize, Vec<WrittenTensor>)> = spec
        .moe_layers()
        .map(|(layer, _)| Some((layer, checkpoint.written_experts(layer)?)))
        .collect::<Option<_>>()
        .ok_or(FolderError::Family { family: spec.family })?;
    for (layer, tensors) in &layers {
        shards.push(experts(*layer, tensors, precision, &mut written)?);
    }
    let config = config_text(checkpoint, precision, of);
    begin(checkpoint, &config, to)?;
    let bytes = |shard: &Vec<Planned<'_>>| shard.iter().map(|tensor| tensor.file.bytes()).sum::<u64>();
    let total: u64 = shards.iter().map(bytes).sum();
    let mut index = Vec::new();
    written.shards = shards.len();
    for (number, shard) in shards.iter().enumerate() {
        let name = shards::name(number, shards.len());
        let header = shards::header(shard.iter().map(|tensor| &tensor.file));
        let (path, size) = (to.join(&name), bytes(shard));
        index.extend(shard.iter().map(|tensor| (&tensor.file, name.clone())));
        if is_written(&path, &header, size) {
            written.kept += 1;
        } else {
            let before = written.bytes;
            write_shard(checkpoint, shard, &path, &header, &mut |done| progress(before + done, total))?;
        }
        written.bytes += size;
        progress(written.bytes, total);
    }
    for name in files {
        let (from, path) = (checkpoint.dir().join(name), to.join(name));
        if from.exists() {
            std::fs::copy(&from, &path).map_err(|source| FolderError::Io { path, source })?;
        }
    }
    put(&to.join(shards::INDEX), shards::index(index).as_bytes())?;
    put(&to.join("config.json"), config.as_bytes())?;
    let path = to.join(UNFINISHED);
    std::fs::remove_file(&path).map_err(|source| FolderError::Io { path, source })?;
    Ok(written)
}

fn trunk(checkpoint: &Checkpoint, precision: Precision) -> Result<Vec<Planned<'static>>, FolderError> {
    let tensors = checkpoint.trunk_parts();
    let scales_of = |tensor: &StoredTensor| format!("{}_scale_inv", tensor.name);
    let scales: BTreeSet<String> = tensors.iter().map(scales_of).collect();
    // Routers stay as they are, and what is added or multiplied value by value.
    let written_as = |tensor: &StoredTensor| {
        let [outputs, inputs] = tensor.shape[..] else { return None };
        let dtype = fallback(precision.trunk?, inputs);
        let is_matrix = outputs > 1 && !tensor.is_gate && !scales.contains(&tensor.name);
        (is_matrix && inputs.is_multiple_of(dtype.block().0)).then_some(dtype)
    };
    let gone: BTreeSet<String> = tensors.iter().filter(|tensor| written_as(tensor).is_some()).map(scales_of).collect();
    let planned = tensors.iter().filter(|tensor| !gone.contains(&tensor.name)).map(|tensor| {
        let (content, dtype) = match written_as(tensor) {
            Some(dtype) => (Content::Trunk, dtype),
            None => (Content::Copied, tensor.dtype),
        };
        Planned::new(tensor.name.clone(), tensor.shape.clone(), content, dtype)
    });
    planned.collect()
}

fn experts<'a>(
    layer: usize,
    tensors: &'a [WrittenTensor],
    precision: Precision,
    written: &mut Written,
) -> Result<Vec<Planned<'a>>, FolderError> {
    let mut planned = Vec::new();
    for WrittenTensor { name, shape, matrices } in tensors {
        let inputs = shape.last().copied().unwrap_or(0);
        let dtype = fallback(precision.experts, inputs);
        written.matrices += matrices.len();
        if dtype != precision.experts {
            written.fell_back += matrices.len();
        }
        let content = Content::Experts { layer, matrices };
        planned.push(Planned::new(name.clone(), shape.clone(), content, dtype)?);
    }
    Ok(planned)
}

/// As GGML does it: rows that are no whole number of large blocks are in smaller ones.
fn fallback(dtype: StoredDtype, inputs: usize) -> StoredDtype {
    match dtype {
        StoredDtype::Q4K if !inputs.is_multiple_of(dtype.block().0) => StoredDtype::Q8_0,
        other => other,
    }
}

/// What the model is, and how it is stored.
fn config_text(checkpoint: &Checkpoint, precision: Precision, of: &str) -> String {
    let mut config = checkpoint.config_map();
    let name = |dtype: StoredDtype| dtype.name().to_lowercase();
    let quantization = json!({
        "quant_method": quantization::HANSE,
        quantization::ORIGINAL: of,
        "experts": name(precision.experts),
        "trunk": precision.trunk.map_or_else(|| "kept".to_owned(), name),
    });
    config.insert("quantization_config".to_owned(), quantization);
    serde_json::to_string_pretty(&config).unwrap_or_default()
}

/// Makes the folder, or finds that it is what an earlier call has begun.
fn begin(checkpoint: &Checkpoint, config: &str, to: &Path) -> Result<(), FolderError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| FolderError::Io { path, source }
    };
    std::fs::create_dir_all(to).map_err(failed(to))?;
    let files: Vec<Value> = checkpoint
        .files()
        .map(|path| {
            let metadata = std::fs::metadata(path).map_err(failed(path))?;
            let changed = metadata.modified().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
            Ok(json!([path, metadata.len(), changed.map(|time| time.as_nanos().to_string())]))
        })
        .collect::<Result<_, FolderError>>()?;
    let made_of = json!({ "config": config, "files": files }).to_string();
    let path = to.join(UNFINISHED);
    match std::fs::read_to_string(&path) {
        Ok(found) if found == made_of => Ok(()),
        Ok(_) => Err(FolderError::Occupied { path: to.to_owned() }),
        Err(_) if std::fs::read_dir(to).map_err(failed(to))?.next().is_some() => {
            Err(FolderError::Occupied { path: to.to_owned() })
        }
        Err(_) => put(&path, made_of.as_bytes()),
    }
}

/// Writes a file that appears whole.
fn put(path: &Path, content: &[u8]) -> Result<(), FolderError> {
    let failed = |source| FolderError::Io { path: path.to_owned(), source };
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, content).and_then(|()| std::fs::rename(&temporary, path)).map_err(failed)
}

fn is_written(path: &Path, header: &[u8], size: u64) -> bool {
    let Ok(mut file) = File::open(path) else { return false };
    let mut found = vec![0; header.len()];
    let whole = file.metadata().is_ok_and(|metadata| metadata.len() == header.len() as u64 + size);
    whole && file.read_exact(&mut found).is_ok() && found == header
}

fn write_shard(
    checkpoint: &Checkpoint,
    shard: &[Planned<'_>],
    path: &Path,
    header: &[u8],
    progress: &mut dyn FnMut(u64),
) -> Result<(), FolderError> {
    let failed = |source| FolderError::Io { path: path.to_owned(), source };
    let temporary = path.with_extension("new");
    let mut file = BufWriter::new(File::create(&temporary).map_err(failed)?);
    file.write_all(header).map_err(failed)?;
    let mut done = 0;
    let mut write = |bytes: &[u8]| {
        done += bytes.len() as u64;
        file.write_all(bytes).map_err(failed)?;
        progress(done);
        Ok(())
    };
    for tensor in shard {
        match tensor.content {
            Content::Copied => {
                let (map, range) = checkpoint.content(&tensor.name, &tensor.shape)?;
                map[range].chunks(1 << 20).try_for_each(&mut write)?;
            }
            Content::Trunk => {
                let matrix = checkpoint.matrix(&tensor.name, tensor.shape[0], tensor.shape[1])?;
                write_matrix(&matrix, tensor, &mut write)?;
            }
            Content::Experts { layer, matrices } => {
                for which in matrices {
                    let swiglu = checkpoint.expert(layer, which.expert)?;
                    write_matrix(which.of(&swiglu), tensor, &mut write)?;
                }
            }
        }
    }
    let file = file.into_inner().map_err(|error| failed(error.into_error()))?;
    file.sync_all().and_then(|()| std::fs::rename(&temporary, path)).map_err(failed)
}

fn write_matrix(
    matrix: &Matrix,
    tensor: &Planned<'_>,
    write: &mut dyn FnMut(&[u8]) -> Result<(), FolderError>,
) -> Result<(), FolderError> {
    for first in (0..matrix.outputs()).step_by(ROWS) {
        let rows = first..matrix.outputs().min(first + ROWS);
        let quantised: Vec<Vec<u8>> = rows
            .into_par_iter()
            .map(|number| {
                let (mut row, mut bytes) = (vec![0.0; matrix.inputs()], Vec::new());
                matrix.widen_row(number, &mut row);
                quantise(&row, tensor.dtype, &mut bytes)?;
                Ok(bytes)
            })
            .collect::<Result<_, QuantiseError>>()
            .map_err(|source| FolderError::Tensor { tensor: tensor.file.name.clone(), source })?;
        quantised.iter().try_for_each(|bytes| write(bytes))?;
    }
    Ok(())
}
