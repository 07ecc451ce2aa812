//! What can be wrong with a model folder.

use std::path::PathBuf;

use super::config::ConfigError;

/// Why a checkpoint could not be opened or read. The folder is at fault; a retry does not help.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// `config.json` is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// What should be a file is something else. It is not opened: opening a pipe could wait for ever.
    #[error("{} is {found}, not a regular file", path.display())]
    NotAFile {
        /// What is there.
        path: PathBuf,
        /// Which kind of thing it is.
        found: &'static str,
    },
    /// A file is larger than it may be.
    #[error("{} is larger than {limit} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
    /// A text file is not UTF-8.
    #[error("{} is not UTF-8 text", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
    },
    /// The folder has neither `model.safetensors` nor an index.
    #[error("{} has neither model.safetensors nor model.safetensors.index.json", dir.display())]
    NoWeights {
        /// The folder.
        dir: PathBuf,
    },
    /// `model.safetensors.index.json` is malformed.
    #[error("{}: {reason}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A shard that the index names does not exist.
    #[error("{} is missing: the index says that it holds `{tensor}`", path.display())]
    MissingFile {
        /// The absent file.
        path: PathBuf,
        /// A tensor that should be in it.
        tensor: String,
    },
    /// The index says that a shard holds a tensor, but it does not.
    #[error("{} does not hold `{tensor}`, although the index says so", path.display())]
    NotInShard {
        /// The shard.
        path: PathBuf,
        /// The absent tensor.
        tensor: String,
    },
    /// A safetensors file is shorter than its header says.
    #[error("{} is truncated: it should have {expected} bytes and has {found}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that its header calls for.
        expected: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// A safetensors file is longer than its header says.
    #[error("{} has {extra} bytes that belong to no tensor", path.display())]
    TrailingBytes {
        /// The file.
        path: PathBuf,
        /// Bytes after the last tensor.
        extra: u64,
    },
    /// Tensors overlap, leave a hole, or lie backwards in the file.
    #[error("{}: the bytes of `{tensor}` overlap another tensor's or leave a hole", path.display())]
    Overlapping {
        /// The file.
        path: PathBuf,
        /// The tensor whose offsets are wrong.
        tensor: String,
    },
    /// A tensor's place in the file has another size than its shape and dtype call for.
    #[error("{}: the bytes of `{tensor}` are not as many as its shape and dtype call for", path.display())]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A safetensors header is malformed.
    #[error("{} is not a valid safetensors file: {reason}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor is there twice.
    #[error("`{tensor}` is in {} twice, or there and in {}", second.display(), first.display())]
    Duplicate {
        /// The tensor.
        tensor: String,
        /// The file it was found in first.
        first: PathBuf,
        /// The file it was found in again.
        second: PathBuf,
    },
    /// There is no multi-token-prediction head to draft with. The model is complete without it.
    #[error("the checkpoint has no multi-token-prediction head: {reason}")]
    NoDraftHead {
        /// Why not.
        reason: String,
    },
    /// The model needs a tensor that no file holds.
    #[error("tensor `{tensor}` is missing")]
    MissingTensor {
        /// The absent tensor.
        tensor: String,
    },
    /// A tensor has another shape than `config.json` calls for.
    #[error("tensor `{tensor}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// The shape that follows from `config.json`.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor or an expert is not what the manifest says: its file was changed or is damaged.
    #[error("{part} is not the one of the manifest: its hash differs. Get it again, or make a new manifest")]
    Mismatch {
        /// The tensor or the expert.
        part: String,
    },
    /// The manifest does not list a tensor or an expert of this model.
    #[error("the manifest does not list {part}: it belongs to another model")]
    Unlisted {
        /// The tensor or the expert.
        part: String,
    },
    /// Experts of a layer are not all stored in the same dtypes.
    #[error("the experts of layer {layer} are stored in different dtypes")]
    MixedDtypes {
        /// The layer.
        layer: usize,
    },
    /// A tensor or an expert could not be had from where it should come. A retry may help.
    #[error("{part} cannot be had")]
    Part {
        /// The tensor or the expert.
        part: String,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A weight is infinite or not a number: the model would give nonsense.
    #[error("{part} has {value} at place {at}: weights must be finite numbers")]
    NotFinite {
        /// The tensor or the expert.
        part: String,
        /// Which of its values, counted from 0.
        at: usize,
        /// The value.
        value: f32,
    },
    /// The rows of a quantised tensor are no whole blocks.
    #[error("tensor `{tensor}` has rows of {row_bytes} bytes, which are no whole blocks of {block_bytes}")]
    Blocks {
        /// The tensor.
        tensor: String,
        /// Bytes of a row.
        row_bytes: usize,
        /// Bytes of a block.
        block_bytes: usize,
    },
    /// A scale is negative, or too large for the weights that it is for to be finite.
    #[error("{part} has a scale of {value} at place {at}: weights times it must be finite numbers, and it at least 0")]
    Scale {
        /// The tensor of scales, or the expert.
        part: String,
        /// Which of its values, counted from 0.
        at: usize,
        /// The scale.
        value: f32,
    },
    /// A tensor is stored in a dtype that is not supported.
    #[error(
        "tensor `{tensor}` is stored as {found}; supported are F32, F16, BF16, F8_E4M3 with scales of 128 x 128 blocks, MXFP4, and q8_0 and q4_k of hanse quantize"
    )]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        found: String,
    },
}

/// Why a trunk or an expert could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The checkpoint is at fault.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The caller asked for an expert that the model does not have.
    #[error("the model has no expert {expert} in layer {layer}")]
    NoSuchExpert {
        /// The layer asked for.
        layer: usize,
        /// The expert asked for.
        expert: usize,
    },
    /// The compute library refused to prepare the trunk.
    #[error("cannot prepare the trunk")]
    Compute(#[from] candle_core::Error),
}
