//! The gateway before a network whose volunteers die.

use futures::future::join_all;
use hanse_model::SamplingParams;
use hanse_router::gateway::GatewayConfig;
use hanse_tests::net::{Net, eventually, halves, runtime};
use hanse_tests::reference::tiny_moe;
use hanse_tests::served::{before, ordinary};
use serde_json::{Value, json};

#[test]
fn two_hundred_streams_are_the_same_when_a_volunteer_dies_in_their_middle() {
    const TOKENS: usize = 48;
    runtime().block_on(async {
        let [even, odd] = halves(&tiny_moe());
        let mut net = Net::start(&tiny_moe(), &[&even, &odd, &even, &odd]).await;
        let client = net.client().await;
        let served = before(client.clone(), GatewayConfig::new("tiny-moe")).await;
        let prompts: Vec<String> = (0..200).map(|i| format!("Once upon a time, fox number {i}")).collect();
        let asked = prompts.iter().enumerate().map(|(seed, prompt)| {
            let body = json!({ "model": "tiny-moe", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0.9, "seed": seed,
                "stream": true });
            let served = &served;
            async move { served.stream("/v1/completions", &body).await }
        });
        let dies = async {
            eventually("they are in their middle", || client.engine().tokens > 200 * TOKENS as u64 / 4).await;
            // The last one, since others joined through the first.
            drop(net.volunteers.pop());
            client.engine().tokens
        };
        let (answers, at) = tokio::join!(join_all(asked), dies);
        assert!(at < 200 * TOKENS as u64 * 3 / 4, "it died after {at} tokens");
        let local = ordinary().await;
        for (seed, (prompt, events)) in prompts.iter().zip(&answers).enumerate() {
            assert_eq!(events.last().unwrap(), "[DONE]");
            let chunks = events[..events.len() - 1].iter().map(|event| serde_json::from_str::<Value>(event).unwrap());
            let text: String = chunks.map(|chunk| chunk["choices"][0]["text"].as_str().unwrap().to_owned()).collect();
            let sampling = SamplingParams { temperature: 0.9, seed: seed as u64, ..SamplingParams::default() };
            assert_eq!(text, local.text(prompt, TOKENS, sampling).await, "{prompt}");
        }
        client.close().await;
    });
}
