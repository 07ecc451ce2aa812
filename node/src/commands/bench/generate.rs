//! The price of distribution: generations over the network beside generations in this process.

use anyhow::{Context as _, bail};
use futures::StreamExt;
use hanse_router::stats::quantile_of;
use hanse_router::{Client, ExpertLayout, GenerateRequest};
use serde::Serialize;

use crate::cli::BenchArgs;
use crate::output::say;

/// Tokens of the prompt; any will do, since speed does not depend on them.
const PROMPT_TOKENS: u32 = 16;

#[derive(Serialize)]
pub(super) struct Report {
    /// Medians over the rounds.
    local_tokens_per_second: f64,
    network_tokens_per_second: f64,
    /// Median of the rounds' ratios, network over local.
    ratio: f64,
    local_step_ms: f64,
    network_step_ms: f64,
    /// The law of the design: MoE layers times the mean duration of a call, the trunk not counted.
    law_ms: f64,
    calls_per_layer: f64,
}

/// Local and network generations take turns, so that a machine that becomes slower meanwhile slows both.
pub(super) async fn run(
    args: &BenchArgs,
    client: &Client,
    local: &Client,
    layout: &ExpertLayout,
) -> anyhow::Result<Report> {
    let vocab = client.spec().vocab_size as u32;
    let prompt = (0..PROMPT_TOKENS).map(|i| (i * 37 + 1) % vocab).collect();
    let mut request = GenerateRequest::greedy(prompt, args.max_tokens);
    request.ignore_eos = true;
    let (mut here, mut there, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    // One round to warm up: connections, page cache, statistics of the peers.
    speed(local, &request).await?;
    speed(client, &request).await?;
    let calls_before: u64 = client.peers().iter().map(|report| report.stats.calls).sum();
    for _ in 0..args.rounds.max(1) {
        let (slow, fast) = (speed(client, &request).await?, speed(local, &request).await?);
        there.push(slow);
        here.push(fast);
        ratios.push(slow / fast);
    }
    let calls: u64 = client.peers().iter().map(|report| report.stats.calls).sum::<u64>() - calls_before;
    // A generation of n tokens is one pass for the prompt and n - 1 steps.
    let passes = args.rounds.max(1) * args.max_tokens * layout.layers.len();
    let reports = client.peers();
    let mean = reports.iter().map(|report| report.stats.mean().as_secs_f64() * 1e3).sum::<f64>() / reports.len() as f64;
    let (local_speed, network_speed) = (quantile_of(here, 0.5), quantile_of(there, 0.5));
    Ok(Report {
        local_tokens_per_second: local_speed,
        network_tokens_per_second: network_speed,
        ratio: quantile_of(ratios, 0.5),
        local_step_ms: 1e3 / local_speed,
        network_step_ms: 1e3 / network_speed,
        law_ms: mean * layout.layers.len() as f64,
        calls_per_layer: calls as f64 / passes as f64,
    })
}

async fn speed(client: &Client, request: &GenerateRequest) -> anyhow::Result<f64> {
    let mut generation = client.generate(request.clone());
    while let Some(token) = generation.next().await {
        token?;
    }
    let summary = generation.summary().context("the generation ended without a word")?;
    if summary.timings.decode_tokens == 0 {
        bail!("nothing to time: give --max-tokens 2 or more");
    }
    Ok(summary.timings.tokens_per_second())
}

impl Report {
    pub(super) fn print(&self) -> anyhow::Result<()> {
        say!("generate   local {:.1} tokens/s ({:.2} ms a step)", self.local_tokens_per_second, self.local_step_ms);
        say!(
            "           network {:.1} tokens/s ({:.2} ms a step)",
            self.network_tokens_per_second,
            self.network_step_ms
        );
        say!("           network / local {:.3}, median of pairs", self.ratio);
        say!(
            "           the law: MoE layers x mean call = {:.2} ms a step; {:.2} calls a layer",
            self.law_ms,
            self.calls_per_layer
        );
        Ok(())
    }
}
