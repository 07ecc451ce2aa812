//! `hanse score`: log probabilities and perplexity of a text.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context as _, bail};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;

use super::client;
use crate::cli::ScoreArgs;
use crate::output;
use crate::output::say;

#[derive(Serialize)]
struct Document<'a> {
    tokens: &'a [u32],
    logprobs: &'a [Option<f32>],
    perplexity: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    compared: Option<Compared>,
    network: &'a hanse_router::NetworkUse,
}

/// Distributions of the next token beside those of other logits, at every position.
#[derive(Serialize)]
struct Compared {
    /// Kullback-Leibler divergence from the others, in nats.
    mean_kl: f64,
    largest_kl: f64,
    /// How often the likeliest token is the same, as a share.
    same_first: f64,
}

pub(crate) async fn run(args: ScoreArgs) -> anyhow::Result<()> {
    let local = args.client.local || !args.client.names_network();
    let client = client::open(&args.client, None, local).await?;
    let file = args.file.as_deref().map(client::read_text).transpose()?;
    let tokens = client::prompt_ids(&client, args.prompt.as_deref().or(file.as_deref()), args.prompt_ids.as_deref())?;
    let bar = output::count_bar("scoring");
    bar.set_length(tokens.len() as u64);
    let shown = bar.clone();
    let keep = args.logits_out.is_some() || args.compare.is_some();
    let score = client.score(tokens.clone(), keep, move |done| shown.set_position(done as u64)).await;
    bar.finish_and_clear();
    client.close().await;
    let score = score?;
    if let (Some(path), Some(logits)) = (&args.logits_out, &score.logits) {
        write_logits(path, logits, tokens.len(), client.spec().vocab_size)?;
    }
    let compared = match (&args.compare, &score.logits) {
        (Some(path), Some(logits)) => {
            let others = read_logits(path, tokens.len(), client.spec().vocab_size)?;
            Some(compare(&others, logits, client.spec().vocab_size))
        }
        _ => None,
    };
    if args.json {
        let (logprobs, perplexity) = (&score.logprobs, score.perplexity);
        return output::json(&Document { tokens: &tokens, logprobs, perplexity, compared, network: &score.network });
    }
    say!("tokens      {}", tokens.len());
    say!("perplexity  {:.4}", score.perplexity);
    if let Some(Compared { mean_kl, largest_kl, same_first }) = compared {
        say!("divergence  {mean_kl:.3e} on average, {largest_kl:.3e} at most (KL, nats)");
        say!("same first  {:.2} %", same_first * 100.0);
    }
    Ok(())
}

fn write_logits(path: &Path, logits: &[f32], tokens: usize, vocab: usize) -> anyhow::Result<()> {
    let bytes: Vec<u8> = logits.iter().flat_map(|value| value.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![tokens, vocab], &bytes).context("logits of an odd size")?;
    // Written to what is there, be it a link or a device, and not put in its place.
    let bytes = safetensors::serialize(HashMap::from([("logits", view)]), None)?;
    std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

fn read_logits(path: &Path, tokens: usize, vocab: usize) -> anyhow::Result<Vec<f32>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file = SafeTensors::deserialize(&bytes).with_context(|| format!("{} holds no logits", path.display()))?;
    let tensor = file.tensor("logits").with_context(|| format!("{} holds no logits", path.display()))?;
    if tensor.dtype() != Dtype::F32 || tensor.shape() != [tokens, vocab] {
        bail!("{} holds logits of another text or model: they are {:?}", path.display(), tensor.shape());
    }
    Ok(tensor.data().as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect())
}

/// Both are `[tokens, vocab]`.
fn compare(others: &[f32], logits: &[f32], vocab: usize) -> Compared {
    let (mut sum, mut largest_kl, mut same, mut rows) = (0.0, 0.0f64, 0usize, 0usize);
    for (others, logits) in others.chunks_exact(vocab).zip(logits.chunks_exact(vocab)) {
        let (p, q) = (log_softmax(others), log_softmax(logits));
        let kl: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
        sum += kl;
        largest_kl = largest_kl.max(kl);
        same += usize::from(first(others) == first(logits));
        rows += 1;
    }
    let rows = rows.max(1) as f64;
    Compared { mean_kl: sum / rows, largest_kl, same_first: same as f64 / rows }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shifted = logits.iter().map(|logit| f64::from(*logit) - f64::from(largest));
    let sum: f64 = shifted.clone().map(f64::exp).sum();
    shifted.map(|logit| logit - sum.ln()).collect()
}

/// The likeliest token.
fn first(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions_are_compared_position_by_position() {
        let others = [0.0, 0.0, 3f32.ln(), 0.0];
        let Compared { mean_kl, largest_kl, same_first } = compare(&others, &others, 2);
        assert_eq!((mean_kl, largest_kl, same_first), (0.0, 0.0, 1.0));
        // (3/4, 1/4) from (1/2, 1/2), and the likeliest of the second is another.
        let Compared { mean_kl, largest_kl, same_first } = compare(&others, &[0.0, 0.0, 0.0, 0.0], 2);
        let kl = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
        assert!((largest_kl - kl).abs() < 1e-7 && (mean_kl - kl / 2.0).abs() < 1e-7, "{largest_kl} {mean_kl}");
        assert_eq!(same_first, 0.5);
    }
}
