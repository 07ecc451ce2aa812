//! What `config.json` says about layers, where no reference case can show it.

mod common;

use common::{fixture, json};
use hanse_model::tensor_shapes;
use serde_json::{Value, json};

/// The layers that have experts, of a case whose config is changed.
fn layers_with_experts(case: &str, change: impl FnOnce(&mut Value)) -> Vec<usize> {
    let mut config = json(&fixture(case).join("config.json"));
    change(&mut config);
    let shapes = tensor_shapes(&config.to_string()).unwrap();
    let gates =
        shapes.iter().filter_map(|(name, _)| name.strip_suffix(".mlp.gate.weight")?.strip_prefix("model.layers."));
    gates.map(|layer| layer.parse().unwrap()).collect()
}

/// As DeepSeek's own modeling code has it; transformers leaves the key out.
#[test]
fn every_moe_layer_freqth_layer_after_the_dense_ones_has_experts() {
    let of = |first: usize, frequency: usize| {
        layers_with_experts("deepseek_v3", |config| {
            config["num_hidden_layers"] = json!(7);
            config["first_k_dense_replace"] = json!(first);
            config["moe_layer_freq"] = json!(frequency);
        })
    };
    assert_eq!(of(1, 1), [1, 2, 3, 4, 5, 6]);
    assert_eq!(of(3, 2), [4, 6]);
    assert_eq!(of(0, 3), [0, 3, 6]);
    assert_eq!(of(9, 1), [0; 0]);
}

#[test]
fn layers_of_ernie_have_experts_from_a_first_to_a_last_one_at_an_interval() {
    let of = |first: i64, last: i64, interval: i64| {
        layers_with_experts("extra/ernie4_5_moe", |config| {
            config["num_hidden_layers"] = json!(8);
            config["moe_layer_start_index"] = json!(first);
            config["moe_layer_end_index"] = json!(last);
            config["moe_layer_interval"] = json!(interval);
        })
    };
    assert_eq!(of(1, -1, 1), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(of(3, 5, 1), [3, 4, 5]);
    assert_eq!(of(2, -1, 2), [3, 5, 7]);
}

#[test]
fn lists_that_say_the_same_for_each_layer_are_one_number() {
    let mut config = json(&fixture("extra/hunyuan_v1_moe").join("config.json"));
    let plain = tensor_shapes(&config.to_string()).unwrap();
    for (key, value) in [("moe_topk", 2), ("num_experts", 6), ("num_shared_expert", 1), ("moe_intermediate_size", 16)] {
        config[key] = json!([value, value, value]);
    }
    assert_eq!(tensor_shapes(&config.to_string()).unwrap(), plain);
}
