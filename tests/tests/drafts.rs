//! Drafts: fewer round trips, and the tokens of decoding without them.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use hanse_model::{Checkpoint, SamplingParams, Tokenizer, compute_pool};
use hanse_protocol::Combine;
use hanse_router::{Client, EngineConfig, GenerateRequest, NetworkConfig, Resident, Summary, Token};
use hanse_tests::net::{Net, greedy, model_config, runtime, tokens};
use hanse_tests::reference::tiny_moe;

fn local(drafts: bool) -> Client {
    let config = EngineConfig { drafts, ..EngineConfig::default() };
    Client::local(&model_config(&tiny_moe())).unwrap().with_engine(config)
}

/// A story and the beginning of another one, which goes on much as the first does.
const STORY: &str = "One day in autumn, Max was playing with a golden hat inside. Suddenly there was a loud crash. The hat had hit his \
     grandmother's mirror, and the mirror broke into three pieces. Max was frightened. \"What now?\" he thought. \"I could hide the \
     pieces.\" Pebble, his friend the boy, looked at him. \"You will feel better if you tell the truth,\" said Pebble.\nAll through \
     supper Max could not eat. At last he went to his mother and said, \"It was me. I broke your mirror. I am very sorry.\"\nHis mother \
     was silent for a moment. Then she said, \"Thank you for telling me. A mirror can be mended.\" One day in autumn, Max was playing \
     with a golden hat inside. Suddenly there was a loud crash.";

fn repeating() -> Vec<u32> {
    Tokenizer::load(&tiny_moe()).unwrap().encode(STORY, true).unwrap()
}

/// Greedy and drawn, alike and not.
fn requests() -> Vec<GenerateRequest> {
    let sampling = |i: u64| match i % 3 {
        0 => SamplingParams::greedy(),
        1 => SamplingParams { temperature: 0.7, top_p: Some(0.9), seed: i, ..SamplingParams::default() },
        _ => SamplingParams { temperature: 0.3, frequency_penalty: 0.3, seed: i, ..SamplingParams::default() },
    };
    (0..12)
        .map(|i| {
            let prompt = if i % 2 == 0 { repeating() } else { vec![1 + i as u32, 2, 3, 1 + i as u32, 2] };
            GenerateRequest { sampling: sampling(i), top_logprobs: 2, ..greedy(&prompt, 20 + 7 * i as usize) }
        })
        .collect()
}

/// Few of each kind: a network in one process is slow on a busy machine.
fn few() -> Vec<GenerateRequest> {
    requests().into_iter().take(4).map(|request| GenerateRequest { max_tokens: 24, ..request }).collect()
}

async fn whole(client: &Client, request: GenerateRequest) -> (Vec<Token>, Summary) {
    let mut generation = client.generate(request);
    let mut tokens = Vec::new();
    while let Some(token) = generation.next().await {
        tokens.push(token.unwrap());
    }
    (tokens, generation.summary().unwrap().clone())
}

#[test]
fn a_crowd_with_drafts_gets_what_each_gets_alone_without() {
    runtime().block_on(async {
        let (plain, drafted) = (local(false), local(true));
        let mut expected = Vec::new();
        for request in requests() {
            expected.push(whole(&plain, request).await);
        }
        assert_eq!(plain.engine().drafted, 0);
        let crowd = join_all(requests().into_iter().map(|request| whole(&drafted, request))).await;
        let mut alone = Vec::new();
        for request in requests() {
            alone.push(whole(&drafted, request).await);
        }
        for found in [crowd, alone] {
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(found.0, expected.0);
                assert_eq!(found.1.finish_reason, expected.1.finish_reason);
                assert_eq!(found.1.rest, expected.1.rest);
            }
        }
        println!("{:?}", drafted.engine());
    });
}

#[test]
fn text_that_repeats_takes_fewer_round_trips_over_a_network_and_none_of_its_tokens_changes() {
    runtime().block_on(async {
        let net = Net::halves(&tiny_moe()).await;
        let client = net.client().await;
        let request = greedy(&repeating(), 60);
        let (expected, before) = whole(&local(false), request.clone()).await;
        assert_eq!(before.timings.decode_steps, 59);
        // It learns what steps take; on a busy machine rows can seem to cost more than round trips for a while.
        let mut accepted = 0;
        for _ in 0..20 {
            let (found, summary) = whole(&client, request.clone()).await;
            println!("{summary:?}");
            assert_eq!(found, expected);
            assert_eq!(summary.timings.decode_tokens, 59);
            assert_eq!(summary.drafts.decode_round_trips, 6 * summary.timings.decode_steps as u64);
            accepted = summary.drafts.accepted;
            if accepted > 10 {
                break;
            }
        }
        assert!(accepted > 10, "of 20 generations of text that repeats none was drafted");
        client.close().await;
    });
}

#[test]
fn a_draft_model_of_the_same_tokens_drafts_and_another_one_is_refused() {
    runtime().block_on(async {
        let itself = Checkpoint::open(&tiny_moe()).unwrap();
        let net = Net::halves(&tiny_moe()).await;
        let client = net.client().await.with_draft_model(&itself).unwrap();
        let plain = local(false);
        // A busy machine may make it seem dear for a while.
        for _ in 0..10 {
            for request in few() {
                let (expected, _) = whole(&plain, request.clone()).await;
                let (found, summary) = whole(&client, request).await;
                assert_eq!(found, expected);
                println!("{:?}", summary.drafts);
            }
            if client.engine().accepted > 0 {
                break;
            }
        }
        assert!(client.engine().accepted > 0, "{:?}", client.engine());
        let other = Checkpoint::open(&hanse_tests::reference::fixtures()[0]).unwrap();
        let refused = client.with_draft_model(&other).unwrap_err();
        assert!(refused.to_string().contains("another vocabulary"), "{refused}");
    });
}

#[test]
fn a_draft_that_needs_what_nobody_hosts_fails_nothing_that_would_not_fail_without_it() {
    runtime().block_on(async {
        let mut net = Net::halves(&tiny_moe()).await;
        let config = NetworkConfig { replica_patience: Duration::from_millis(200), ..net.config() };
        let client = net.client_with(config).await;
        let request = greedy(&repeating(), 60);
        whole(&client, request.clone()).await;
        net.volunteers.pop().unwrap().shutdown().await;
        let error = tokens(&client, request).await.unwrap_err().to_string();
        assert!(error.contains("layer"), "{error}");
        let [_, odd] = hanse_tests::net::halves(&tiny_moe());
        net.add(&odd).await;
        hanse_tests::net::eventually("all experts are there again", || {
            client.network().unwrap().directory().missing().is_empty()
        })
        .await;
        let (found, _) = whole(&client, greedy(&repeating(), 40)).await;
        assert_eq!(found, whole(&local(false), greedy(&repeating(), 40)).await.0);
    });
}

/// Experts of the bundled model that take a share of their bytes.
fn resident(percent: u64) -> Arc<Resident> {
    let checkpoint = Checkpoint::open(&tiny_moe()).unwrap();
    let budget = checkpoint.sizes().expert_bytes * percent / 100;
    let resident = Resident::load(checkpoint, Arc::new(compute_pool(1).unwrap()), budget).unwrap();
    assert!(resident.bytes() <= budget && resident.count() as u64 == 96 * percent / 100);
    Arc::new(resident)
}

#[test]
fn experts_that_are_held_here_draft_and_are_asked_of_nobody_and_no_bit_changes() {
    runtime().block_on(async {
        let net = Net::halves(&tiny_moe()).await;
        let plain = local(false);
        for percent in [25, 100] {
            let held = resident(percent);
            let client = net.client_with(NetworkConfig { resident: Some(held.clone()), ..net.config() }).await;
            for _ in 0..10 {
                for request in few() {
                    assert_eq!(whole(&client, request.clone()).await.0, whole(&plain, request).await.0);
                }
                if client.engine().drafted > 0 {
                    break;
                }
            }
            let status = client.engine();
            println!("{percent} %: {status:?}");
            assert!(status.drafted > 0 && status.network.resident > 0, "{status:?}");
            if percent == 100 {
                assert_eq!((status.network.round_trips, status.network.frames), (0, 0), "nobody is asked");
            }
            // What is held has followed what was chosen, and is no more than before.
            assert_eq!(held.count() as u64, 96 * percent / 100);
            let tokens = repeating();
            let [score, expected] = [&client, &plain].map(|client| client.score(tokens.clone(), true, |_| ()));
            let (score, expected) = (score.await.unwrap(), expected.await.unwrap());
            let bits = |logits: Option<Vec<f32>>| logits.unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>();
            assert_eq!(bits(score.logits), bits(expected.logits));
            client.close().await;
        }
    });
}

#[test]
fn peers_that_add_up_are_asked_for_all_of_a_rows_experts() {
    runtime().block_on(async {
        let net = Net::halves(&tiny_moe()).await;
        let config = |resident| NetworkConfig { combine: Some(Combine::Peer), resident, ..net.config() };
        let (without, with) = (net.client_with(config(None)).await, net.client_with(config(Some(resident(50)))).await);
        for request in few() {
            assert_eq!(whole(&with, request.clone()).await.0, whole(&without, request).await.0);
        }
        assert_eq!(with.engine().network.resident, 0);
    });
}

#[test]
fn a_multi_token_prediction_head_drafts_over_a_network_and_no_token_changes() {
    runtime().block_on(async {
        for name in ["agreeing", "deepseek_v3", "glm4_moe"] {
            let dir = hanse_tests::reference::fixture("mtp").join(name);
            let net = Net::halves(&dir).await;
            let client = net.client().await.with_draft_head().unwrap();
            let config = EngineConfig { drafts: false, ..EngineConfig::default() };
            let plain = Client::local(&model_config(&dir)).unwrap().with_engine(config);
            assert!(client.context() <= plain.context());
            // What is kept of an earlier one has hidden states too.
            let beginning: Vec<u32> = (40..70).collect();
            // Mostly temperatures at which text repeats nothing, so that nothing else drafts.
            let request = |seed: u64| GenerateRequest {
                sampling: SamplingParams { temperature: (seed % 3) as f32 / 2.0, seed, ..SamplingParams::default() },
                ..greedy(&[&beginning[..], &[2 + seed as u32 % 50, 3]].concat(), 60)
            };
            let (mut drafted, mut accepted) = (0, 0);
            for seed in 0..40 {
                let requests = [request(2 * seed), request(2 * seed + 1)];
                let found = join_all(requests.clone().into_iter().map(|request| whole(&client, request))).await;
                for (request, (tokens, summary)) in requests.into_iter().zip(found) {
                    assert_eq!(tokens, whole(&plain, request).await.0, "{name}");
                    drafted += summary.drafts.drafted;
                    accepted += summary.drafts.accepted;
                }
                // A busy machine may make it seem dear for a while.
                if seed >= 5 && (name != "agreeing" || accepted > 200) {
                    break;
                }
            }
            println!("{name}: {accepted} of {drafted}, {:?}", client.engine());
            assert!(client.engine().reused_tokens > 0);
            if name == "agreeing" {
                // Some were guessed by what the text repeats.
                assert!(accepted > 200 && accepted * 4 > drafted * 3, "{accepted} of {drafted}");
            }
            client.close().await;
        }
        let error = local(true).with_draft_head().unwrap_err().to_string();
        assert!(error.contains("no multi-token-prediction head"), "{error}");
    });
}
