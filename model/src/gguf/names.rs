//! What llama.cpp calls the tensors of a model.

/// Names below `model.layers.L.`, and below `blk.L.`.
const LAYER: &[(&str, &str)] = &[
    ("input_layernorm.weight", "attn_norm.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.q_proj.bias", "attn_q.bias"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.k_proj.bias", "attn_k.bias"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.v_proj.bias", "attn_v.bias"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("self_attn.o_proj.bias", "attn_output.bias"),
    ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    ("self_attn.sinks", "attn_sinks.weight"),
    ("self_attn.q_a_proj.weight", "attn_q_a.weight"),
    ("self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight"),
    ("self_attn.q_b_proj.weight", "attn_q_b.weight"),
    ("self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight"),
    ("self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
    ("mlp.gate.weight", "ffn_gate_inp.weight"),
    ("block_sparse_moe.gate.weight", "ffn_gate_inp.weight"),
    ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
    ("mlp.router.weight", "ffn_gate_inp.weight"),
    ("mlp.router.bias", "ffn_gate_inp.bias"),
    ("mlp.experts.down_proj_bias", "ffn_down_exps.bias"),
    ("mlp.shared_experts.gate_proj.weight", "ffn_gate_shexp.weight"),
    ("mlp.shared_experts.up_proj.weight", "ffn_up_shexp.weight"),
    ("mlp.shared_experts.down_proj.weight", "ffn_down_shexp.weight"),
    ("mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight"),
    ("mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight"),
    ("mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight"),
    ("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight"),
];

/// Where a tensor of a model folder lies in a GGUF file.
#[derive(Debug, PartialEq)]
pub(super) enum Place {
    /// In a tensor of its own.
    Whole(String),
    /// In the tensor of all experts of a layer; in older files in a tensor of its own.
    Expert { together: String, alone: String, expert: usize },
    /// In a tensor of its own, or in one for keys and one for values.
    Latent { whole: String, keys: String, values: String },
    /// Weights of all experts of a layer, in one tensor or in two whose rows take turns.
    Experts { turns: Vec<String>, layer: String },
    /// Biases of all experts of a layer, in two tensors whose values take turns.
    Biases { turns: Vec<String> },
}

/// `None`: llama.cpp has no name for it. `others` are names in layers that come before the usual ones.
pub(super) fn place(name: &str, others: &[(&str, &str)]) -> Option<Place> {
    let whole = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight"),
        "model.norm.weight" => Some("output_norm.weight"),
        "lm_head.weight" => Some("output.weight"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some(Place::Whole(whole.to_owned()));
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let of_layer = |found: &str| format!("blk.{layer}.{found}");
    if let Some((_, found)) = others.iter().chain(LAYER).find(|(name, _)| *name == rest) {
        return Some(Place::Whole(of_layer(found)));
    }
    let turns = |kind: &str| ["gate", "up"].map(|which| of_layer(&format!("ffn_{which}_exps.{kind}"))).to_vec();
    match rest {
        "self_attn.kv_b_proj.weight" => {
            let [whole, keys, values] = ["attn_kv_b.weight", "attn_k_b.weight", "attn_v_b.weight"].map(of_layer);
            return Some(Place::Latent { whole, keys, values });
        }
        "mlp.experts.gate_up_proj" => return Some(Place::Experts { turns: turns("weight"), layer: layer.to_owned() }),
        "mlp.experts.gate_up_proj_bias" => return Some(Place::Biases { turns: turns("bias") }),
        "mlp.experts.down_proj" => {
            return Some(Place::Experts { turns: vec![of_layer("ffn_down_exps.weight")], layer: layer.to_owned() });
        }
        _ => {}
    }
    let experts = ["mlp.experts.", "block_sparse_moe.experts."];
    let (expert, matrix) = experts.iter().find_map(|prefix| rest.strip_prefix(prefix))?.split_once('.')?;
    let matrix = match matrix {
        "gate_proj.weight" | "w1.weight" => "ffn_gate",
        "up_proj.weight" | "w3.weight" => "ffn_up",
        "down_proj.weight" | "w2.weight" => "ffn_down",
        _ => return None,
    };
    Some(Place::Expert {
        together: format!("blk.{layer}.{matrix}_exps.weight"),
        alone: format!("blk.{layer}.{matrix}.{expert}.weight"),
        expert: expert.parse().ok()?,
    })
}

/// The tensors that hold the weights of all experts of a layer.
pub(super) fn experts(layer: &str) -> [String; 3] {
    ["gate", "up", "down"].map(|which| format!("blk.{layer}.ffn_{which}_exps.weight"))
}

/// The layer that a tensor of the file belongs to.
pub(super) fn layer(tensor: &str) -> Option<u64> {
    tensor.strip_prefix("blk.")?.split_once('.')?.0.parse().ok()
}

/// Query and key projections, whose rows some architectures have in another order.
pub(super) fn is_rotated(name: &str) -> bool {
    ["q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"].iter().any(|end| name.ends_with(end))
}

/// A tensor that files carry and that needs no place: it follows from the metadata, or is read there.
pub(super) fn is_derived(name: &str) -> bool {
    name == "rope_freqs.weight" || name.ends_with(".attn_rot_embd.weight")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_have_the_names_of_llama_cpp() {
        let whole = |name: &str| Some(Place::Whole(name.to_owned()));
        assert_eq!(place("lm_head.weight", &[]), whole("output.weight"));
        assert_eq!(place("model.layers.12.self_attn.k_norm.weight", &[]), whole("blk.12.attn_k_norm.weight"));
        let expert = Place::Expert {
            together: "blk.3.ffn_up_exps.weight".to_owned(),
            alone: "blk.3.ffn_up.7.weight".to_owned(),
            expert: 7,
        };
        assert_eq!(place("model.layers.3.block_sparse_moe.experts.7.w3.weight", &[]), Some(expert));
        assert_eq!(place("model.layers.3.mlp.experts.x.up_proj.weight", &[]), None);
        assert_eq!(place("model.layers.3.self_attn.rotary_emb.inv_freq", &[]), None);
        let norm = ("post_attention_layernorm.weight", "post_attention_norm.weight");
        assert_eq!(place("model.layers.3.post_attention_layernorm.weight", &[]), whole("blk.3.ffn_norm.weight"));
        let other = place("model.layers.3.post_attention_layernorm.weight", &[norm]);
        assert_eq!(other, whole("blk.3.post_attention_norm.weight"));
        assert_eq!((layer("blk.61.attn_norm.weight"), layer("token_embd.weight")), (Some(61), None));
    }
}
