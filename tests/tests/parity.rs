//! The reference cases with every expert on the network: two volunteers found through the DHT, f32 on the wire.

use std::collections::BTreeSet;

use hanse_router::{Client, RemoteExperts};
use hanse_tests::cases::{Case, DENSE_FAMILIES, MOE_FAMILIES, cases_of, family_of, tiny_moe_case};
use hanse_tests::net::{Net, greedy, model_config, runtime, tokens};
use hanse_tests::reference::{Model, bits, dense, fixtures, largest_difference};
use tokio_util::sync::CancellationToken;

/// The reference's own noise is below 2e-5 of the standard deviation; a mechanism done wrong moves logits by 1e-3 and more.
const LOGIT_TOLERANCE: f32 = 1e-4;
const WEIGHT_TOLERANCE: f32 = 1e-4;

fn check(case: &Case) {
    let name = &case.name;
    let runtime = runtime();
    let net = runtime.block_on(Net::halves(&case.dir));
    let client = runtime.block_on(net.client());
    assert_eq!(client.peers().len(), 2, "{name}: both found from one address");
    let network = client.network().unwrap().clone();
    let remote = RemoteExperts::new(network, runtime.handle().clone(), CancellationToken::new());
    let mut model = Model::with_experts(&case.dir, 1, |_, _| remote);
    let local = Client::local(&model_config(&case.dir)).unwrap();
    let (mut worst_logit, mut worst_weight) = (0f32, 0f32);
    for (n, prompt) in case.prompts.iter().enumerate() {
        model.experts.routings.clear();
        let logits = model.prefill(&prompt.input);
        worst_logit = worst_logit.max(largest_difference(&logits, &prompt.logits) / case.logit_std);
        let layers: Vec<usize> = model.experts.routings.iter().map(|(layer, _)| *layer).collect();
        assert_eq!(layers, prompt.experts.keys().copied().collect::<Vec<_>>(), "{name} p{n}: MoE layers");
        for (layer, routing) in &model.experts.routings {
            assert_eq!(routing.experts, prompt.experts[layer], "{name} p{n} layer {layer}: chosen experts");
            if let Some(weights) = prompt.weights.get(layer) {
                worst_weight = worst_weight.max(largest_difference(&routing.weights, weights));
            }
        }
        let here = runtime.block_on(local.score(prompt.input.clone(), true, |_| ())).unwrap().logits.unwrap();
        assert!(bits(&logits) == bits(&here), "{name} p{n}: the network gives the bits of one process");
        let request = greedy(&prompt.input, prompt.greedy.len());
        let (generated, _) = runtime.block_on(tokens(&client, request)).unwrap();
        assert_eq!(generated, prompt.greedy, "{name} p{n}: greedy tokens with the cache");
    }
    let used = net.volunteers.iter().all(|volunteer| volunteer.counts().pairs > 0);
    assert!(used, "{name}: both volunteers computed");
    println!("{name:32} logits {worst_logit:.2e} std, gate weights {worst_weight:.2e}");
    assert!(worst_logit <= LOGIT_TOLERANCE, "{name}: logits differ by {worst_logit} std");
    assert!(worst_weight <= WEIGHT_TOLERANCE, "{name}: gate weights differ by {worst_weight}");
}

fn check_family(family: &str) {
    let cases = cases_of(family);
    assert!(!cases.is_empty(), "{family} has cases");
    cases.iter().for_each(check);
}

#[test]
fn deepseek_v2_over_the_network_is_the_reference() {
    check_family("deepseek_v2");
}

#[test]
fn deepseek_v3_over_the_network_is_the_reference() {
    check_family("deepseek_v3");
}

#[test]
fn deepseek_v32_over_the_network_is_the_reference() {
    check_family("deepseek_v32");
}

#[test]
fn dots1_over_the_network_is_the_reference() {
    check_family("dots1");
}

#[test]
fn ernie4_5_moe_over_the_network_is_the_reference() {
    check_family("ernie4_5_moe");
}

#[test]
fn glm4_moe_over_the_network_is_the_reference() {
    check_family("glm4_moe");
}

#[test]
fn glm4_moe_lite_over_the_network_is_the_reference() {
    check_family("glm4_moe_lite");
}

#[test]
fn gpt_oss_over_the_network_is_the_reference() {
    check_family("gpt_oss");
}

#[test]
fn granitemoe_over_the_network_is_the_reference() {
    check_family("granitemoe");
}

#[test]
fn granitemoeshared_over_the_network_is_the_reference() {
    check_family("granitemoeshared");
}

#[test]
fn hunyuan_v1_moe_over_the_network_is_the_reference() {
    check_family("hunyuan_v1_moe");
}

#[test]
fn kimi_k2_over_the_network_is_the_reference() {
    check_family("kimi_k2");
}

#[test]
fn minimax_m2_over_the_network_is_the_reference() {
    check_family("minimax_m2");
}

#[test]
fn mixtral_over_the_network_is_the_reference() {
    check_family("mixtral");
}

#[test]
fn olmoe_over_the_network_is_the_reference() {
    check_family("olmoe");
}

#[test]
fn qwen2_moe_over_the_network_is_the_reference() {
    check_family("qwen2_moe");
}

#[test]
fn qwen3_moe_over_the_network_is_the_reference() {
    check_family("qwen3_moe");
}

#[test]
fn the_bundled_model_over_the_network_is_the_reference() {
    check(&tiny_moe_case());
}

/// Dense models ask nobody.
#[test]
fn dense_families_in_one_process_are_the_reference() {
    let runtime = runtime();
    for case in DENSE_FAMILIES.into_iter().flat_map(cases_of) {
        let name = &case.name;
        let local = Client::local(&model_config(&case.dir)).unwrap();
        for (n, prompt) in case.prompts.iter().enumerate() {
            let logits = runtime.block_on(local.score(prompt.input.clone(), true, |_| ())).unwrap().logits.unwrap();
            let difference = largest_difference(&logits, &prompt.logits) / case.logit_std;
            assert!(difference <= LOGIT_TOLERANCE, "{name} p{n}: logits differ by {difference} std");
            let request = greedy(&prompt.input, prompt.greedy.len());
            let (generated, _) = runtime.block_on(tokens(&local, request)).unwrap();
            assert_eq!(generated, prompt.greedy, "{name} p{n}: greedy tokens");
        }
    }
}

#[test]
fn every_family_has_reference_cases() {
    let families: BTreeSet<&str> = fixtures().iter().chain(&dense()).map(|dir| family_of(dir)).collect();
    assert_eq!(families, MOE_FAMILIES.into_iter().chain(DENSE_FAMILIES).collect());
    assert_eq!(hanse_model::known_families().split(", ").collect::<BTreeSet<_>>(), families);
}
