//! Files of DeepSeek's models: what makes keys and values in two tensors, keys of two times, layers that predict further tokens.

use safetensors::Dtype;
use serde_json::json;

use super::writer::{Writer, float, number, text};
use super::{import_into, imported, refusal_of_other};
use crate::gguf::architectures;
use crate::gguf::file::Files;

const HEADS: usize = 2;
const RANK: usize = 32;
const KEYS: usize = 32;
const VALUES: usize = 16;

/// A layer of V3's kind as newer converters write it.
pub(super) fn sound() -> Writer {
    let keys = [
        ("feed_forward_length", 64),
        ("attention.head_count", HEADS as u32),
        ("attention.head_count_kv", 1),
        ("attention.q_lora_rank", 16),
        ("attention.kv_lora_rank", RANK as u32),
        ("attention.key_length", 40),
        ("attention.value_length", RANK as u32),
        ("attention.key_length_mla", 40),
        ("attention.value_length_mla", VALUES as u32),
        ("rope.dimension_count", 8),
        ("leading_dense_block_count", 0),
        ("expert_count", 4),
        ("expert_used_count", 2),
        ("expert_group_count", 1),
        ("expert_group_used_count", 1),
        ("expert_gating_func", 2),
        ("expert_feed_forward_length", 32),
        ("expert_shared_count", 1),
    ];
    let layer = [
        ("attn_norm.weight", 0, vec![32]),
        ("ffn_norm.weight", 0, vec![32]),
        ("attn_q_a.weight", 0, vec![32, 16]),
        ("attn_q_a_norm.weight", 0, vec![16]),
        ("attn_q_b.weight", 0, vec![16, 80]),
        ("attn_kv_a_mqa.weight", 0, vec![32, 40]),
        ("attn_kv_a_norm.weight", 0, vec![32]),
        ("attn_k_b.weight", 8, vec![32, 32, 2]),
        ("attn_v_b.weight", 8, vec![32, 16, 2]),
        ("attn_output.weight", 8, vec![32, 32]),
        ("ffn_gate_inp.weight", 0, vec![32, 4]),
        ("exp_probs_b.bias", 0, vec![4]),
        ("ffn_gate_exps.weight", 39, vec![32, 32, 4]),
        ("ffn_up_exps.weight", 8, vec![32, 32, 4]),
        ("ffn_down_exps.weight", 8, vec![32, 32, 4]),
        ("ffn_gate_shexp.weight", 0, vec![32, 32]),
        ("ffn_up_shexp.weight", 0, vec![32, 32]),
        ("ffn_down_shexp.weight", 0, vec![32, 32]),
    ];
    Writer::of("deepseek2", &keys, &layer)
}

fn refusal_of(change: impl FnOnce(&mut Writer)) -> String {
    refusal_of_other(sound(), change)
}

/// Value *i* of the key of a head is in the file at `[head, r, i]`, of its value at `[head, i, r]`.
fn joined(writer: &Writer) -> Vec<f32> {
    let (keys, values) = (writer.values("blk.0.attn_k_b.weight"), writer.values("blk.0.attn_v_b.weight"));
    let head = |head: usize| {
        let (keys, values) = (&keys[head * RANK * KEYS..], &values[head * VALUES * RANK..]);
        let keys = (0..KEYS).flat_map(move |i| (0..RANK).map(move |r| keys[r * KEYS + i]));
        keys.chain(values[..VALUES * RANK].iter().copied())
    };
    (0..HEADS).flat_map(head).collect()
}

#[test]
fn halves_are_joined_however_they_are_stored() {
    let name = "model.layers.0.self_attn.kv_b_proj.weight";
    let mut writer = sound();
    let (config, tensors) = imported(&writer, None);
    assert_eq!(config["model_type"], "deepseek_v3");
    assert_eq!(tensors[name], (Dtype::F16, joined(&writer)));
    // Other matrices stay in their blocks.
    assert!(!tensors.contains_key("model.layers.0.self_attn.o_proj.weight"));
    // What f16 cannot hold for the one it cannot for both.
    writer.remove("blk.0.attn_v_b.weight");
    writer.tensor("blk.0.attn_v_b.weight", &[32, 16, 2]);
    assert_eq!(imported(&writer, None).1[name], (Dtype::F32, joined(&writer)));
}

#[test]
fn halves_that_are_missing_or_of_other_sizes_are_refused() {
    let [keys, values] = ["blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"];
    assert_eq!(refusal_of(|writer| writer.remove(values)), format!("tensor `{values}` is missing"));
    assert_eq!(refusal_of(|writer| writer.remove(keys)), format!("tensor `{keys}` is missing"));
    let neither = |writer: &mut Writer| [keys, values].map(|name| writer.remove(name));
    assert_eq!(refusal_of(|writer| _ = neither(writer)), "tensor `blk.0.attn_kv_b.weight` is missing");
    let all = refusal_of(|writer| writer.tensor("blk.0.attn_kv_b.weight", &[32, 96]));
    assert_eq!(all, format!("tensor `{keys}` is not understood: what it changes is not supported"));
    let other = refusal_of(|writer| writer.named(values).shape = vec![32, 8, 4]);
    assert_eq!(other, format!("tensor `{values}`: it has shape [4, 8, 32], expected [2, 16, 32]"));
    let whole = refusal_of(|writer| {
        neither(writer);
        writer.tensor("blk.0.attn_kv_b.weight", &[32, 64]);
    });
    assert_eq!(whole, "tensor `blk.0.attn_kv_b.weight`: it has shape [64, 32], expected [96, 32]");
}

#[test]
fn keys_that_contradict_each_other_are_refused() {
    let set = |key: &str, value: Vec<u8>| refusal_of(|writer| writer.set(&format!("deepseek2.{key}"), value));
    let without =
        |key: &str| refusal_of(|writer| writer.keys.retain(|(found, _)| found != &format!("deepseek2.{key}")));
    let told = |key: &str, value: u32, reason: &str| {
        assert_eq!(set(key, number(value)), format!("the file's `deepseek2.{key}` is {value}, but {reason}"));
    };
    told("attention.key_length", 41, "here it must be 40");
    told("attention.value_length", 16, "here it must be 32");
    told("attention.head_count_kv", 2, "here it must be 1");
    assert!(
        set("rope.dimension_count", number(9))
            .contains("`deepseek2.attention.key_length` is 40, but here it must be 41")
    );
    let short = set("attention.key_length_mla", number(4));
    assert_eq!(short, "the file's `deepseek2.rope.dimension_count` is 8, but keys have 4 values");
    told("expert_gating_func", 3, "known are 1 (softmax) and 2 (sigmoid)");
    told("nextn_predict_layers", 2, "there are 1 layers");
    for key in ["kv_lora_rank", "value_length_mla"].map(|key| format!("attention.{key}")) {
        assert_eq!(without(&key), format!("the file has no `deepseek2.{key}`"));
    }
    assert_eq!(without("expert_group_used_count"), "the file has no `deepseek2.expert_group_used_count`");
    // Without what is larger with latents, heads are as large as they say.
    assert!(
        without("attention.key_length_mla").contains("`deepseek2.attention.head_count_kv` is 1, but here it must be 2")
    );
    assert!(set("expert_group_count", number(3)).contains("`n_group` is 3"));
    assert!(set("expert_count", number(1 << 20)).contains("`n_routed_experts` is 1048576"));
    assert!(set("attention.kv_lora_rank", number(1 << 30)).contains("attention.key_length` is 40"));
    assert!(set("attention.temperature_scale", float(0.1)).contains("is not understood"));
    let yarn = |multiplier: Option<f32>| {
        refusal_of(|writer| {
            writer.set("deepseek2.rope.scaling.type", text("yarn"));
            writer.set("deepseek2.rope.scaling.factor", float(40.0));
            writer.set("deepseek2.rope.scaling.original_context_length", number(16));
            if let Some(value) = multiplier {
                writer.set("deepseek2.rope.scaling.yarn_log_multiplier", float(value));
            }
        })
    };
    let needed = "with yarn this architecture needs one above 0";
    let key = "the file's `deepseek2.rope.scaling.yarn_log_multiplier` is";
    assert_eq!(yarn(None), format!("{key} absent, but {needed}"));
    assert_eq!(yarn(Some(0.0)), format!("{key} 0, but {needed}"));
}

#[test]
fn a_model_is_of_the_version_that_its_scores_say() {
    let softmax = |writer: &mut Writer| {
        writer.set("deepseek2.expert_gating_func", number(1));
        writer.remove("blk.0.exp_probs_b.bias");
    };
    let mut writer = sound();
    softmax(&mut writer);
    let (config, _) = imported(&writer, None);
    assert_eq!((&config["model_type"], &config["topk_method"]), (&json!("deepseek_v2"), &json!("greedy")));
    // As files were before there was a key.
    writer.keys.retain(|(key, _)| key != "deepseek2.expert_gating_func");
    assert_eq!(imported(&writer, None).0, config);
    writer.set("deepseek2.expert_group_count", number(2));
    assert_eq!(imported(&writer, None).0["topk_method"], "group_limited_greedy");
    let told = refusal_of(|writer| writer.set("deepseek2.expert_gating_func", number(1)));
    assert_eq!(told, "tensor `blk.0.exp_probs_b.bias` is not understood: what it changes is not supported");
    assert_eq!(
        refusal_of(|writer| writer.remove("blk.0.exp_probs_b.bias")),
        "tensor `blk.0.exp_probs_b.bias` is missing"
    );
    let renormalised = refusal_of(|writer| {
        softmax(writer);
        writer.set("deepseek2.expert_weights_norm", [&7u32.to_le_bytes()[..], &[1]].concat());
    });
    assert!(renormalised.ends_with("is true, but with softmax weights are not renormalised"), "{renormalised}");
}

#[test]
fn groups_that_older_files_do_not_say_are_those_of_the_published_models() {
    let groups = |hidden: u32, experts: u32, chosen: u32| {
        let mut writer = sound();
        writer.keys.retain(|(key, _)| !key.starts_with("deepseek2.expert_group"));
        let sizes = [("embedding_length", hidden), ("expert_count", experts), ("expert_used_count", chosen)];
        for (key, value) in sizes {
            writer.set(&format!("deepseek2.{key}"), number(value));
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gguf");
        std::fs::write(&path, writer.bytes()).unwrap();
        let files = Files::open(&path).unwrap();
        let config = architectures::read(&files.parse().unwrap()).unwrap().config;
        ["n_group", "topk_group"].map(|key| config[key].as_u64().unwrap())
    };
    assert_eq!(groups(7168, 256, 8), [8, 4], "V3");
    assert_eq!(groups(5120, 160, 6), [8, 3], "V2");
    assert_eq!(groups(2048, 64, 6), [1, 1], "V2-Lite");
    assert_eq!(groups(7168, 384, 8), [1, 1], "Kimi K2");
}

#[test]
fn layers_that_predict_further_tokens_are_left_out() {
    let mut writer = sound();
    let (config, tensors) = imported(&writer, None);
    writer.set("deepseek2.block_count", number(2));
    writer.set("deepseek2.nextn_predict_layers", number(1));
    writer.tensor("blk.1.attn_norm.weight", &[32]);
    writer.tensor("blk.1.nextn.eh_proj.weight", &[64, 32]);
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(import_into(&folder, &writer.bytes(), None).1.unwrap().left_out, 2);
    assert!(imported(&writer, None) == (config, tensors));
    let beyond = refusal_of_other(writer.clone(), |writer| writer.tensor("blk.2.nextn.eh_proj.weight", &[64, 32]));
    assert_eq!(beyond, "tensor `blk.2.nextn.eh_proj.weight` is not understood: what it changes is not supported");
    let unsaid = refusal_of_other(writer, |writer| writer.set("deepseek2.nextn_predict_layers", number(0)));
    assert_eq!(unsaid, "tensor `blk.1.ffn_norm.weight` is missing");
}
