//! Why a forward pass failed.

use crate::experts::ExpertsError;

/// Why a forward pass failed. Caches are as they were before it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// A token is not in the vocabulary. The caller's fault.
    #[error("token {token} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The token.
        token: u32,
        /// Tokens are below this.
        vocab_size: usize,
    },
    /// A sequence would be longer than the model's context. The caller's fault.
    #[error("the sequence would have {wanted} tokens, but the model's context is {max}")]
    ContextExceeded {
        /// Tokens the sequence would have.
        wanted: usize,
        /// Tokens it may have.
        max: usize,
    },
    /// A segment has no tokens. The caller's fault.
    #[error("a segment has no tokens")]
    NoTokens,
    /// A cache was made by another model's trunk. The caller's fault.
    #[error("the cache belongs to another model")]
    OtherModelsCache,
    /// There are not as many hidden states as tokens. The caller's fault.
    #[error("{found} values of hidden states were given, expected {expected}")]
    HiddenStates {
        /// Tokens times hidden size.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// The routed experts could not be computed. Whether a retry makes sense is the source's to say.
    #[error("the experts of layer {layer} failed")]
    Experts {
        /// The layer.
        layer: usize,
        /// Why.
        source: ExpertsError,
    },
    /// The experts answered with the wrong number of values.
    #[error("the experts of layer {layer} answered with {found} values, expected {expected}")]
    ExpertsShape {
        /// The layer.
        layer: usize,
        /// Rows times hidden size.
        expected: usize,
        /// Values in the answer.
        found: usize,
    },
    /// The compute library refused an operation.
    #[error("cannot compute")]
    Compute(#[from] candle_core::Error),
}
