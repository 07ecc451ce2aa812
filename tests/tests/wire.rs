//! What fewer bytes on the wire cost: drift of logits, divergence of the next token's distribution, perplexity, greedy tokens.

use hanse_model::log_softmax_at;
use hanse_protocol::{Combine, WireDtype};
use hanse_router::{Client, NetworkConfig, NetworkUse, RemoteExperts};
use hanse_tests::cases::{std_of, tiny_moe_case};
use hanse_tests::net::{Net, greedy, model_config, runtime, tokens};
use hanse_tests::reference::{Local, Model, argmax, bits, fixture, largest_difference, tiny_moe};
use tokio_util::sync::CancellationToken;

/// What is accepted on the page: root of the mean squared difference of logits, in standard deviations; relative difference of
/// perplexity; Kullback-Leibler divergence of the next token's distribution from that in one process, mean over positions, in nats. About
/// four times what was measured.
///
/// A value in f16 has 11 significant bits, one in bf16 has 8, one in int8 at most 7 and fewer if its block has larger ones. Where a gate has two experts almost equal, the rounding may
/// choose the other one, which moves the logits of that row much more than the rounding itself; so the largest difference
/// is a matter of luck and the mean is not.
fn accepted(wire: WireDtype) -> (f32, f64, f64) {
    match wire {
        // Only the order of additions differs, and with two experts a row not even that.
        WireDtype::F32 => (1e-5, 1e-6, 1e-9),
        WireDtype::F16 => (0.01, 1e-3, 1e-4),
        WireDtype::Bf16 => (0.1, 0.015, 7e-3),
        WireDtype::Int8 => (0.1, 0.01, 1.4e-2),
    }
}

/// The best logit and how far the second best is below it.
fn best_and_margin(logits: &[f32]) -> (u32, f32) {
    let best = argmax(logits);
    let others = logits.iter().enumerate().filter(|(id, _)| *id != best as usize);
    (best, logits[best as usize] - others.map(|(_, logit)| *logit).fold(f32::NEG_INFINITY, f32::max))
}

fn perplexity(logits: &[f32], tokens: &[u32]) -> f64 {
    let vocab = logits.len() / tokens.len();
    let logprobs: Vec<f64> =
        logits.chunks(vocab).zip(&tokens[1..]).map(|(row, next)| f64::from(log_softmax_at(row, *next))).collect();
    (-logprobs.iter().sum::<f64>() / logprobs.len() as f64).exp()
}

/// The mean over positions of how far the distribution of the next token is from that of the reference, in nats.
fn divergence(reference: &[f32], logits: &[f32], vocab: usize) -> f64 {
    let log_softmax = |row: &[f32]| -> Vec<f64> {
        let top = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = row.iter().map(|logit| (f64::from(*logit) - top).exp()).sum();
        row.iter().map(|logit| f64::from(*logit) - top - sum.ln()).collect()
    };
    let of_position = |(p, q): (&[f32], &[f32])| -> f64 {
        log_softmax(p).iter().zip(log_softmax(q)).map(|(p, q)| p.exp() * (p - q)).sum()
    };
    let positions = reference.len() / vocab;
    reference.chunks(vocab).zip(logits.chunks(vocab)).map(of_position).sum::<f64>() / positions as f64
}

fn rms(a: &[f32], b: &[f32]) -> f32 {
    (a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / a.len() as f64).sqrt() as f32
}

/// The page over the network: logits, chosen experts by layer, and cost.
fn over_the_network(
    runtime: &tokio::runtime::Runtime,
    client: &Client,
    page: &[u32],
) -> (Vec<f32>, Vec<Vec<u32>>, NetworkUse) {
    let network = client.network().unwrap().clone();
    let remote = RemoteExperts::new(network, runtime.handle().clone(), CancellationToken::new());
    let mut model = Model::with_experts(&tiny_moe(), 1, |_, _| remote);
    let logits = model.prefill(page);
    let experts = model.experts.routings.into_iter().map(|(_, routing)| routing.experts).collect();
    (logits, experts, model.experts.inner.usage())
}

#[test]
fn greedy_tokens_differ_only_where_the_margin_is_smaller_than_the_drift() {
    let runtime = runtime();
    let case = tiny_moe_case();
    let net = runtime.block_on(Net::halves(&tiny_moe()));
    let local = Client::local(&model_config(&tiny_moe())).unwrap();
    let page = std::fs::read_to_string(fixture("page.txt")).unwrap();
    let page = local.tokenizer().unwrap().encode(&page, true).unwrap();
    let vocab = local.spec().vocab_size;
    let mut here = Local::open(&tiny_moe());
    let reference = here.prefill(&page);
    let chosen: Vec<Vec<u32>> = here.experts.routings.drain(..).map(|(_, routing)| routing.experts).collect();
    let here_perplexity = perplexity(&reference, &page);
    let std = std_of(&reference);
    println!("page of {} tokens, perplexity {here_perplexity:.4} in one process, logits' std {std:.3}", page.len());
    for wire in WireDtype::ALL {
        for combine in [Combine::Client, Combine::Peer] {
            let what = format!("{wire} added up at the {combine:?}");
            let config = NetworkConfig { wire, combine: Some(combine), ..net.config() };
            let client = runtime.block_on(net.client_with(config));
            let (logits, experts, used) = over_the_network(&runtime, &client, &page);
            let drift = largest_difference(&logits, &reference);
            let rms_in_std = rms(&logits, &reference) / std;
            let there_perplexity = perplexity(&logits, &page);
            let ratio = there_perplexity / here_perplexity - 1.0;
            let kl = divergence(&reference, &logits, vocab);
            let other_experts: usize =
                experts.iter().zip(&chosen).map(|(a, b)| a.iter().zip(b).filter(|(a, b)| a != b).count()).sum();
            let mut other_tokens = 0;
            for (found, expected) in logits.chunks(vocab).zip(reference.chunks(vocab)) {
                let (best, margin) = best_and_margin(expected);
                if argmax(found) != best {
                    other_tokens += 1;
                    // The drift of this very position.
                    let drift = largest_difference(found, expected);
                    assert!(margin < drift, "{what}: another token at a margin of {margin}, drift {drift}");
                }
            }
            println!(
                "{what}: drift at most {:.2e} std, rms {rms_in_std:.2e} std, KL {kl:.1e} nats, \
                 perplexity {there_perplexity:.4} ({ratio:+.1e}), {other_experts} of {} chosen experts and {other_tokens} best tokens differ, {} KiB",
                drift / std,
                chosen.iter().map(Vec::len).sum::<usize>(),
                (used.bytes_sent + used.bytes_received) >> 10,
            );
            let (most_rms, most_ratio, most_kl) = accepted(wire);
            assert!(rms_in_std <= most_rms, "{what}: rms drift of {rms_in_std} std");
            assert!((-1e-12..=most_kl).contains(&kl), "{what}: the next token's distribution diverges by {kl} nats");
            assert!(ratio.abs() <= most_ratio, "{what}: perplexity changed by {ratio}");
            if (wire, combine) == (WireDtype::F32, Combine::Client) {
                assert!(bits(&logits) == bits(&reference), "f32 added up at the client is exact");
            }
            for prompt in &case.prompts {
                let request = greedy(&prompt.input, prompt.greedy.len());
                let (found, _) = runtime.block_on(tokens(&client, request)).unwrap();
                let Some(first) = (0..found.len()).find(|&i| found[i] != prompt.greedy[i]) else { continue };
                let text = [&prompt.input, &prompt.greedy[..first]].concat();
                let last = |logits: Vec<f32>| logits[logits.len() - vocab..].to_vec();
                let expected = last(here.prefill(&text));
                let (best, margin) = best_and_margin(&expected);
                assert_eq!(best, prompt.greedy[first]);
                let drift = largest_difference(&last(over_the_network(&runtime, &client, &text).0), &expected);
                println!("{what}: token {first} of an answer differs at a margin of {:.2e} std", margin / std);
                assert!(margin < drift, "{what}: margin {margin}, drift {drift}");
            }
        }
    }
}
