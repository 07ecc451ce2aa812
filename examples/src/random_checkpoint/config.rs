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
        "granitemoe" | "granitemoeshared" => json!({
            "num_local_experts": shape.experts,
            "intermediate_size": shape.intermediate,
            "shared_intermediate_size": shape.shared_intermediate,
            // Absent it would be 1, and attention would look at one position only.
            "attention_multiplier": (shape.head_dim as f64).powf(-0.5),
        }),
        // The list of families that the model crate knows is in its own error.
        unknown if !is_known(unknown) => json!({}),
        known => return Err(MakeError::Family(known.to_owned())),
    };
    if let (Value::Object(config), Value::Object(own)) = (&mut config, own) {
        config.extend(own);
        // What other programs tell families by.
        let class = match shape.family.as_str() {
            "granitemoe" => "GraniteMoe",
            "granitemoeshared" => "GraniteMoeShared",
            "mixtral" => "Mixtral",
            "olmoe" => "Olmoe",
            "qwen2_moe" => "Qwen2Moe",
            _ => "Qwen3Moe",
        };
        config.insert("architectures".into(), json!([format!("{class}ForCausalLM")]));
    }
    Ok(config)
}

fn is_known(family: &str) -> bool {
    hanse_model::known_families().split(", ").any(|known| known == family)
}
