//! `hanse generate`: continue a prompt.

use std::io::Write;

use anyhow::bail;
use futures::StreamExt;
use hanse_model::SamplingParams;
use hanse_router::{DraftUse, GenerateRequest, NetworkUse, Summary, Timings};
use serde::Serialize;

use super::client;
use crate::cli::{GenerateArgs, SamplingArgs};
use crate::output;
use crate::output::say;

#[derive(Serialize)]
struct Document<'a> {
    prompt_tokens: &'a [u32],
    tokens: &'a [u32],
    logprobs: &'a [f32],
    text: &'a str,
    finish_reason: hanse_router::FinishReason,
    timings: TimingsDocument,
    network: &'a NetworkUse,
    drafts: DraftsDocument,
}

#[derive(Serialize)]
pub(crate) struct DraftsDocument {
    /// Drafted tokens that were verified.
    drafted: u64,
    /// Of which came.
    accepted: u64,
    /// Tokens that a forward pass gave, on average.
    tokens_per_step: f64,
    /// Layers that waited for peers, by token after the first.
    round_trips_per_token: f64,
}

impl From<&Summary> for DraftsDocument {
    fn from(summary: &Summary) -> Self {
        let DraftUse { drafted, accepted, decode_round_trips } = summary.drafts;
        let tokens = summary.timings.decode_tokens.max(1);
        let round_trips_per_token = decode_round_trips as f64 / tokens as f64;
        Self { drafted, accepted, tokens_per_step: summary.timings.tokens_per_step(), round_trips_per_token }
    }
}

#[derive(Serialize)]
pub(crate) struct TimingsDocument {
    prefill_ms: f64,
    decode_ms: f64,
    tokens_per_second: f64,
}

impl From<Timings> for TimingsDocument {
    fn from(timings: Timings) -> Self {
        Self {
            prefill_ms: timings.prefill.as_secs_f64() * 1e3,
            decode_ms: timings.decode.as_secs_f64() * 1e3,
            tokens_per_second: timings.tokens_per_second(),
        }
    }
}

impl SamplingArgs {
    /// Greedy unless a temperature is given; nothing is cut off unless asked for.
    pub(crate) fn params(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.unwrap_or(0.0),
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed.unwrap_or(0),
            ..SamplingParams::default()
        }
    }
}

pub(crate) async fn run(args: GenerateArgs) -> anyhow::Result<()> {
    if !args.client.local && !args.client.names_network() {
        crate::cli::usage_error("give --bootstrap ADDR to use a network, or --local to compute everything here");
    }
    let client = client::open(&args.client, Some(&args.draft), args.client.local).await?;
    let prompt = client::prompt_ids(&client, args.prompt.as_deref(), args.prompt_ids.as_deref())?;
    let request = GenerateRequest {
        prompt: prompt.clone(),
        max_tokens: args.max_tokens,
        sampling: args.sampling.params(),
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        ..GenerateRequest::default()
    };
    let mut generation = client.generate(request);
    let (mut tokens, mut logprobs, mut text) = (Vec::new(), Vec::new(), String::new());
    while let Some(token) = generation.next().await {
        let token = token?;
        tokens.push(token.id);
        logprobs.push(token.logprob);
        text.push_str(&token.text);
        if !args.json {
            show(&token.text)?;
        }
    }
    let Some(summary) = generation.summary() else { bail!("the generation ended without a word") };
    text.push_str(&summary.rest);
    client.close().await;
    if args.json {
        return output::json(&Document {
            prompt_tokens: &prompt,
            tokens: &tokens,
            logprobs: &logprobs,
            text: &text,
            finish_reason: summary.finish_reason,
            timings: summary.timings.into(),
            network: &summary.network,
            drafts: summary.into(),
        });
    }
    show(&summary.rest)?;
    if client.tokenizer().is_none() {
        // Without a tokenizer there is no text to show.
        show(&tokens.iter().map(ToString::to_string).collect::<Vec<_>>().join(","))?;
    }
    say!("");
    eprintln!("[{}]", footer(tokens.len(), summary.timings, &summary.network, &summary.drafts));
    Ok(())
}

/// Streams a piece of text to standard output.
pub(crate) fn show(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// What is said of an answer after it: how many tokens, how fast, from whom.
pub(crate) fn footer(tokens: usize, timings: Timings, network: &NetworkUse, drafts: &DraftUse) -> String {
    let speed = timings.tokens_per_second();
    let answer = format!("{}, {speed:.1} tokens/s", output::count(tokens, "token"));
    if network.frames == 0 {
        return format!("{answer}, computed here");
    }
    let mut line = format!("{answer}, {}, {} frames", output::count(network.peers, "peer"), network.frames);
    if network.retries + network.hedged > 0 {
        line += &format!(", {} retries, {} hedged", network.retries, network.hedged);
    }
    if !network.precisions.is_empty() {
        let names: Vec<String> = network.precisions.iter().map(ToString::to_string).collect();
        line += &format!(", experts in {}", names.join(" and "));
    }
    if network.mixed > 0 {
        line += &format!(", {} changed precision on the way", output::count(network.mixed as usize, "expert"));
    }
    if drafts.accepted > 0 {
        line += &format!(", {:.1} tokens a pass", timings.tokens_per_step());
    }
    line
}
