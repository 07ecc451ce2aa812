//! `hanse score`: log probabilities and perplexity of a text.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Context as _;
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
    network: &'a hanse_router::NetworkUse,
}

pub(crate) async fn run(args: ScoreArgs) -> anyhow::Result<()> {
    let local = args.client.local || !args.client.names_network();
    let client = client::open(&args.client, None, local).await?;
    let file = args.file.as_deref().map(client::read_text).transpose()?;
    let tokens = client::prompt_ids(&client, args.prompt.as_deref().or(file.as_deref()), args.prompt_ids.as_deref())?;
    let bar = output::count_bar("scoring");
    bar.set_length(tokens.len() as u64);
    let shown = bar.clone();
    let keep = args.logits_out.is_some();
    let score = client.score(tokens.clone(), keep, move |done| shown.set_position(done as u64)).await;
    bar.finish_and_clear();
    client.close().await;
    let score = score?;
    if let (Some(path), Some(logits)) = (&args.logits_out, &score.logits) {
        write_logits(path, logits, tokens.len(), client.spec().vocab_size)?;
    }
    if args.json {
        let (logprobs, perplexity) = (&score.logprobs, score.perplexity);
        return output::json(&Document { tokens: &tokens, logprobs, perplexity, network: &score.network });
    }
    say!("tokens      {}", tokens.len());
    say!("perplexity  {:.4}", score.perplexity);
    Ok(())
}

fn write_logits(path: &Path, logits: &[f32], tokens: usize, vocab: usize) -> anyhow::Result<()> {
    let bytes: Vec<u8> = logits.iter().flat_map(|value| value.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![tokens, vocab], &bytes).context("logits of an odd size")?;
    // Written to what is there, be it a link or a device, and not put in its place.
    let bytes = safetensors::serialize(HashMap::from([("logits", view)]), None)?;
    std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}
