//! Many generations at a time on one client, compared with what one process computes.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use futures::StreamExt;
use hanse_router::{Client, GenerateError, GenerateRequest, NetworkUse};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::ChaosError;
use super::stalls::Stalls;

/// Different prompts, taken in turn.
const PROMPTS: u32 = 8;
/// Tokens of each.
const PROMPT_TOKENS: u32 = 8;

/// What the streams have done.
#[derive(Debug, Default)]
pub(super) struct Results {
    pub(super) generations: usize,
    pub(super) different: usize,
    pub(super) failures: Vec<String>,
    pub(super) network: NetworkUse,
    pub(super) gaps: Stalls,
}

/// Generations in progress until told to end.
#[derive(Debug)]
pub(super) struct Load {
    streams: JoinSet<()>,
    results: Arc<Mutex<Results>>,
    ending: CancellationToken,
}

impl Load {
    /// Computes with `local` what must come out, and starts `streams` streams of generations on `client`.
    pub(super) async fn start(
        local: &Client,
        client: &Client,
        streams: usize,
        max_tokens: usize,
    ) -> Result<Self, ChaosError> {
        let vocab = local.spec().vocab_size as u32;
        let mut expected = Vec::new();
        for prompt in 0..PROMPTS {
            let ids = (0..PROMPT_TOKENS).map(|i| (prompt * 101 + i * 37 + 1) % vocab.max(1)).collect();
            let request = GenerateRequest { ignore_eos: true, ..GenerateRequest::greedy(ids, max_tokens) };
            let tokens = generate(local, &request, 0, &mut Stalls::default()).await.map_err(ChaosError::Reference)?.0;
            expected.push((request, tokens));
        }
        let expected = Arc::new(expected);
        let (results, ending) = (Arc::new(Mutex::new(Results::default())), CancellationToken::new());
        let mut tasks = JoinSet::new();
        for stream in 0..streams {
            let (client, expected, results) = (client.clone(), expected.clone(), results.clone());
            let ending = ending.clone();
            tasks.spawn(async move {
                for (request, tokens) in expected.iter().cycle().skip(stream) {
                    if ending.is_cancelled() {
                        return;
                    }
                    let mut gaps = Stalls::default();
                    let outcome = generate(&client, request, stream, &mut gaps).await;
                    let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                    results.generations += 1;
                    results.gaps.append(gaps);
                    match outcome {
                        Ok((got, network)) => {
                            results.different += usize::from(got != *tokens);
                            results.network.frames += network.frames;
                            results.network.hedged += network.hedged;
                            results.network.retries += network.retries;
                        }
                        Err(error) => results.failures.push(format!("{:#}", anyhow::Error::from(error))),
                    }
                }
            });
        }
        Ok(Self { streams: tasks, results, ending })
    }

    /// What the generations that have ended so far cost.
    pub(super) fn counts(&self) -> NetworkUse {
        self.results.lock().unwrap_or_else(PoisonError::into_inner).network.clone()
    }

    /// Waits for the generations in progress, starts no more, and tells of all.
    pub(super) async fn finish(mut self) -> Results {
        self.ending.cancel();
        let mut died = 0;
        while let Some(ended) = self.streams.join_next().await {
            died += usize::from(ended.is_err());
        }
        let mut results = std::mem::take(&mut *self.results.lock().unwrap_or_else(PoisonError::into_inner));
        results.failures.extend((0..died).map(|_| "a stream's task died".to_owned()));
        results
    }
}

/// The tokens of one generation and what it cost.
async fn generate(
    client: &Client,
    request: &GenerateRequest,
    stream: usize,
    gaps: &mut Stalls,
) -> Result<(Vec<u32>, NetworkUse), GenerateError> {
    let mut generation = client.generate(request.clone());
    let (mut tokens, mut last) = (Vec::new(), None);
    while let Some(token) = generation.next().await {
        tokens.push(token?.id);
        let now = Instant::now();
        if let Some(before) = last.replace(now) {
            gaps.push(stream, before, now);
        }
    }
    let network = generation.summary().map(|summary| summary.network.clone()).unwrap_or_default();
    Ok((tokens, network))
}
