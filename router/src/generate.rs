//! The decoding engine: prompt in, tokens out, one at a time.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use hanse_model::{
    Experts, ForwardError, GenerationDefaults, LogitsWanted, Sampler, SamplingError, SamplingParams, Segment,
    StopOutput, StopStrings, Tokenizer, TokenizerError, Trunk, log_softmax_at,
};

/// Rows of a prompt that go through the model in one pass: long prompts are cut so that frames and buffers stay small.
pub(crate) const PREFILL_CHUNK: usize = 256;

/// What to generate.
#[derive(Debug, Clone)]
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
}

impl GenerateRequest {
    /// Greedy decoding of at most `max_tokens` tokens after `prompt`.
    #[must_use]
    pub fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Self {
        let sampling = SamplingParams { temperature: 0.0, top_k: None, top_p: None, seed: 0 };
        Self { prompt, max_tokens, sampling, stop: Vec::new(), ignore_eos: false }
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
    /// Forward passes in the decode phase: one less than tokens, since prefill gives the first.
    pub decode_steps: usize,
}

impl Timings {
    /// Tokens per second of the decode phase; 0 if there was no step.
    #[must_use]
    pub fn tokens_per_second(&self) -> f64 {
        let seconds = self.decode.as_secs_f64();
        if self.decode_steps == 0 || seconds == 0.0 { 0.0 } else { self.decode_steps as f64 / seconds }
    }
}

/// How a generation ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// Text that was held back until the end was certain.
    pub rest: String,
    /// How long it took.
    pub timings: Timings,
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
    /// The tokens could not be turned into text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The caller has gone.
    #[error("cancelled")]
    Cancelled,
}

/// Continues a prompt token by token, and gives each token to `on_token` as soon as it is known.
///
/// Blocks the calling thread while the model computes. `on_token` ends the generation early by breaking.
///
/// # Errors
/// See [`GenerateError`]; tokens that were given out before stay valid.
pub fn generate(
    trunk: &Trunk,
    tokenizer: Option<&Tokenizer>,
    defaults: &GenerationDefaults,
    experts: &mut dyn Experts,
    request: &GenerateRequest,
    mut on_token: impl FnMut(Token) -> ControlFlow<()>,
) -> Result<Finished, GenerateError> {
    let context = trunk.spec().max_positions;
    if request.prompt.is_empty() {
        return Err(GenerateError::EmptyPrompt);
    }
    let room = context.checked_sub(request.prompt.len()).filter(|room| *room > 0 || request.max_tokens == 0);
    let Some(room) = room else {
        return Err(GenerateError::PromptTooLong { tokens: request.prompt.len(), context });
    };
    let limit = request.max_tokens.min(room);
    let mut sampler = Sampler::new(request.sampling.clone())?;
    let mut stop = StopStrings::new(request.stop.clone());
    let mut text = tokenizer.map(|tokenizer| tokenizer.stream(true));
    let mut cache = trunk.new_cache();
    let started = Instant::now();

    let mut logits = Vec::new();
    let chunks = request.prompt.chunks(PREFILL_CHUNK);
    let last_chunk = chunks.len() - 1;
    for (index, tokens) in chunks.enumerate() {
        let wanted = if index == last_chunk { LogitsWanted::Last } else { LogitsWanted::None };
        logits = trunk
            .forward(&mut [Segment { tokens, cache: &mut cache, logits: wanted }], experts)?
            .pop()
            .unwrap_or_default();
    }
    let prefill = started.elapsed();
    let decoding = Instant::now();
    let mut decode_steps = 0;
    let mut reason = FinishReason::Length;
    for produced in 1..=limit {
        let id = sampler.sample(&logits);
        let is_end = defaults.eos_token_ids.contains(&id) && !request.ignore_eos;
        let mut piece = String::new();
        let mut stopped = false;
        if !is_end && let Some(text) = &mut text {
            StopOutput { text: piece, stopped } = stop.push(&text.push(id)?);
        }
        let ended = on_token(Token { id, text: piece, logprob: log_softmax_at(&logits, id) }).is_break();
        if ended {
            return Err(GenerateError::Cancelled);
        }
        if is_end || stopped {
            reason = FinishReason::Stop;
            break;
        }
        if produced < limit {
            let segment = Segment { tokens: &[id], cache: &mut cache, logits: LogitsWanted::Last };
            logits = trunk.forward(&mut [segment], experts)?.pop().unwrap_or_default();
            decode_steps += 1;
        }
    }
    let mut rest = String::new();
    if let Some(text) = &mut text {
        let StopOutput { text: last, stopped } = stop.push(&text.finish()?);
        rest = last + &stop.finish();
        if stopped {
            reason = FinishReason::Stop;
        }
    }
    Ok(Finished { reason, rest, timings: Timings { prefill, decode: decoding.elapsed(), decode_steps } })
}

/// Runs a text through the model and gives the logits of each chunk of positions to `on_logits`: the position of the first
/// row and `[rows, vocab]`.
///
/// # Errors
/// As [`generate`]: an empty or too long text, or a failed forward pass.
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
