//! What can be wrong with a GGUF file.

use std::path::PathBuf;

use crate::checkpoint::{CheckpointError, ConfigError, StoredDtype};
use crate::folder::WriteError;
use crate::tokenizer::TokenizerError;

/// Why a GGUF file could not be made a model folder. The file is at fault, or holds what is not supported; a retry does not help,
/// except where the disk was full.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// Tensors cannot be written so.
    #[error("tensors are written as f32, f16 or bf16, not as {0:?}; quantising comes after")]
    Precision(StoredDtype),
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is no GGUF file, or one of another version.
    #[error("{} is not a GGUF file that can be read: {reason}", path.display())]
    NotGguf {
        /// The file.
        path: PathBuf,
        /// What it is.
        reason: String,
    },
    /// A file ends in the middle of something, or something in it is longer than it may be.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What cannot be.
        what: String,
    },
    /// A metadata key that is needed is absent.
    #[error("the file has no `{key}`")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A metadata value makes no sense or is not supported.
    #[error("the file's `{key}` is {value}, but {reason}")]
    Key {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What it should have been.
        reason: String,
    },
    /// A metadata key says something about the model that is not understood. Without it the model would be another one.
    #[error("the file's `{key}` is not understood: what it changes is not supported")]
    UnknownKey {
        /// The key.
        key: String,
    },
    /// The model needs a tensor that the file does not hold.
    #[error("tensor `{tensor}` is missing")]
    MissingTensor {
        /// The tensor.
        tensor: String,
    },
    /// The file holds a tensor that is not understood. Without it the model would be another one.
    #[error("tensor `{tensor}` is not understood: what it changes is not supported")]
    UnknownTensor {
        /// The tensor.
        tensor: String,
    },
    /// A tensor's description or content is wrong.
    #[error("tensor `{tensor}`: {reason}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// The architecture is not supported.
    #[error("the file's architecture is `{found}`; supported are {known}")]
    Architecture {
        /// What the file says.
        found: String,
        /// Those that are.
        known: String,
    },
    /// The kind of tokenizer is not supported.
    #[error("the file's `{key}` is `{found}`; supported are {known}")]
    Vocabulary {
        /// Where it says so.
        key: &'static str,
        /// What the file says.
        found: String,
        /// Those that are.
        known: String,
    },
    /// The sizes in the file do not make a model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What was written cannot be opened.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tokenizer that was made cannot be opened.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The new folder could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The compute library refused blocks.
    #[error("cannot widen blocks")]
    Compute(#[from] candle_core::Error),
}
