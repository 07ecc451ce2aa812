//! Files of gpt-oss: experts in MXFP4 and in other blocks, with biases.

use safetensors::Dtype;

use super::writer::{Writer, float, number, text};
use super::{imported, refusal_of_other};
use crate::checkpoint::StoredDtype;

const EXPERTS: usize = 2;
const HIDDEN: usize = 32;
const WIDTH: usize = 64;

pub(super) fn sound() -> Writer {
    let keys = [
        ("feed_forward_length", WIDTH as u32),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("attention.sliding_window", 8),
        ("rope.scaling.original_context_length", 16),
        ("expert_count", EXPERTS as u32),
        ("expert_used_count", 1),
        ("expert_feed_forward_length", WIDTH as u32),
    ];
    let layer = [
        ("attn_norm.weight", 0, vec![32]),
        ("post_attention_norm.weight", 0, vec![32]),
        ("attn_q.weight", 8, vec![32, 32]),
        ("attn_q.bias", 0, vec![32]),
        ("attn_k.weight", 8, vec![32, 16]),
        ("attn_k.bias", 0, vec![16]),
        ("attn_v.weight", 8, vec![32, 16]),
        ("attn_v.bias", 0, vec![16]),
        ("attn_output.weight", 8, vec![32, 32]),
        ("attn_output.bias", 0, vec![32]),
        ("attn_sinks.weight", 0, vec![2]),
        ("ffn_gate_inp.weight", 0, vec![32, 2]),
        ("ffn_gate_inp.bias", 0, vec![2]),
        ("ffn_gate_exps.bias", 0, vec![64, 2]),
        ("ffn_up_exps.bias", 0, vec![64, 2]),
        ("ffn_down_exps.bias", 0, vec![32, 2]),
        ("ffn_gate_exps.weight", 39, vec![32, 64, 2]),
        ("ffn_up_exps.weight", 39, vec![32, 64, 2]),
        ("ffn_down_exps.weight", 39, vec![64, 32, 2]),
    ];
    let mut writer = Writer::of("gpt-oss", &keys, &layer);
    writer.set("gpt-oss.rope.scaling.type", text("yarn"));
    writer.set("gpt-oss.rope.scaling.factor", float(4.0));
    writer
}

fn refusal_of(change: impl FnOnce(&mut Writer)) -> String {
    refusal_of_other(sound(), change)
}

fn tensor(which: &str) -> String {
    format!("blk.0.ffn_{which}_exps.weight")
}

/// Inputs first, and gate and up in turns.
fn check_experts(writer: &Writer, to: Option<StoredDtype>, dtype: Dtype) {
    let (_, tensors) = imported(writer, to);
    let path = |name: &str| format!("model.layers.0.mlp.experts.{name}");
    let matrices = [writer.values(&tensor("gate")), writer.values(&tensor("up"))];
    let (found, gate_up) = &tensors[&path("gate_up_proj")];
    assert_eq!((*found, gate_up.len()), (dtype, EXPERTS * HIDDEN * 2 * WIDTH));
    let down = &tensors[&path("down_proj")].1;
    for expert in 0..EXPERTS {
        for (hidden, width) in (0..HIDDEN).flat_map(|hidden| (0..WIDTH).map(move |width| (hidden, width))) {
            for (turn, matrix) in matrices.iter().enumerate() {
                let found = gate_up[(expert * HIDDEN + hidden) * 2 * WIDTH + 2 * width + turn];
                assert_eq!(found, matrix[(expert * WIDTH + width) * HIDDEN + hidden]);
            }
            let found = down[(expert * WIDTH + width) * HIDDEN + hidden];
            assert_eq!(found, writer.values(&tensor("down"))[(expert * HIDDEN + hidden) * WIDTH + width]);
        }
    }
    let (gate, up) = (writer.values("blk.0.ffn_gate_exps.bias"), writer.values("blk.0.ffn_up_exps.bias"));
    let expected: Vec<f32> = gate.iter().zip(&up).flat_map(|(gate, up)| [*gate, *up]).collect();
    assert_eq!(tensors[&path("gate_up_proj_bias")], (Dtype::F32, expected));
}

#[test]
fn experts_are_widened_where_they_are_asked_for_or_stored_otherwise() {
    check_experts(&sound(), Some(StoredDtype::F32), Dtype::F32);
    check_experts(&sound(), Some(StoredDtype::Bf16), Dtype::BF16);
    // One matrix in other blocks: the layer has no blocks then.
    let mut writer = sound();
    writer.remove(&tensor("down"));
    writer.stored(&tensor("down"), 8, &[64, 32, 2]);
    check_experts(&writer, None, Dtype::F16);
    let mut writer = sound();
    writer.remove(&tensor("up"));
    writer.tensor(&tensor("up"), &[32, 64, 2]);
    check_experts(&writer, None, Dtype::F32);
}

#[test]
fn what_no_file_says_is_that_of_the_published_models() {
    let (config, _) = imported(&sound(), None);
    assert_eq!(config["model_type"], "gpt_oss");
    assert_eq!((config["swiglu_limit"].as_f64(), config["sliding_window"].as_u64()), (Some(7.0), Some(8)));
    assert_eq!(config["layer_types"], serde_json::json!(["sliding_attention"]));
    assert_eq!(config["rope_scaling"]["truncate"], false);
}

#[test]
fn scales_that_are_no_numbers_or_too_large_are_refused() {
    let name = "model.layers.0.mlp.experts";
    let with = |which: &str, scale: u8| refusal_kept(|writer| writer.named(&tensor(which)).data[17] = scale);
    assert_eq!(with("up", 253), format!("tensor `{name}.gate_up_proj_scales`: it holds inf: the file is damaged"));
    assert_eq!(with("down", 255), format!("tensor `{name}.down_proj_scales`: it holds NaN: the file is damaged"));
}

/// As the file has it, where nothing is widened.
fn refusal_kept(change: impl FnOnce(&mut Writer)) -> String {
    let mut writer = sound();
    change(&mut writer);
    let folder = tempfile::tempdir().unwrap();
    let (out, refused) = super::import_into(&folder, &writer.bytes(), None);
    assert!(!out.exists());
    refused.unwrap_err().to_string()
}

#[test]
fn experts_that_lack_something_or_have_other_sizes_are_refused() {
    let missing =
        |name: &str| assert_eq!(refusal_kept(|writer| writer.remove(name)), format!("tensor `{name}` is missing"));
    for which in ["gate", "up", "down"] {
        missing(&tensor(which));
        missing(&format!("blk.0.ffn_{which}_exps.bias"));
    }
    missing("blk.0.attn_sinks.weight");
    missing("blk.0.post_attention_norm.weight");
    missing("blk.0.ffn_gate_inp.bias");
    let shaped = |name: &str, shape: &[u64]| refusal_kept(|writer| writer.named(name).shape = shape.to_vec());
    assert_eq!(
        shaped(&tensor("gate"), &[64, 32, 2]),
        "tensor `blk.0.ffn_gate_exps.weight`: it has shape [2, 32, 64], expected [2, 64, 32]"
    );
    assert_eq!(
        shaped("blk.0.ffn_up_exps.bias", &[32, 4]),
        "tensor `blk.0.ffn_up_exps.bias`: it has shape [4, 32], expected [2, 64]"
    );
    let blocks = refusal_kept(|writer| {
        writer.remove("blk.0.ffn_up_exps.bias");
        writer.stored("blk.0.ffn_up_exps.bias", 8, &[64, 2]);
    });
    let name = "model.layers.0.mlp.experts.gate_up_proj_bias";
    assert_eq!(blocks, format!("tensor `{name}`: values stored as Q8_0 cannot be put in another order"));
    let norm = refusal_kept(|writer| writer.tensor("blk.0.ffn_norm.weight", &[32]));
    assert_eq!(norm, "tensor `blk.0.ffn_norm.weight` is not understood: what it changes is not supported");
}

#[test]
fn keys_that_make_another_model_are_refused() {
    let set = |key: &str, value: Vec<u8>| refusal_of(|writer| writer.set(&format!("gpt-oss.{key}"), value));
    let without = |key: &str| refusal_of(|writer| writer.keys.retain(|(found, _)| found != &format!("gpt-oss.{key}")));
    assert_eq!(without("attention.sliding_window"), "the file has no `gpt-oss.attention.sliding_window`");
    assert_eq!(without("expert_feed_forward_length"), "the file has no `gpt-oss.expert_feed_forward_length`");
    assert!(without("rope.scaling.type").contains("`rope_scaling`"));
    assert!(set("expert_gating_func", number(1)).ends_with("weights experts by softmax of the chosen (3)"));
    assert!(set("attention.sliding_window_pattern", number(4)).contains("is not understood"));
    assert!(set("rope.scaling.yarn_log_multiplier", float(0.1)).contains("is not understood"));
    let many = refusal_of(|writer| {
        writer.set("gpt-oss.block_count", number(1 << 30));
        writer.tensor("blk.1073741823.attn_norm.weight", &[32]);
    });
    assert_eq!(many, "tensor `blk.1.attn_norm.weight` is missing");
    assert!(set("expert_used_count", number(3)).contains("`num_experts_per_tok` is 3"));
    assert!(set("attention.sliding_window", number(0)).contains("`sliding_window` is 0"));
}
