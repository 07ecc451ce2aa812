//! From logits to a token.

use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The largest bias or penalty, either way.
const LARGEST_BIAS: f32 = 100.0;

/// How a token is drawn. Applied in this order: biases and penalties, temperature, top-k, top-p.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SamplingParams {
    /// Logits are divided by this; 0 takes the best token always.
    pub temperature: f32,
    /// Only this many best tokens (and any equal to the last of them); `None` or 0 keeps all.
    pub top_k: Option<usize>,
    /// Only the best tokens that together have this probability; at least one is kept.
    pub top_p: Option<f32>,
    /// Seed of the random numbers: the same seed and logits give the same tokens.
    pub seed: u64,
    /// Taken from the logit of every token that was drawn before.
    pub presence_penalty: f32,
    /// Taken from a token's logit for each time that it was drawn before.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens; tokens outside the vocabulary are left out.
    pub logit_bias: Vec<(u32, f32)>,
}

impl SamplingParams {
    /// Always the best token.
    pub fn greedy() -> Self {
        Self::default()
    }
}

/// Sampling parameters that make no sense. The caller's fault.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// The temperature is negative or not a number.
    #[error("temperature is {0}, but must be 0 or above")]
    Temperature(f32),
    /// The probability is outside 0 to 1.
    #[error("top_p is {0}, but must be between 0 and 1")]
    TopP(f32),
    /// A penalty or a bias is too large or not a number.
    #[error("{name} is {value}, but must be between -{LARGEST_BIAS} and {LARGEST_BIAS}")]
    Bias {
        /// Which one.
        name: &'static str,
        /// Its value.
        value: f32,
    },
}

/// Draws tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
    /// How often each token was drawn; kept only if it matters.
    drawn: HashMap<u32, u32>,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// # Errors
    /// If a parameter makes no sense.
    pub fn new(params: SamplingParams) -> Result<Self, SamplingError> {
        if !params.temperature.is_finite() || params.temperature < 0.0 {
            return Err(SamplingError::Temperature(params.temperature));
        }
        if let Some(top_p) = params.top_p.filter(|p| !(0.0..=1.0).contains(p)) {
            return Err(SamplingError::TopP(top_p));
        }
        let named = [("presence_penalty", params.presence_penalty), ("frequency_penalty", params.frequency_penalty)];
        let biases = params.logit_bias.iter().map(|(_, bias)| ("logit_bias", *bias));
        for (name, value) in named.into_iter().chain(biases) {
            if !value.is_finite() || value.abs() > LARGEST_BIAS {
                return Err(SamplingError::Bias { name, value });
            }
        }
        let rng = ChaCha8Rng::seed_from_u64(params.seed);
        Ok(Self { params, rng, drawn: HashMap::new() })
    }

    /// The next token, for logits of `[vocab_size]`. Of equal logits the lowest token is best. A logit that is not a
    /// number is never drawn; if none is a number the token is 0.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        self.sample_among(logits, None)
    }

    /// As [`Self::sample`], of some tokens only: `allowed` has a bit for each, the lowest of the first word for token 0. A token
    /// without one, or beyond them, is never drawn, unless all that it allows have a probability of zero.
    pub fn sample_allowed(&mut self, logits: &[f32], allowed: &[u32]) -> u32 {
        self.sample_among(logits, Some(allowed))
    }

    fn sample_among(&mut self, logits: &[f32], allowed: Option<&[u32]>) -> u32 {
        let token = if self.changes_logits() || allowed.is_some() {
            let mut changed = logits.to_vec();
            self.bias(&mut changed);
            if let Some(allowed) = allowed {
                forbid(&mut changed, allowed);
            }
            let any = changed.iter().any(|logit| *logit > f32::NEG_INFINITY);
            self.draw(if any { &changed } else { logits })
        } else {
            self.draw(logits)
        };
        if self.penalises() {
            *self.drawn.entry(token).or_default() += 1;
        }
        token
    }

    fn penalises(&self) -> bool {
        self.params.presence_penalty != 0.0 || self.params.frequency_penalty != 0.0
    }

    fn changes_logits(&self) -> bool {
        self.penalises() || !self.params.logit_bias.is_empty()
    }

    fn bias(&self, logits: &mut [f32]) {
        for (token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        for (token, count) in &self.drawn {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit -= self.params.presence_penalty + self.params.frequency_penalty * *count as f32;
            }
        }
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        let best = best(logits);
        let Some(largest) = logits.get(best).copied() else { return 0 };
        if self.params.temperature == 0.0 || !largest.is_finite() {
            return best as u32;
        }
        let mut candidates: Vec<(usize, f64)> = self
            .kept_by_top_k(logits)
            .map(|(token, logit)| {
                let scaled = (f64::from(logit) - f64::from(largest)) / f64::from(self.params.temperature);
                (token, scaled.exp())
            })
            .collect();
        if let Some(top_p) = self.params.top_p {
            keep_top_p(&mut candidates, f64::from(top_p));
        }
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut left = self.rng.random::<f64>() * total;
        for (token, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return *token as u32;
            }
        }
        best as u32
    }

    fn kept_by_top_k<'a>(&self, logits: &'a [f32]) -> impl Iterator<Item = (usize, f32)> + use<'a> {
        let threshold = match self.params.top_k {
            Some(k) if (1..logits.len()).contains(&k) => {
                let mut sorted: Vec<f32> =
                    logits.iter().map(|v| if v.is_nan() { f32::NEG_INFINITY } else { *v }).collect();
                *sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
            }
            _ => f32::NEG_INFINITY,
        };
        logits.iter().copied().enumerate().filter(move |(_, logit)| *logit >= threshold)
    }
}

/// Makes tokens impossible that `allowed` has no bit for.
fn forbid(logits: &mut [f32], allowed: &[u32]) {
    for (token, logit) in logits.iter_mut().enumerate() {
        if allowed.get(token / 32).is_none_or(|word| word >> (token % 32) & 1 == 0) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Removes the least probable candidates that together have no more than `1 - top_p`; the order is that of tokens
/// again afterwards.
fn keep_top_p(candidates: &mut Vec<(usize, f64)>, top_p: f64) {
    let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
    candidates.sort_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0)));
    let mut below = 0.0;
    let removed = candidates
        .iter()
        .take_while(|(_, weight)| {
            below += weight / total;
            below <= 1.0 - top_p
        })
        .count();
    candidates.drain(..removed.min(candidates.len().saturating_sub(1)));
    candidates.sort_unstable_by_key(|(token, _)| *token);
}

fn best(logits: &[f32]) -> usize {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] || (logits[best].is_nan() && !logit.is_nan()) {
            best = token;
        }
    }
    best
}

/// The `count` most probable tokens with their natural logarithms of softmax's probability, best first; of equal ones the lowest
/// token first.
pub fn top_log_softmax(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut tokens: Vec<u32> = (0..logits.len() as u32).filter(|&token| !logits[token as usize].is_nan()).collect();
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if (1..tokens.len()).contains(&count) {
        tokens.select_nth_unstable_by(count - 1, order);
    }
    tokens.truncate(count);
    tokens.sort_unstable_by(order);
    let total = if tokens.is_empty() { 0.0 } else { log_sum_exp(logits) };
    tokens.into_iter().map(|token| (token, (f64::from(logits[token as usize]) - total) as f32)).collect()
}

/// The natural logarithm of the probability that softmax gives to `token`; minus infinity for a token outside
/// `logits`.
pub fn log_softmax_at(logits: &[f32], token: u32) -> f32 {
    let Some(logit) = logits.get(token as usize) else { return f32::NEG_INFINITY };
    (f64::from(*logit) - log_sum_exp(logits)) as f32
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = f64::from(logits[best(logits)]);
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum();
    largest + sum.ln()
}
