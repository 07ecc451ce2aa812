//! What may be asked of a model and what comes of it; and scoring, which needs no decoding.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use hanse_model::{Experts, ForwardError, LogitsWanted, SamplingError, SamplingParams, Segment, TokenizerError, Trunk};

/// Rows of a prompt that go through the model in one pass: long prompts are cut so that frames and buffers stay small.
pub(crate) const PREFILL_CHUNK: usize = 256;

/// A rule for what may be generated, such as a JSON schema.
pub trait Grammar: std::fmt::Debug + Send + Sync {
    /// The state of one answer, at its beginning.
    ///
    /// # Errors
    /// In words, if the rule makes no sense.
    fn begin(&self) -> Result<Box<dyn Constraint>, String>;
}

/// How far one answer has come in a [`Grammar`].
pub trait Constraint: Send {
    /// A bit for each token that may come next, the lowest of the first word for token 0; end-of-sequence tokens among them where
    /// the answer may end.
    ///
    /// # Errors
    /// In words; the generation then fails.
    fn allowed(&mut self) -> Result<Vec<u32>, String>;

    /// Notes that `token` has come.
    ///
    /// # Errors
    /// In words; the generation then fails.
    fn accept(&mut self, token: u32) -> Result<(), String>;
}

/// What to generate.
#[derive(Debug, Clone, Default)]
pub struct GenerateRequest {
    /// The prompt's token ids; at least one, and fewer than the model's context.
    pub prompt: Vec<u32>,
    /// The most tokens to add. The context's end may come first.
    pub max_tokens: usize,
    /// How a token is drawn from the logits.
    pub sampling: SamplingParams,
    /// Texts that end the answer when they appear in it; they are not part of it.
    pub stop: Vec<String>,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// How many of the most probable tokens to tell beside each token.
    pub top_logprobs: usize,
    /// Whether to tell the same of each token of the prompt, before the first token of the answer.
    pub prompt_logprobs: bool,
    /// What the answer must obey.
    pub grammar: Option<Arc<dyn Grammar>>,
}

impl GenerateRequest {
    /// Greedy decoding of at most `max_tokens` tokens after `prompt`.
    #[must_use]
    pub fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self { prompt, max_tokens, ..Self::default() }
    }
}

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// The token's id.
    pub id: u32,
    /// The text that is certain now. May be empty while a character is incomplete or a stop string is possible.
    pub text: String,
    /// Natural logarithm of the probability the model gave to it, before temperature and cuts.
    pub logprob: f32,
    /// The most probable tokens in its place with the same of each, best first; as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// What the model thought of one token of a text, such as the prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredToken {
    /// The token's id.
    pub id: u32,
    /// Natural logarithm of its probability after the tokens before it; `None` for a text's first token.
    pub logprob: Option<f32>,
    /// The most probable tokens in its place, as in [`Token::top`]; none for the first.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model ended it, or a stop text appeared.
    Stop,
    /// `max_tokens` or the end of the context was reached.
    Length,
}

/// How long the two phases took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timings {
    /// From the start to the prompt's last logits.
    pub prefill: Duration,
    /// From there to the end.
    pub decode: Duration,
    /// Forward passes in the decode phase.
    pub decode_steps: usize,
    /// Tokens that they gave: one less than there are, since prefill gives the first.
    pub decode_tokens: usize,
}

impl Timings {
    /// Tokens per second of the decode phase; 0 if there was no step.
    #[must_use]
    pub fn tokens_per_second(&self) -> f64 {
        let seconds = self.decode.as_secs_f64();
        if seconds == 0.0 { 0.0 } else { self.decode_tokens as f64 / seconds }
    }

    /// Tokens that a forward pass of the decode phase gave on average; 0 if there was no pass.
    #[must_use]
    pub fn tokens_per_step(&self) -> f64 {
        if self.decode_steps == 0 { 0.0 } else { self.decode_tokens as f64 / self.decode_steps as f64 }
    }
}

/// Why a generation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// There is nothing to continue.
    #[error("the prompt is empty: give at least one token")]
    EmptyPrompt,
    /// The prompt leaves no room for an answer. Shorten it.
    #[error("the prompt has {tokens} tokens and leaves no room in the model's context of {context}: shorten it")]
    PromptTooLong {
        /// Tokens in the prompt.
        tokens: usize,
        /// The model's longest context, in tokens.
        context: usize,
    },
    /// The model could not be computed, by bad input or for lack of experts.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The sampling parameters make no sense.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The answer cannot obey its grammar.
    #[error("the answer's format cannot be obeyed: {0}")]
    Grammar(String),
    /// As many requests wait as may. Try again later.
    #[error("{waiting} requests are waiting already: try again later")]
    Busy {
        /// How many wait.
        waiting: usize,
    },
    /// The tokens could not be turned into text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The caller has gone.
    #[error("cancelled")]
    Cancelled,
}

/// Runs a text through the model and gives the logits of each chunk of positions to `on_logits`: the position of the first
/// row and `[rows, vocab]`.
///
/// # Errors
/// An empty or too long text, or a failed forward pass.
pub fn logits(
    trunk: &Trunk,
    experts: &mut dyn Experts,
    tokens: &[u32],
    mut on_logits: impl FnMut(usize, Vec<f32>) -> ControlFlow<()>,
) -> Result<(), GenerateError> {
    let context = trunk.spec().max_positions;
    if tokens.is_empty() {
        return Err(GenerateError::EmptyPrompt);
    }
    if tokens.len() > context {
        return Err(GenerateError::PromptTooLong { tokens: tokens.len(), context });
    }
    let mut cache = trunk.new_cache();
    for (index, chunk) in tokens.chunks(PREFILL_CHUNK).enumerate() {
        let segment = Segment { tokens: chunk, cache: &mut cache, logits: LogitsWanted::All };
        let values = trunk.forward(&mut [segment], experts)?.pop().unwrap_or_default();
        if on_logits(index * PREFILL_CHUNK, values).is_break() {
            return Err(GenerateError::Cancelled);
        }
    }
    Ok(())
}
