//! Many clients at once: bits and tokens do not depend on who else is served.

use futures::future::join_all;
use hanse_model::{Experts, LocalExperts, Routing, compute_pool};
use hanse_protocol::{Combine, WireDtype};
use hanse_router::{Client, NetworkConfig, Usage};
use hanse_tests::cases::tiny_moe_case;
use hanse_tests::net::{Net, greedy, model_config, runtime, tokens};
use hanse_tests::reference::{bits, tiny_moe};

#[test]
fn eight_generations_at_once_give_the_tokens_of_one_process() {
    runtime().block_on(async {
        let net = Net::halves(&tiny_moe()).await;
        let local = Client::local(&model_config(&tiny_moe())).unwrap();
        let clients = join_all((0..4).map(|_| net.client())).await;
        let prompts: Vec<Vec<u32>> = tiny_moe_case().prompts.into_iter().map(|prompt| prompt.input).collect();
        // Two generations for each client, which share its connections; eight different prompts.
        let prompt = |i: usize| [&prompts[i % 3][..], &prompts[i / 3][..3]].concat();
        let running = (0..8).map(|i| tokens(&clients[i / 2], greedy(&prompt(i), 40)));
        let found = join_all(running).await;
        for (i, found) in found.into_iter().enumerate() {
            let (expected, _) = tokens(&local, greedy(&prompt(i), 40)).await.unwrap();
            assert_eq!(found.unwrap().0, expected, "generation {i}");
        }
    });
}

fn noise(count: usize, mut state: u32) -> Vec<f32> {
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Rows with two experts each of 16, so that rows of different requests meet at the same experts.
fn routing(rows: usize, shift: usize) -> Routing {
    let pairs: Vec<[u32; 2]> = (0..rows).map(|row| ((row + shift) % 15) as u32).map(|e| [e, e + 1]).collect();
    let weights = noise(2 * rows, shift as u32).iter().map(|value| value.abs()).collect();
    Routing { top_k: 2, experts: pairs.concat(), weights }
}

#[test]
fn rows_sent_alone_and_beside_other_clients_rows_have_the_same_bits() {
    const LAYER: usize = 3;
    let runtime = runtime();
    runtime.block_on(async {
        let net = Net::halves(&tiny_moe()).await;
        let checkpoint = hanse_model::Checkpoint::open(&tiny_moe()).unwrap();
        let width = checkpoint.spec().hidden_size;
        let mut local = LocalExperts::load(&checkpoint, compute_pool(1).unwrap().into()).unwrap();
        for (wire, combine) in
            [(WireDtype::F32, Combine::Client), (WireDtype::F32, Combine::Peer), (WireDtype::F16, Combine::Peer)]
        {
            let config = || NetworkConfig { wire, combine: Some(combine), ..net.config() };
            let clients = join_all((0..3).map(|_| net.client_with(config()))).await;
            let networks: Vec<_> = clients.iter().map(|client| client.network().unwrap().clone()).collect();
            let requests: Vec<(Vec<f32>, Routing)> =
                (0..24).map(|i| (noise((1 + i % 5) * width, i as u32), routing(1 + i % 5, i))).collect();
            let send = async |i: usize| {
                let (hidden, routing) = &requests[i];
                let mut usage = Usage::default();
                networks[i % 3].forward(LAYER as u32, hidden, routing, &mut usage).await.unwrap()
            };
            let mut alone = Vec::new();
            for i in 0..requests.len() {
                alone.push(bits(&send(i).await));
            }
            // A large request keeps the volunteers busy, so that those behind it wait and are joined.
            let (large, large_routing) = (noise(500 * width, 99), routing(500, 0));
            let mut usage = Usage::default();
            let busy = networks[0].forward(LAYER as u32, &large, &large_routing, &mut usage);
            let (large_found, together) = tokio::join!(busy, join_all((0..requests.len()).map(send)));
            for (i, (together, alone)) in together.iter().zip(&alone).enumerate() {
                assert!(bits(together) == *alone, "{wire} {combine:?}: request {i}");
            }
            if combine == Combine::Client {
                let expected = local.forward(LAYER, &large, &large_routing).unwrap();
                assert!(bits(&large_found.unwrap()) == bits(&expected), "the large request");
                for ((hidden, routing), alone) in requests.iter().zip(&alone) {
                    assert!(bits(&local.forward(LAYER, hidden, routing).unwrap()) == *alone, "as in one process");
                }
            }
        }
    });
}
