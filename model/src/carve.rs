//! Carving: a dense model whose feed-forward layers become slices that many can share.
//!
//! A slice has some of the rows of `gate_proj` and `up_proj` and the columns of `down_proj` that belong to them. What a
//! feed-forward layer gives is the sum of what its slices give, so a slice is an expert that is always chosen with weight 1.

use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::families::carved;
use crate::folder::{Filling, NewFolder, NewTensor, WriteError};
use crate::spec::FeedForwardSpec;

/// Why a model could not be carved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CarveError {
    /// The model has experts, or was carved before.
    #[error("the model has experts in layer {layer}: only dense models are carved")]
    HasExperts {
        /// The first layer that has.
        layer: usize,
    },
    /// The layers cannot be divided so.
    #[error("{slices} slices do not divide the {width} rows of a feed-forward layer; {below} and {above} do")]
    Slices {
        /// Slices asked for.
        slices: usize,
        /// `intermediate_size` of the model.
        width: usize,
        /// The next number below that divides it.
        below: usize,
        /// The next number above that divides it.
        above: usize,
    },
    /// Blocks of values are not cut.
    #[error(
        "tensor `{tensor}` is quantised: carve the model first (of a GGUF file the folder of `hanse import --to f16`), and quantise its slices then"
    )]
    Quantised {
        /// The tensor.
        tensor: String,
    },
    /// The dense model's folder is at fault.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The new folder could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Bytes of a tensor of the dense model that make up one of the carved model.
struct Source {
    name: String,
    shape: Vec<usize>,
    /// `[rows, columns]`; `None` for all of it.
    part: Option<[Range<usize>; 2]>,
}

/// Writes `checkpoint`, a dense model, as a model folder `out` whose feed-forward layers are `slices` experts each, all of
/// them always chosen. `from` says in its `config.json` which model it was carved from; `files` are copied if they are there.
/// Weights keep their dtype. `progress` is told bytes written and bytes in all.
///
/// # Errors
/// A model or a number of slices that does not fit, and what goes wrong with folders. Nothing is left of `out` then.
pub fn carve(
    checkpoint: &Checkpoint,
    slices: usize,
    from: &str,
    files: &[&str],
    out: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), CarveError> {
    check(checkpoint, slices)?;
    let folder = NewFolder::create(out)?;
    let (tensors, sources) = plan(checkpoint, slices)?;
    let total = sources.iter().map(|source| bytes(checkpoint, source)).sum::<Result<u64, _>>()?;
    let mut done = 0;
    folder.tensors(&tensors, |number, file| {
        let source = &sources[number];
        let (map, range) =
            checkpoint.content(&source.name, &source.shape).map_err(|error| Filling::Other(error.into()))?;
        let content = &map[range];
        match &source.part {
            None => file.write_all(content)?,
            Some([rows, columns]) => {
                let row_bytes = content.len() / source.shape[0];
                let value_bytes = row_bytes / source.shape[1];
                for row in content.chunks_exact(row_bytes).take(rows.end).skip(rows.start) {
                    file.write_all(&row[columns.start * value_bytes..columns.end * value_bytes])?;
                }
            }
        }
        done += bytes(checkpoint, source).map_err(|error| Filling::Other(error.into()))?;
        progress(done, total);
        Ok::<_, Filling<CarveError>>(())
    })?;
    folder.file("config.json", config(checkpoint, slices, from)?.as_bytes())?;
    for name in files {
        folder.copy(checkpoint.dir(), name)?;
    }
    // What was written must be what a node or a client can open.
    Checkpoint::open(folder.path())?;
    Ok(folder.finish()?)
}

fn check(checkpoint: &Checkpoint, slices: usize) -> Result<(), CarveError> {
    for (layer, spec) in checkpoint.spec().layers.iter().enumerate() {
        let FeedForwardSpec::Dense { intermediate_size: width } = spec.feed_forward else {
            return Err(CarveError::HasExperts { layer });
        };
        let divides = |slices: &usize| *slices > 0 && width.is_multiple_of(*slices);
        if !divides(&slices) {
            let below = (1..slices.min(width + 1)).rev().find(divides).unwrap_or(1);
            let above = (slices.saturating_add(1)..=width).find(divides).unwrap_or(width);
            return Err(CarveError::Slices { slices, width, below, above });
        }
    }
    Ok(())
}

/// The tensors of the carved model and where they come from.
fn plan(checkpoint: &Checkpoint, slices: usize) -> Result<(Vec<NewTensor>, Vec<Source>), CarveError> {
    let (mut tensors, mut sources) = (Vec::new(), Vec::new());
    for (name, shape) in checkpoint.tensor_shapes() {
        let stored = checkpoint.dtype(&name, &shape)?;
        let quantised = || CarveError::Quantised { tensor: name.clone() };
        let Some((layer, matrix)) = feed_forward(&name) else {
            let as_it_is = || NewTensor::stored(&name, stored, shape.clone());
            // Scales that lie elsewhere are no tensors of this list.
            let is_alone = stored.plain().is_some() || stored.suffix().is_some();
            tensors.push(is_alone.then(as_it_is).flatten().ok_or_else(quantised)?);
            sources.push(Source { name, shape, part: None });
            continue;
        };
        for slice in 0..slices {
            // Rows of gate_proj and up_proj, columns of down_proj.
            let cut = usize::from(matrix == "down_proj");
            let size = shape[cut] / slices;
            let mut part = [0..shape[0], 0..shape[1]];
            part[cut] = slice * size..(slice + 1) * size;
            let name_of_slice = format!("model.layers.{layer}.mlp.experts.{slice}.{matrix}.weight");
            let (dtype, shape_of_slice) =
                (stored.plain().ok_or_else(quantised)?, part.iter().map(Range::len).collect());
            tensors.push(NewTensor { name: name_of_slice, dtype, shape: shape_of_slice });
            sources.push(Source { name: name.clone(), shape: shape.clone(), part: Some(part) });
        }
    }
    Ok((tensors, sources))
}

/// Layer and matrix of a feed-forward layer's tensor.
fn feed_forward(name: &str) -> Option<(&str, &str)> {
    let (layer, matrix) = name.strip_prefix("model.layers.")?.split_once(".mlp.")?;
    Some((layer, matrix.strip_suffix(".weight")?))
}

fn bytes(checkpoint: &Checkpoint, source: &Source) -> Result<u64, CheckpointError> {
    let dtype = checkpoint.dtype(&source.name, &source.shape)?;
    let values: usize = match &source.part {
        None => source.shape.iter().product(),
        Some(part) => part.iter().map(Range::len).product(),
    };
    // Whole blocks: what is quantised was refused.
    Ok(dtype.bytes(values).unwrap_or(0) as u64)
}

/// The dense model's `config.json`, and how it was carved.
fn config(checkpoint: &Checkpoint, slices: usize, from: &str) -> Result<String, CheckpointError> {
    let mut config = crate::checkpoint::config::parse(checkpoint.config_text())?;
    config.insert(carved::KEY.to_owned(), json!({ "slices": slices, "from": from }));
    Ok(format!("{:#}\n", Value::Object(config)))
}
