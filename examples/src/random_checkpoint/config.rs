//! `config.json` of each family, with the keys that its hub checkpoints have.

use safetensors::Dtype;
use serde_json::{Value, json};

use super::{MakeError, Shape};

pub(super) fn config_json(shape: &Shape, dtype: Dtype) -> Result<Value, MakeError> {
    let torch_dtype = match dtype {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        other => return Err(MakeError::Dtype(other)),
    };
    let mut config = json!({
        "model_type": shape.family,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
        "num_experts_per_tok": shape.top_k,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": torch_dtype,
    });
    let own = match shape.family.as_str() {
        "mixtral" => json!({ "num_local_experts": shape.experts, "intermediate_size": shape.intermediate }),
        "olmoe" => {
            json!({ "num_experts": shape.experts, "intermediate_size": shape.intermediate, "norm_topk_prob": false })
        }
        "qwen2_moe" => json!({
            "num_experts": shape.experts,
            "intermediate_size": shape.intermediate * shape.top_k,
            "moe_intermediate_size": shape.intermediate,
            "shared_expert_intermediate_size": shape.shared_intermediate,
            "norm_topk_prob": false,
        }),
        "qwen3_moe" => json!({
            "num_experts": shape.experts,
            "intermediate_size": shape.intermediate * shape.top_k,
            "moe_intermediate_size": shape.intermediate,
            "norm_topk_prob": true,
        }),
        family @ ("granitemoe" | "granitemoeshared") => json!({
            "num_local_experts": shape.experts,
            "intermediate_size": shape.intermediate,
            "shared_intermediate_size": if family == "granitemoe" { 0 } else { shape.shared_intermediate },
            // Absent it would be 1, and attention would look at one position only.
            "attention_multiplier": (shape.head_dim as f64).powf(-0.5),
        }),
        "deepseek_v2" | "deepseek_v3" | "kimi_k2" | "glm4_moe_lite" => latent(shape),
        "deepseek_v32" => {
            let mut config = latent(shape);
            config["index_n_heads"] = json!(shape.heads / 2);
            config["index_head_dim"] = json!(shape.head_dim);
            config["index_topk"] = json!(2048);
            config
        }
        "glm4_moe" | "dots1" => corrected(shape),
        "gpt_oss" => json!({
            "num_local_experts": shape.experts,
            "intermediate_size": shape.intermediate,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "rope_scaling": { "rope_type": "default" },
        }),
        "ernie4_5_moe" => json!({
            "moe_num_experts": shape.experts,
            "moe_k": shape.top_k,
            "moe_intermediate_size": shape.intermediate,
            "moe_num_shared_experts": shape.shared_intermediate / shape.intermediate,
            "moe_layer_start_index": 0,
        }),
        "minimax_m2" => json!({
            "num_local_experts": shape.experts,
            "intermediate_size": shape.intermediate,
            "rotary_dim": shape.head_dim / 2,
        }),
        "hunyuan_v1_moe" => json!({
            "num_experts": shape.experts,
            "moe_topk": shape.top_k,
            "intermediate_size": shape.intermediate,
        }),
        // As wide as the experts of a token together.
        "llama" | "mistral" | "qwen2" | "qwen3" => json!({ "intermediate_size": shape.intermediate * shape.top_k }),
        // The list of families that the model crate knows is in its own error.
        unknown if !is_known(unknown) => json!({}),
        known => return Err(MakeError::Family(known.to_owned())),
    };
    if let (Value::Object(config), Value::Object(own)) = (&mut config, own) {
        config.extend(own);
        if let Some(class) = class(&shape.family) {
            config.insert("architectures".into(), json!([class]));
        }
    }
    Ok(config)
}

/// What transformers and llama.cpp tell a family by, of those that others are measured with.
fn class(family: &str) -> Option<&'static str> {
    Some(match family {
        "deepseek_v2" => "DeepseekV2ForCausalLM",
        "deepseek_v3" => "DeepseekV3ForCausalLM",
        "gpt_oss" => "GptOssForCausalLM",
        "llama" => "LlamaForCausalLM",
        "mixtral" => "MixtralForCausalLM",
        "olmoe" => "OlmoeForCausalLM",
        "qwen2_moe" => "Qwen2MoeForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        "qwen3_moe" => "Qwen3MoeForCausalLM",
        _ => return None,
    })
}

/// Experts as DeepSeek V3 has them.
fn corrected(shape: &Shape) -> Value {
    json!({
        "n_routed_experts": shape.experts,
        "moe_intermediate_size": shape.intermediate,
        "n_shared_experts": shape.shared_intermediate / shape.intermediate,
        "first_k_dense_replace": 0,
        "norm_topk_prob": shape.family != "deepseek_v2",
    })
}

/// The same with latent attention, whose sizes have to one another the ratios of DeepSeek V3.
fn latent(shape: &Shape) -> Value {
    let Value::Object(mut config) = corrected(shape) else { return Value::Null };
    let Value::Object(attention) = json!({
        "num_key_value_heads": shape.heads,
        "head_dim": shape.head_dim / 2,
        "q_lora_rank": 12 * shape.head_dim,
        "kv_lora_rank": 4 * shape.head_dim,
        "qk_nope_head_dim": shape.head_dim,
        "qk_rope_head_dim": shape.head_dim / 2,
        "v_head_dim": shape.head_dim,
    }) else {
        return Value::Null;
    };
    config.extend(attention);
    config.into()
}

fn is_known(family: &str) -> bool {
    hanse_model::known_families().split(", ").any(|known| known == family)
}
