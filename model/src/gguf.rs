//! GGUF files, as llama.cpp and its relatives have them, made model folders once.
//!
//! The folder has the tensors under the names of the model hubs, in the dtypes that are computed with: blocks are widened.
//! Whatever in the file changes the model and is not understood is refused by name.

mod architectures;
mod blocks;
mod error;
mod file;
mod metadata;
mod names;
mod tokenizer;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::Value;

pub use error::GgufError;

use crate::checkpoint::{Checkpoint, StoredDtype, tensor_shapes};
use crate::folder::{Filling, NewFolder, NewTensor};
use crate::tokenizer::Tokenizer;
use architectures::Architecture;
use blocks::Storage;
use file::{Entry, Files, Gguf};
use names::Place;

/// Values that are widened at a time.
const STEP: usize = 1 << 20;

/// What was in a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// `general.architecture`.
    pub architecture: String,
    /// `general.name`.
    pub name: Option<String>,
    /// Tensors in the file.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// How many of them are stored in each type.
    pub types: BTreeMap<&'static str, usize>,
    /// The kind of tokenizer and, where there is one, of pre-tokenizer.
    pub tokenizer: String,
    /// It has a chat template.
    pub chat_template: bool,
}

/// Where the values of a tensor of the new folder are in the file.
struct Source<'g> {
    name: String,
    entry: &'g Entry<'g>,
    /// Rows of the tensor in the file, `[first, number]`.
    rows: [usize; 2],
    /// Values of a row.
    columns: usize,
    /// Rows of a head that lie beside those that they rotate against.
    neighbours: Option<usize>,
    /// Its blocks are written as they are.
    kept: Option<StoredDtype>,
}

/// Makes a model folder `out` of a GGUF file, or of several of which `path` is the first. Tensors that the file holds quantised are
/// written as `to`; if that is `None`, matrices in Q8_0 and Q4_K stay as they are, which are computed so, and others become f16. Tensors in f32,
/// f16 and bf16 stay as they are. `progress` is told bytes of the file done and bytes in all.
///
/// The file is mapped: it must not be truncated meanwhile. Memory is bounded by what the metadata need.
///
/// # Errors
/// What is wrong with the file or not supported, by name; what goes wrong with the folder. Nothing is left of `out` then.
pub fn import_gguf(
    path: &Path,
    to: Option<StoredDtype>,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Imported, GgufError> {
    let to = to.map(|to| to.plain().ok_or(GgufError::Precision(to))).transpose()?;
    let files = Files::open(path)?;
    let gguf = files.parse()?;
    let (architecture, mut config) = architectures::read(&gguf)?;
    let vocabulary = tokenizer::read(&gguf.metadata)?;
    let rows = config.get("vocab_size").and_then(Value::as_u64).unwrap_or(0);
    if vocabulary.len() as u64 > rows {
        let reason = format!("there are {} tokens and {rows} embeddings", vocabulary.len());
        return Err(GgufError::Tensor { tensor: "token_embd.weight".to_owned(), reason });
    }
    vocabulary.tokens_of_config(&mut config);
    let config_text = format!("{:#}\n", Value::Object(config));
    let (tensors, sources) = plan(&gguf, architecture, &config_text, to)?;
    let folder = NewFolder::create(out)?;
    let mut done = 0;
    folder.tensors(&tensors, |number, file| {
        let source = &sources[number];
        write(source, tensors[number].dtype, file)?;
        done += (source.rows[1] * row_bytes(source)) as u64;
        progress(done, gguf.bytes);
        Ok::<_, Filling<GgufError>>(())
    })?;
    folder.file("config.json", config_text.as_bytes())?;
    for (name, text) in vocabulary.files() {
        folder.file(name, text.as_bytes())?;
    }
    // What was written must be what a node or a client can open.
    Checkpoint::open(folder.path())?;
    Tokenizer::load(folder.path())?.chat_template()?;
    folder.finish()?;
    let mut types = BTreeMap::new();
    for entry in gguf.tensors.values() {
        *types.entry(entry.kind.name).or_default() += 1;
    }
    Ok(Imported {
        architecture: architecture.name.to_owned(),
        name: gguf.metadata.text("general.name")?.map(|name| name.chars().take(200).collect()),
        tensors: gguf.tensors.len(),
        bytes: gguf.bytes,
        types,
        tokenizer: vocabulary.kind(),
        chat_template: vocabulary.has_chat_template(),
    })
}

/// The tensors that the model needs, and where they are. All tensors of the file must have a place.
fn plan<'g>(
    gguf: &'g Gguf<'_>,
    architecture: &Architecture,
    config_text: &str,
    to: Option<Dtype>,
) -> Result<(Vec<NewTensor>, Vec<Source<'g>>), GgufError> {
    let (mut tensors, mut sources, mut used) = (Vec::new(), Vec::new(), BTreeSet::new());
    let head_dim = serde_json::from_str::<Value>(config_text).ok().and_then(|config| config["head_dim"].as_u64());
    for (name, shape) in tensor_shapes(config_text)? {
        let missing = |tensor: &str| GgufError::MissingTensor { tensor: tensor.to_owned() };
        let (tensor, part) = match names::place(&name).ok_or_else(|| missing(&name))? {
            Place::Whole(tensor) => (tensor, None),
            Place::Expert { alone, .. } if gguf.tensors.contains_key(alone.as_str()) => (alone, None),
            Place::Expert { together, expert, .. } => (together, Some(expert)),
        };
        let (stored, entry) = gguf.tensors.get_key_value(tensor.as_str()).ok_or_else(|| missing(&tensor))?;
        let (columns, rows) = shape.split_last().map_or((1, 1), |(columns, rows)| (*columns, rows.iter().product()));
        let first = part.map_or(0, |expert| expert * rows);
        check_shape(stored, entry, &shape, part)?;
        used.insert(*stored);
        let neighbours = head_dim.filter(|_| architecture.neighbours && names::is_rotated(&name));
        let source = match neighbours {
            // A bias is a row for each value.
            Some(head_dim) if shape.len() == 1 => Source {
                name: name.clone(),
                entry,
                rows: [0, columns],
                columns: 1,
                neighbours: Some(head_dim as usize),
                kept: None,
            },
            _ => Source {
                name: name.clone(),
                entry,
                rows: [first, rows],
                columns,
                neighbours: neighbours.map(|head_dim| head_dim as usize),
                kept: entry.kind.kept().filter(|_| to.is_none() && shape.len() == 2),
            },
        };
        if !source.columns.is_multiple_of(entry.kind.values) {
            let reason = format!("values stored as {} cannot be put in another order", entry.kind.name);
            return Err(GgufError::Tensor { tensor, reason });
        }
        let kept = source.kept.and_then(|kept| NewTensor::stored(name.clone(), kept, shape.clone()));
        let dtype = dtype(&entry.kind.storage, to.unwrap_or(Dtype::F16));
        tensors.push(kept.unwrap_or(NewTensor { name, dtype, shape }));
        sources.push(source);
    }
    match gguf.tensors.keys().find(|name| !used.contains(*name) && !names::is_derived(name)) {
        Some(name) => Err(GgufError::UnknownTensor { tensor: (*name).to_owned() }),
        None => Ok((tensors, sources)),
    }
}

/// Whether a tensor of the file holds what has `shape`, or as many such as there are experts; dimensions of 1 do not count.
fn check_shape(tensor: &str, entry: &Entry<'_>, shape: &[usize], part: Option<usize>) -> Result<(), GgufError> {
    let sizes = |shape: &[usize]| shape.iter().copied().filter(|size| *size > 1).collect::<Vec<_>>();
    let found = match part {
        None => sizes(&entry.shape),
        // The number of experts comes first, and may be one.
        Some(expert) if entry.shape.len() == shape.len() + 1 && expert < entry.shape[0] => sizes(&entry.shape[1..]),
        Some(_) => Vec::new(),
    };
    if found == sizes(shape) {
        return Ok(());
    }
    let (found, which) = (&entry.shape, if part.is_some() { " for each expert" } else { "" });
    let reason = format!("it has shape {found:?}, expected {shape:?}{which}");
    Err(GgufError::Tensor { tensor: tensor.to_owned(), reason })
}

fn dtype(storage: &Storage, to: Dtype) -> Dtype {
    match storage {
        Storage::F32 => Dtype::F32,
        Storage::F16 => Dtype::F16,
        Storage::Bf16 => Dtype::BF16,
        Storage::Blocks(_) | Storage::Mxfp4 => to,
    }
}

fn row_bytes(source: &Source<'_>) -> usize {
    source.columns / source.entry.kind.values * source.entry.kind.bytes
}

/// Writes a tensor's values, some rows at a time.
fn write(source: &Source<'_>, dtype: Dtype, out: &mut dyn Write) -> Result<(), Filling<GgufError>> {
    let (bytes, [first, rows]) = (row_bytes(source), source.rows);
    let step = (STEP / source.columns).max(1);
    let (mut gathered, mut written) = (Vec::with_capacity(step.min(rows) * bytes), Vec::new());
    for start in (0..rows).step_by(step) {
        gathered.clear();
        for row in start..(start + step).min(rows) {
            let row = first + source.neighbours.map_or(row, |head_dim| beside(row, head_dim));
            gathered.extend_from_slice(&source.entry.data[row * bytes..(row + 1) * bytes]);
        }
        if let Some(kept) = source.kept {
            if let Some((_, value)) = kept.not_finite(&gathered) {
                return Err(Filling::Other(not_finite(source, value)));
            }
            out.write_all(&gathered)?;
            continue;
        }
        let values = source.entry.kind.widen(&gathered).map_err(Filling::Other)?;
        written.clear();
        for value in &values {
            let finite = match dtype {
                Dtype::F32 => put(&mut written, *value, value.to_le_bytes()),
                Dtype::F16 => put(&mut written, f16::from_f32(*value).to_f32(), f16::from_f32(*value).to_le_bytes()),
                _ => put(&mut written, bf16::from_f32(*value).to_f32(), bf16::from_f32(*value).to_le_bytes()),
            };
            if !finite {
                return Err(Filling::Other(not_finite(source, *value)));
            }
        }
        out.write_all(&written)?;
    }
    Ok(())
}

/// Appends a value's bytes and says whether it is finite.
fn put<const N: usize>(out: &mut Vec<u8>, rounded: f32, bytes: [u8; N]) -> bool {
    out.extend_from_slice(&bytes);
    rounded.is_finite()
}

fn not_finite(source: &Source<'_>, value: f32) -> GgufError {
    let reason = if value.is_finite() {
        format!("it holds {value}, which the chosen dtype cannot: f32 can")
    } else {
        format!("it holds {value}: the file is damaged")
    };
    GgufError::Tensor { tensor: source.name.clone(), reason }
}

/// Where a row of queries or keys lies in files in which rows that rotate against each other are neighbours: in a model folder a
/// head's first half rotates against its second.
fn beside(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + within % half * 2 + within / half
}

#[cfg(test)]
mod tests;
