//! From logits to a token.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How a token is drawn. Applied in this order: temperature, top-k, top-p.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Logits are divided by this; 0 takes the best token always.
    pub temperature: f32,
    /// Only this many best tokens (and any equal to the last of them); `None` or 0 keeps all.
    pub top_k: Option<usize>,
    /// Only the best tokens that together have this probability; at least one is kept.
    pub top_p: Option<f32>,
    /// Seed of the random numbers: the same seed and logits give the same tokens.
    pub seed: u64,
}

impl SamplingParams {
    /// Always the best token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: None, seed: 0 }
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
}

/// Draws tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
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
        let rng = ChaCha8Rng::seed_from_u64(params.seed);
        Ok(Self { params, rng })
    }

    /// The next token, for logits of `[vocab_size]`. Of equal logits the lowest token is best. A logit that is not a
    /// number is never drawn; if none is a number the token is 0.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
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

/// The natural logarithm of the probability that softmax gives to `token`; minus infinity for a token outside
/// `logits`.
pub fn log_softmax_at(logits: &[f32], token: u32) -> f32 {
    let Some(logit) = logits.get(token as usize) else { return f32::NEG_INFINITY };
    let largest = f64::from(logits[best(logits)]);
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum();
    (f64::from(*logit) - largest - sum.ln()) as f32
}
