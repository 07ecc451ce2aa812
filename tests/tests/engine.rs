//! Many generations at a time: each gives the tokens that it gives alone.

use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use hanse_model::SamplingParams;
use hanse_router::{Client, EngineConfig, GenerateError, GenerateRequest, NetworkConfig};
use hanse_tests::net::{Net, eventually, greedy, model_config, runtime, tokens};
use hanse_tests::reference::tiny_moe;

fn local(config: EngineConfig) -> Client {
    Client::local(&model_config(&tiny_moe())).unwrap().with_engine(config)
}

/// Requests of many kinds: long and short prompts, some that begin alike, greedy and drawn.
fn requests() -> Vec<GenerateRequest> {
    let shared: Vec<u32> = (0..90).map(|i| (i * 37 + 5) % 1700).collect();
    let prompt = |i: u32| -> Vec<u32> {
        let own = (0..1 + i * 13 % 70).map(|k| (i * 101 + k * 31 + 1) % 1700);
        if i.is_multiple_of(3) { shared.iter().copied().chain(own).collect() } else { own.collect() }
    };
    let sampling = |i: u32| match i % 2 {
        0 => SamplingParams::greedy(),
        _ => SamplingParams { temperature: 0.9, top_p: Some(0.95), seed: u64::from(i), ..SamplingParams::default() },
    };
    (0..24)
        .map(|i| GenerateRequest { sampling: sampling(i), ..greedy(&prompt(i), 4 + (i as usize * 7) % 30) })
        .collect()
}

async fn one_by_one(client: &Client) -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    for request in requests() {
        all.push(tokens(client, request).await.unwrap().0);
    }
    all
}

async fn at_once(client: &Client) -> Vec<Vec<u32>> {
    let all = join_all(requests().into_iter().map(|request| tokens(client, request))).await;
    all.into_iter().map(|outcome| outcome.unwrap().0).collect()
}

/// What every request gives alone, on a client of its own, so that nothing is reused.
async fn expected() -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    for request in requests() {
        all.push(
            tokens(&local(EngineConfig { kv_bytes: 1 << 30, ..EngineConfig::default() }), request).await.unwrap().0,
        );
    }
    all
}

#[test]
fn a_generation_gives_the_same_tokens_alone_and_in_a_crowd_and_after_others() {
    runtime().block_on(async {
        let expected = expected().await;
        let client = local(EngineConfig::default());
        assert_eq!(at_once(&client).await, expected);
        let after_first = client.engine();
        println!("{after_first:?}");
        assert!(after_first.reused_tokens > 0, "some begin alike");
        let alone: u64 = expected.iter().map(|tokens| tokens.len() as u64).sum();
        assert!(after_first.steps < alone / 2, "they advance together: {} steps for {alone} tokens", after_first.steps);
        assert_eq!(one_by_one(&client).await, expected);
        assert!(client.engine().reused_tokens > after_first.reused_tokens + 90, "all have been here before");
    });
}

#[test]
fn a_crowd_on_the_network_gives_the_tokens_of_one_process_in_shared_frames() {
    runtime().block_on(async {
        let net = Net::halves(&tiny_moe()).await;
        let client = net.client().await;
        let calls = |net: &Net| net.volunteers.iter().map(|volunteer| volunteer.counts().calls).sum::<u64>();
        let before = calls(&net);
        assert_eq!(at_once(&client).await, expected().await);
        let status = client.engine();
        // Two volunteers, six layers; a step may need a retry on a busy machine.
        let passes = status.steps + status.grouped_steps;
        assert!(calls(&net) - before <= passes * 12 * 11 / 10, "one frame per peer, layer and group: {status:?}");
        client.close().await;
    });
}

#[test]
fn sequences_in_two_groups_give_the_tokens_of_one_process() {
    runtime().block_on(async {
        let net = Net::halves(&tiny_moe()).await;
        let config = EngineConfig { drafts: false, ..EngineConfig::default() };
        let client = net.client().await.with_engine(config);
        let requests = || (0..8u32).map(|i| greedy(&[i + 1, 20, 300], 60));
        let found = join_all(requests().map(|request| tokens(&client, request))).await;
        // So many passes are enough to try both ways.
        let status = client.engine();
        assert!(status.grouped_steps > 0 && status.grouped_steps < status.steps, "{status:?}");
        let here = local(config);
        for (found, request) in found.into_iter().zip(requests()) {
            assert_eq!(found.unwrap().0, tokens(&here, request).await.unwrap().0);
        }
        assert_eq!(here.engine().grouped_steps, 0, "nobody is waited for in one process");
        client.close().await;
    });
}

#[test]
fn keys_and_values_that_were_given_up_are_computed_again_and_no_token_changes() {
    runtime().block_on(async {
        // Short prompts are let in together, and then their answers grow. Room for about 400 positions in all.
        let growing = || (0..8u32).map(|i| greedy(&[i + 1, 2, 3], 150));
        let roomy = local(EngineConfig::default());
        let expected: Vec<_> = join_all(growing().map(|request| tokens(&roomy, request))).await;
        // Layers, heads, keys and values, values of each, bytes.
        let position = 6 * 2 * 2 * 32 * 4;
        let client = local(EngineConfig { kv_bytes: 400 * position, ..EngineConfig::default() });
        assert!((350..450).contains(&client.context()), "{}", client.context());
        let found = join_all(growing().map(|request| tokens(&client, request))).await;
        for (found, expected) in found.into_iter().zip(expected) {
            assert_eq!(found.unwrap().0, expected.unwrap().0);
        }
        let status = client.engine();
        println!("{status:?}");
        assert!(status.preemptions > 0, "{status:?}");
        assert!(status.kv_bytes <= 450 * position, "{status:?}");
        let long = tokens(&client, greedy(&[1; 390], 1000)).await.unwrap().0;
        assert_eq!(long.len(), client.context() - 390, "memory bounds the context");
        let refused = tokens(&client, greedy(&[1; 451], 1)).await.unwrap_err();
        assert!(matches!(refused, GenerateError::PromptTooLong { .. }), "{refused}");
    });
}

#[test]
fn who_is_not_waited_for_any_more_leaves_within_a_step_and_too_many_are_refused() {
    runtime().block_on(async {
        let client = local(EngineConfig { max_sequences: 2, max_waiting: 3, ..EngineConfig::default() });
        let mut running: Vec<_> = (0..2).map(|i| client.generate(greedy(&[1 + i, 2, 3], 500))).collect();
        for generation in &mut running {
            generation.next().await.unwrap().unwrap();
        }
        let waiting: Vec<_> = (0..3).map(|i| client.generate(greedy(&[7 + i], 3))).collect();
        let refused = tokens(&client, greedy(&[1], 1)).await.unwrap_err();
        assert!(matches!(refused, GenerateError::Busy { waiting: 3 }), "{refused}");
        drop(running);
        for generation in waiting {
            let all: Vec<_> = generation.collect().await;
            assert!(all.iter().all(Result::is_ok) && all.len() == 3, "{all:?}");
        }
        eventually("nothing runs", || client.engine().running == 0).await;
        assert!(client.engine().tokens < 900, "the dropped ones did not go on: {:?}", client.engine());
    });
}

#[test]
fn a_reader_that_does_not_read_holds_up_nobody() {
    runtime().block_on(async {
        let client = local(EngineConfig::default());
        let unread = client.generate(greedy(&[1, 2, 3], 300));
        eventually("it has filled its queue", || client.engine().tokens >= 60).await;
        assert_eq!(tokens(&client, greedy(&[4, 5], 200)).await.unwrap().0.len(), 200);
        assert!(client.engine().tokens < 300, "it waits: {:?}", client.engine());
        assert_eq!(unread.count().await, 300, "and goes on when it is read");
    });
}

#[test]
fn generations_fail_one_by_one_when_experts_are_gone_and_later_ones_are_served_again() {
    runtime().block_on(async {
        let mut net = Net::halves(&tiny_moe()).await;
        let config = NetworkConfig { replica_patience: Duration::from_millis(300), ..net.config() };
        let client = net.client_with(config).await;
        let mut running: Vec<_> = (0..4).map(|i| client.generate(greedy(&[1 + i, 2, 3], 2000))).collect();
        for generation in &mut running {
            generation.next().await.unwrap().unwrap();
        }
        net.volunteers.pop().unwrap().shutdown().await;
        for generation in running {
            let last = generation.collect::<Vec<_>>().await.pop().unwrap();
            let error = format!("{:?}", last.unwrap_err());
            assert!(error.contains("NoReplica"), "{error}");
        }
        eventually("nothing runs", || client.engine().running == 0).await;
        let [_, odd] = hanse_tests::net::halves(&tiny_moe());
        net.add(&odd).await;
        let missing = || client.network().unwrap().directory().missing().is_empty();
        eventually("all experts are there again", missing).await;
        assert_eq!(tokens(&client, greedy(&[1, 2, 3], 8)).await.unwrap().0.len(), 8);
    });
}

#[test]
fn the_prompts_own_log_probabilities_are_those_of_a_score() {
    runtime().block_on(async {
        let client = local(EngineConfig::default());
        let prompt: Vec<u32> = (0..300).map(|i| (i * 37 + 5) % 1700).collect();
        // Once before, so that there would be something to reuse.
        tokens(&client, greedy(&prompt, 2)).await.unwrap();
        let score = client.score(prompt.clone(), false, |_| ()).await.unwrap();
        let request =
            GenerateRequest { prompt_logprobs: true, top_logprobs: 3, ..GenerateRequest::greedy(prompt.clone(), 0) };
        let mut generation = client.generate(request);
        assert!(generation.next().await.is_none());
        let told = generation.prompt();
        assert_eq!(told.iter().map(|token| token.id).collect::<Vec<_>>(), prompt);
        assert_eq!(told.iter().map(|token| token.logprob).collect::<Vec<_>>(), score.logprobs);
        assert!(told[0].top.is_empty() && told[1..].iter().all(|token| token.top.len() == 3));
    });
}
