//! Many generations at a time through one client, over the network and in this process.

use std::time::Instant;

use futures::StreamExt;
use hanse_router::stats::quantile_of;
use hanse_router::{Client, EngineConfig, GenerateRequest};
use serde::Serialize;

use crate::cli::BenchArgs;
use crate::output::say;

const GENERATIONS: [usize; 3] = [16, 64, 200];
/// Tokens of a prompt, short, so that most of the time goes to decoding.
const PROMPT_TOKENS: u32 = 4;

#[derive(Serialize)]
pub(super) struct Report {
    batches: Vec<Batch>,
}

#[derive(Serialize)]
struct Batch {
    generations: usize,
    /// Tokens of all generations a second; medians over the rounds.
    local_tokens_per_second: f64,
    network_tokens_per_second: f64,
    /// Median of the rounds' ratios, network over local.
    ratio: f64,
    /// Median of the rounds' ratios, over the network: with two groups where that is faster, over without.
    groups_ratio: f64,
    /// The share of passes that were made in two groups.
    grouped: f64,
    /// Datagrams that the sockets of this machine had no room for during the network's rounds; nothing where that is not told.
    dropped_datagrams: Option<u64>,
}

pub(super) async fn run(args: &BenchArgs, client: &Client, local: &Client) -> anyhow::Result<Report> {
    let mut batches = Vec::new();
    // The same network without groups.
    let together = client.clone().with_engine(EngineConfig { groups: false, ..client.engine_config() });
    for generations in GENERATIONS {
        let (mut here, mut there, mut ratios, mut groups_ratios) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let start = client.engine();
        let mut dropped = Some(0);
        speed(client, generations, args.max_tokens).await?;
        for _ in 0..args.rounds.max(1) {
            let before = dropped_datagrams();
            let network = speed(client, generations, args.max_tokens).await?;
            dropped = dropped.zip(dropped_datagrams()).zip(before).map(|((sum, now), before)| sum + now - before);
            groups_ratios.push(network / speed(&together, generations, args.max_tokens).await?);
            let alone = speed(local, generations, args.max_tokens).await?;
            there.push(network);
            here.push(alone);
            ratios.push(network / alone);
        }
        let end = client.engine();
        let steps = (end.steps - start.steps).max(1);
        batches.push(Batch {
            generations,
            local_tokens_per_second: quantile_of(here, 0.5),
            network_tokens_per_second: quantile_of(there, 0.5),
            ratio: quantile_of(ratios, 0.5),
            groups_ratio: quantile_of(groups_ratios, 0.5),
            grouped: (end.grouped_steps - start.grouped_steps) as f64 / steps as f64,
            dropped_datagrams: dropped,
        });
    }
    Ok(Report { batches })
}

/// Tokens a second of so many generations that begin together.
async fn speed(client: &Client, generations: usize, tokens: usize) -> anyhow::Result<f64> {
    let vocab = client.spec().vocab_size as u32;
    let started = Instant::now();
    let running = (0..generations as u32).map(|first| {
        let prompt = (0..PROMPT_TOKENS).map(|i| (first * 13 + i * 37 + 1) % vocab).collect();
        let mut request = GenerateRequest::greedy(prompt, tokens);
        request.ignore_eos = true;
        let mut generation = client.generate(request);
        async move {
            let mut count = 0;
            while let Some(token) = generation.next().await {
                token?;
                count += 1;
            }
            anyhow::Ok(count)
        }
    });
    let counts: Vec<usize> = futures::future::try_join_all(running).await?;
    Ok(counts.into_iter().sum::<usize>() as f64 / started.elapsed().as_secs_f64())
}

/// `RcvbufErrors` of UDP, over IPv4 and IPv6.
fn dropped_datagrams() -> Option<u64> {
    let v4 = std::fs::read_to_string("/proc/net/snmp").ok()?;
    let mut lines = v4.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let column = lines.next()?.split_whitespace().position(|name| name == "RcvbufErrors")?;
    let v4: u64 = lines.next()?.split_whitespace().nth(column)?.parse().ok()?;
    let v6 = std::fs::read_to_string("/proc/net/snmp6").unwrap_or_default();
    let v6 = v6.lines().find_map(|line| line.strip_prefix("Udp6RcvbufErrors")?.trim().parse::<u64>().ok());
    Some(v4 + v6.unwrap_or(0))
}

impl Report {
    pub(super) fn print(&self) -> anyhow::Result<()> {
        for batch in &self.batches {
            let dropped = batch.dropped_datagrams.map_or_else(|| "?".to_owned(), |dropped| dropped.to_string());
            say!(
                "batch      {:>3} generations: local {:.0} tokens/s, network {:.0}, ratio {:.2}; {dropped} datagrams dropped; two groups in {:.0} % of passes, {:.2} times as fast as one",
                batch.generations,
                batch.local_tokens_per_second,
                batch.network_tokens_per_second,
                batch.ratio,
                batch.grouped * 100.0,
                batch.groups_ratio
            );
        }
        Ok(())
    }
}
