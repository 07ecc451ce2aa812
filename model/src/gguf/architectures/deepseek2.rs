//! DeepSeek V2 and V3, and what has their layers: R1, Kimi K2. The rows of queries and keys are in the order of the hubs.

use serde_json::Value;

use super::{Config, Keys, named};
use crate::gguf::error::GgufError;

/// Files that were written before groups of experts were say nothing of them. Models by their numbers of experts, of those that a token goes
/// to and of values of a hidden state: groups, and how many of them are chosen.
const GROUPS: [([u64; 3], [u64; 2]); 2] = [
    // V2, V2.5 and Coder-V2.
    ([160, 6, 5120], [8, 3]),
    // V3, R1 and V3.1.
    ([256, 8, 7168], [8, 4]),
];

const SOFTMAX: u64 = 1;
const SIGMOID: u64 = 2;

/// Sizes of heads. Newer files say how large they are where latents stand for keys and values, which is one head for all queries, and
/// what they are by themselves under keys with `_mla`.
pub(super) fn heads(keys: &Keys<'_, '_>, config: &mut Config) -> Result<u64, GgufError> {
    let (heads, rank) = (keys.required("attention.head_count")?, keys.required("attention.kv_lora_rank")?);
    let rotated = keys.required("rope.dimension_count")?;
    let key_length = match keys.whole("attention.key_length_mla")? {
        Some(key_length) => {
            keys.only("attention.key_length", rank.saturating_add(rotated))?;
            keys.only("attention.value_length", rank)?;
            keys.only("attention.head_count_kv", 1)?;
            config.insert("v_head_dim".to_owned(), keys.required("attention.value_length_mla")?.into());
            key_length
        }
        None => {
            keys.only("attention.head_count_kv", heads)?;
            config.insert("v_head_dim".to_owned(), keys.required("attention.value_length")?.into());
            keys.required("attention.key_length")?
        }
    };
    let Some(not_rotated) = key_length.checked_sub(rotated) else {
        return Err(keys.invalid("rope.dimension_count", format!("keys have {key_length} values")));
    };
    let mut put = |key: &str, value: Value| config.insert(key.to_owned(), value);
    put("num_key_value_heads", heads.into());
    put("kv_lora_rank", rank.into());
    put("q_lora_rank", keys.whole("attention.q_lora_rank")?.map_or(Value::Null, Value::from));
    put("qk_nope_head_dim", not_rotated.into());
    put("qk_rope_head_dim", rotated.into());
    Ok(rotated)
}

pub(super) fn config(keys: &Keys<'_, '_>, config: &mut Config) -> Result<(), GgufError> {
    scores_of_yarn(keys, config)?;
    let (experts, chosen) = (keys.required("expert_count")?, keys.required("expert_used_count")?);
    let renormalised = keys.gguf.metadata.flag(&keys.name("expert_weights_norm"))?.unwrap_or(false);
    let [groups, used] = match keys.whole("expert_group_count")? {
        Some(groups) => [groups, keys.required("expert_group_used_count")?],
        None => {
            let sizes = [experts, chosen, keys.required("embedding_length")?];
            GROUPS.iter().find(|(known, _)| *known == sizes).map_or([1, 1], |(_, groups)| *groups)
        }
    };
    let (scoring, method) = match keys.whole("expert_gating_func")?.filter(|function| *function != 0) {
        // Files that say nothing were written before there was a V3.
        None | Some(SOFTMAX) => {
            named(config, "deepseek_v2", "DeepseekV2ForCausalLM");
            if renormalised {
                return Err(keys.invalid("expert_weights_norm", "with softmax weights are not renormalised"));
            }
            ("softmax", if groups > 1 { "group_limited_greedy" } else { "greedy" })
        }
        Some(SIGMOID) => {
            named(config, "deepseek_v3", "DeepseekV3ForCausalLM");
            ("sigmoid", "noaux_tc")
        }
        Some(_) => return Err(keys.invalid("expert_gating_func", "known are 1 (softmax) and 2 (sigmoid)")),
    };
    let scale = keys.float("expert_weights_scale")?.filter(|scale| *scale != 0.0).unwrap_or(1.0);
    let mut put = |key: &str, value: Value| config.insert(key.to_owned(), value);
    put("scoring_func", scoring.into());
    put("topk_method", method.into());
    put("n_group", groups.into());
    put("topk_group", used.into());
    put("norm_topk_prob", renormalised.into());
    put("routed_scaling_factor", scale.into());
    put("n_routed_experts", experts.into());
    put("num_experts_per_tok", chosen.into());
    put("n_shared_experts", keys.whole("expert_shared_count")?.unwrap_or(0).into());
    put("moe_intermediate_size", keys.required("expert_feed_forward_length")?.into());
    put("first_k_dense_replace", keys.whole("leading_dense_block_count")?.unwrap_or(0).into());
    put("moe_layer_freq", 1.into());
    put("attention_bias", false.into());
    Ok(())
}

/// What yarn does to scores. The file has a tenth of it, and takes it for granted that angles are not scaled besides.
fn scores_of_yarn(keys: &Keys<'_, '_>, config: &mut Config) -> Result<(), GgufError> {
    let key = "rope.scaling.yarn_log_multiplier";
    let multiplier = keys.float(key)?;
    let Some(scaling) = config.get_mut("rope_scaling").filter(|scaling| scaling["rope_type"] == "yarn") else {
        return Ok(());
    };
    let Some(multiplier) = multiplier.filter(|multiplier| *multiplier > 0.0) else {
        return Err(keys.invalid(key, "with yarn this architecture needs one above 0"));
    };
    // As the config had it, before it was written in f32.
    let multiplier: f64 = ((multiplier * 10.0) as f32).to_string().parse().unwrap_or(multiplier * 10.0);
    scaling["mscale"] = multiplier.into();
    scaling["mscale_all_dim"] = multiplier.into();
    Ok(())
}
