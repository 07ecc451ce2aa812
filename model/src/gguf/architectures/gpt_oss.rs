//! OpenAI's gpt-oss.

use serde_json::Value;

use super::{Config, Keys, named};
use crate::gguf::error::GgufError;

/// The norm before experts comes after attention, and is called so.
pub(super) const NAMES: &[(&str, &str)] = &[("post_attention_layernorm.weight", "post_attention_norm.weight")];

/// A softmax of the scores of those that are chosen.
const SOFTMAX_OF_CHOSEN: u64 = 3;

pub(super) fn config(keys: &Keys<'_, '_>, config: &mut Config) -> Result<(), GgufError> {
    named(config, "gpt_oss", "GptOssForCausalLM");
    if keys.whole("expert_gating_func")?.is_some_and(|function| function != 0 && function != SOFTMAX_OF_CHOSEN) {
        return Err(
            keys.invalid("expert_gating_func", "this architecture weights experts by softmax of the chosen (3)")
        );
    }
    let layers = config.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0);
    let kind = |layer| if layer % 2 == 0 { "sliding_attention" } else { "full_attention" };
    if let Some(scaling) = config.get_mut("rope_scaling").filter(|scaling| scaling["rope_type"] == "yarn") {
        // No file says so. It is what the model was trained with.
        scaling["truncate"] = false.into();
    }
    let mut put = |key: &str, value: Value| config.insert(key.to_owned(), value);
    put("num_local_experts", keys.required("expert_count")?.into());
    put("num_experts_per_tok", keys.required("expert_used_count")?.into());
    put("intermediate_size", keys.required("expert_feed_forward_length")?.into());
    put("sliding_window", keys.required("attention.sliding_window")?.into());
    put("layer_types", (0..layers).map(kind).collect());
    put("attention_bias", true.into());
    // So are these.
    put("swiglu_limit", 7.0.into());
    Ok(())
}
