//! Checkpoints with random weights, of any family and size, in the file layout of the model hubs.
//!
//! They say nothing sensible, but they cost what a real model of that shape costs.

mod config;
mod values;
mod writer;

use std::path::{Path, PathBuf};

use hanse_model::ConfigError;
use safetensors::Dtype;
use serde_json::json;

/// What to make.
#[derive(Debug, Clone)]
pub struct Shape {
    /// One of [`hanse_model::known_families`].
    pub family: String,
    /// Length of a row of hidden states.
    pub hidden: usize,
    /// Number of layers, each with experts in families that have any.
    pub layers: usize,
    /// Routed experts of a layer.
    pub experts: usize,
    /// Routed experts that a token uses.
    pub top_k: usize,
    /// Width of one expert.
    pub intermediate: usize,
    /// Width of the shared expert, in families that have one; rounded down to whole experts where these are shared.
    pub shared_intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; they divide `heads`. Latent attention has as many as query heads.
    pub kv_heads: usize,
    /// Values of one head; even, and a multiple of 4 in families that rotate a half of it.
    pub head_dim: usize,
    /// Number of tokens.
    pub vocab: usize,
    /// Longest sequence.
    pub positions: usize,
    /// Whether the LM head is the embedding.
    pub tied: bool,
}

/// How to write it.
#[derive(Debug, Clone)]
pub struct Output {
    /// How the weights are stored: [`Dtype::F32`], [`Dtype::F16`] or [`Dtype::BF16`].
    pub dtype: Dtype,
    /// The same seed and shape give the same weights, however many shards.
    pub seed: u64,
    /// Number of files to cut the weights into; 1 writes `model.safetensors`.
    pub shards: usize,
    /// A folder whose tokenizer files are copied.
    pub tokenizer: Option<PathBuf>,
}

/// Why a checkpoint was not made. What was written until then is left in the folder, without a `config.json`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MakeError {
    /// The shape makes no model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The family is known, but not which keys its `config.json` has.
    #[error("no way to write a config.json for family `{0}` is known here")]
    Family(String),
    /// Weights are not stored in this dtype.
    #[error("weights are stored as f32, f16 or bf16, not {0:?}")]
    Dtype(Dtype),
    /// More files than tensors, or none.
    #[error("{tensors} tensors cannot be cut into {shards} files")]
    Shards {
        /// Files asked for.
        shards: usize,
        /// Tensors of the model.
        tensors: usize,
    },
    /// The folder to write to holds something, which must not be mixed with the new files.
    #[error("{} is not empty", .0.display())]
    NotEmpty(PathBuf),
    /// A file cannot be read or written.
    #[error("cannot read or write {}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The header does not hold together; this is a defect.
    #[error("cannot write a safetensors header: {0}")]
    Header(String),
}

/// Names the file in an error.
fn at(path: &Path) -> impl Fn(std::io::Error) -> MakeError {
    move |source| MakeError::File { path: path.to_owned(), source }
}

/// Writes a checkpoint into `dir`, which must be empty or absent. Memory stays at a few mebibytes whatever the size.
///
/// `progress` is told bytes done and bytes in all.
///
/// # Errors
/// See [`MakeError`].
pub fn make(shape: &Shape, output: &Output, dir: &Path, mut progress: impl FnMut(u64, u64)) -> Result<(), MakeError> {
    let config = format!("{:#}\n", config::config_json(shape, output.dtype)?);
    // The readers' own list: names and shapes are not written down twice.
    let tensors = hanse_model::tensor_shapes(&config)?;
    std::fs::create_dir_all(dir).map_err(at(dir))?;
    if std::fs::read_dir(dir).map_err(at(dir))?.next().is_some() {
        return Err(MakeError::NotEmpty(dir.to_owned()));
    }
    let write = |name: &str, text: String| std::fs::write(dir.join(name), text).map_err(at(&dir.join(name)));
    if let Some(source) = &output.tokenizer {
        copy_tokenizer(source, dir)?;
    }
    write("generation_config.json", format!("{:#}\n", json!({ "do_sample": false })))?;
    writer::write_weights(&tensors, output, dir, &mut progress)?;
    // Last, so that what was cut short is not taken for a model.
    write("config.json", config)
}

fn copy_tokenizer(source: &Path, dir: &Path) -> Result<(), MakeError> {
    const REQUIRED: &str = "tokenizer.json";
    const OPTIONAL: [&str; 3] = ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];
    let copy = |name: &str| std::fs::copy(source.join(name), dir.join(name)).map_err(at(&source.join(name)));
    copy(REQUIRED)?;
    for name in OPTIONAL.into_iter().filter(|name| source.join(name).exists()) {
        copy(name)?;
    }
    Ok(())
}
