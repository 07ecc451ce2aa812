//! Configs that say they are of one family and have what only others have: what they compute is anyone's guess.

use serde_json::Value;

use crate::checkpoint::config::{Config, ConfigError};

const LATENT: &[&str] = &["deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_k2"];
const GROUPED: &[&str] =
    &["deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "glm4_moe", "glm4_moe_lite", "kimi_k2"];
const GRANITE: &[&str] = &["granitemoe", "granitemoeshared"];
const QWEN: &[&str] = &["qwen2_moe", "qwen3_moe"];
/// No family that is computed here.
const NONE: &[&str] = &[];

/// Keys that change what a model computes, with the families that have them.
const OWNED: &[(&str, &[&str])] = &[
    ("attention_multiplier", GRANITE),
    ("clip_qkv", &["olmoe"]),
    ("decoder_sparse_step", QWEN),
    ("embedding_multiplier", GRANITE),
    ("experts_per_token", &["gpt_oss"]),
    ("first_k_dense_replace", GROUPED),
    ("index_topk", &["deepseek_v32"]),
    ("kv_lora_rank", LATENT),
    ("linear_num_key_heads", NONE),
    ("logits_scaling", GRANITE),
    ("mamba_d_state", NONE),
    ("mlp_only_layers", QWEN),
    ("moe_k", &["ernie4_5_moe"]),
    ("moe_num_experts", &["ernie4_5_moe"]),
    ("moe_topk", &["hunyuan_v1_moe"]),
    ("n_group", GROUPED),
    ("n_routed_experts", GROUPED),
    ("n_shared_experts", GROUPED),
    ("q_lora_rank", LATENT),
    ("qk_nope_head_dim", LATENT),
    ("qk_rope_head_dim", LATENT),
    ("residual_multiplier", GRANITE),
    ("rotary_dim", &["minimax_m2"]),
    ("routed_scaling_factor", GROUPED),
    ("shared_expert_intermediate_size", &["qwen2_moe"]),
    ("shared_intermediate_size", &["granitemoeshared", "minimax_m2"]),
    ("swiglu_limit", &["gpt_oss"]),
    ("topk_group", GROUPED),
    ("v_head_dim", LATENT),
];

/// Refuses a key of other families, unless its value means that what it is about is not there.
pub(super) fn refuse(config: &Config<'_>, family: &str) -> Result<(), ConfigError> {
    for (key, owners) in OWNED {
        if owners.contains(&family) || config.value(key).is_none_or(means_nothing) {
            continue;
        }
        let owners = if owners.is_empty() { "families that are not supported".to_owned() } else { owners.join(", ") };
        return Err(config.invalid(key, format!("the family is `{family}`, and this key belongs to {owners}")));
    }
    Ok(())
}

/// What configs have for things that a model does not do: no experts, one group, a factor of one.
fn means_nothing(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.as_f64().is_some_and(|number| number == 0.0 || number == 1.0),
        Value::Bool(value) => !value,
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}
