//! Architectures: how the metadata of a GGUF file become a `config.json`. One entry of [`ARCHITECTURES`] each.
//!
//! Source: `conversion/` and `src/models/` of llama.cpp, for names of keys and for what its graphs take for granted.

mod deepseek2;
mod gpt_oss;
mod rope;

use std::ops::Range;

use serde_json::{Map, Value, json};

use super::error::GgufError;
use super::file::Gguf;

pub(super) type Config = Map<String, Value>;

/// An architecture.
pub(super) struct Architecture {
    /// What `general.architecture` says.
    pub(super) name: &'static str,
    /// Writes what is not common to all.
    config: fn(&Keys<'_, '_>, &mut Config) -> Result<(), GgufError>,
    /// Writes sizes of heads; gives how many values of each rotate.
    heads: fn(&Keys<'_, '_>, &mut Config) -> Result<u64, GgufError>,
    /// The rows of queries and keys are in another order: those that rotate against each other are neighbours.
    pub(super) neighbours: bool,
    /// Tensors of layers that have other names than elsewhere: those of the hubs, and llama.cpp's.
    pub(super) names: &'static [(&'static str, &'static str)],
}

/// What most architectures are.
const PLAIN: Architecture =
    Architecture { name: "", config: |_, _| Ok(()), heads: plain_heads, neighbours: false, names: &[] };

const ARCHITECTURES: &[Architecture] = &[
    Architecture { name: "deepseek2", config: deepseek2::config, heads: deepseek2::heads, ..PLAIN },
    Architecture { name: "gpt-oss", config: gpt_oss::config, names: gpt_oss::NAMES, ..PLAIN },
    Architecture { name: "llama", config: llama, neighbours: true, ..PLAIN },
    Architecture { name: "olmoe", config: olmoe, ..PLAIN },
    Architecture { name: "qwen2", config: qwen2, ..PLAIN },
    Architecture { name: "qwen2moe", config: qwen2moe, ..PLAIN },
    Architecture { name: "qwen3", config: qwen3, ..PLAIN },
    Architecture { name: "qwen3moe", config: qwen3moe, ..PLAIN },
];

/// Keys that change nothing here.
const HARMLESS: [&str; 3] = ["tensor_data_layout", "rope.scaling.finetuned", "vocab_size"];

/// What a file says that it holds.
pub(super) struct Model {
    pub(super) architecture: &'static Architecture,
    /// Its `config.json`.
    pub(super) config: Config,
    /// Layers after those of the model, which predict further tokens.
    pub(super) further: Range<u64>,
}

/// The keys of one architecture.
struct Keys<'g, 'a> {
    gguf: &'g Gguf<'a>,
    architecture: &'g str,
}

impl Keys<'_, '_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn whole(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.gguf.metadata.whole(&self.name(key))
    }

    fn required(&self, key: &str) -> Result<u64, GgufError> {
        self.gguf.metadata.required(&self.name(key))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.gguf.metadata.float(&self.name(key))
    }

    fn invalid(&self, key: &str, reason: impl Into<String>) -> GgufError {
        self.gguf.metadata.invalid(&self.name(key), reason)
    }

    fn has(&self, tensor: &str) -> bool {
        self.gguf.tensors.contains_key(tensor)
    }

    /// A dimension of a tensor that must be there, counted from the fastest.
    fn dimension(&self, tensor: &str, from_fastest: usize) -> Result<usize, GgufError> {
        let missing = || GgufError::MissingTensor { tensor: tensor.to_owned() };
        let shape = &self.gguf.tensors.get(tensor).ok_or_else(missing)?.shape;
        shape.iter().rev().nth(from_fastest).copied().ok_or_else(missing)
    }

    /// A number that the architecture has no choice of, if the file says it.
    fn only(&self, key: &str, expected: u64) -> Result<(), GgufError> {
        match self.whole(key)? {
            Some(found) if found != expected => Err(self.invalid(key, format!("here it must be {expected}"))),
            _ => Ok(()),
        }
    }

    /// Number of experts and how many a token goes to.
    fn experts(&self, config: &mut Config) -> Result<(), GgufError> {
        config.insert("num_experts".to_owned(), self.required("expert_count")?.into());
        config.insert("num_experts_per_tok".to_owned(), self.required("expert_used_count")?.into());
        if self.float("expert_weights_scale")?.is_some_and(|scale| scale != 1.0 && scale != 0.0) {
            return Err(self.invalid("expert_weights_scale", "this architecture does not scale the weights of experts"));
        }
        // 1 is softmax, 0 says nothing.
        if self.whole("expert_gating_func")?.is_some_and(|function| function > 1) {
            return Err(self.invalid("expert_gating_func", "this architecture chooses by softmax (1)"));
        }
        Ok(())
    }

    /// Whether weights are renormalised is a matter of the architecture; a file that says otherwise is another model.
    fn renormalised(&self, config: &mut Config, renormalise: bool) -> Result<(), GgufError> {
        let said = self.gguf.metadata.flag(&self.name("expert_weights_norm"))?;
        if said.is_some_and(|said| said != renormalise) {
            return Err(self.invalid("expert_weights_norm", format!("this architecture has {renormalise}")));
        }
        config.insert("norm_topk_prob".to_owned(), renormalise.into());
        Ok(())
    }
}

/// What the file says.
pub(super) fn read(gguf: &Gguf<'_>) -> Result<Model, GgufError> {
    let key = "general.architecture";
    let missing = || GgufError::MissingKey { key: key.to_owned() };
    let found = gguf.metadata.text(key)?.ok_or_else(missing)?;
    let architecture = ARCHITECTURES.iter().find(|known| known.name == found).ok_or_else(|| {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|known| known.name).collect();
        GgufError::Architecture { found: found.chars().take(80).collect(), known: known.join(", ") }
    })?;
    let keys = Keys { gguf, architecture: architecture.name };
    let mut config = Config::new();
    let further = layers(&keys, &mut config)?;
    common(&keys, &mut config)?;
    let rotated = (architecture.heads)(&keys, &mut config)?;
    if let Some(scaling) = rope::scaling(&keys, rotated)? {
        config.insert("rope_scaling".to_owned(), scaling);
    }
    (architecture.config)(&keys, &mut config)?;
    for key in HARMLESS {
        gguf.metadata.value(&keys.name(key));
    }
    match gguf.metadata.not_asked(&keys.name("")) {
        Some(key) => Err(GgufError::UnknownKey { key }),
        None => Ok(Model { architecture, config, further }),
    }
}

/// Writes the number of layers; gives those after them, which the file counts too.
fn layers(keys: &Keys<'_, '_>, config: &mut Config) -> Result<Range<u64>, GgufError> {
    let (all, further) = (keys.required("block_count")?, keys.whole("nextn_predict_layers")?.unwrap_or(0));
    let Some(layers) = all.checked_sub(further) else {
        return Err(keys.invalid("nextn_predict_layers", format!("there are {all} layers")));
    };
    // Their number is bounded by what is there, before anything is made for each of them.
    let norm = |layer: u64| format!("blk.{layer}.attn_norm.weight");
    if let Some(missing) =
        [layers.saturating_sub(1)].into_iter().chain(0..layers).map(norm).find(|name| !keys.has(name))
    {
        return Err(GgufError::MissingTensor { tensor: missing });
    }
    config.insert("num_hidden_layers".to_owned(), layers.into());
    Ok(layers..all)
}

fn common(keys: &Keys<'_, '_>, config: &mut Config) -> Result<(), GgufError> {
    let mut put = |key: &str, value: Value| config.insert(key.to_owned(), value);
    put("hidden_act", "silu".into());
    put("hidden_size", keys.required("embedding_length")?.into());
    put("intermediate_size", keys.required("feed_forward_length")?.into());
    put("num_attention_heads", keys.required("attention.head_count")?.into());
    put("max_position_embeddings", keys.required("context_length")?.into());
    let eps = "attention.layer_norm_rms_epsilon";
    let missing = || GgufError::MissingKey { key: keys.name(eps) };
    put("rms_norm_eps", keys.float(eps)?.ok_or_else(missing)?.into());
    put("vocab_size", keys.dimension("token_embd.weight", 1)?.into());
    put("tie_word_embeddings", (!keys.has("output.weight")).into());
    put("rope_theta", keys.float("rope.freq_base")?.unwrap_or(10_000.0).into());
    Ok(())
}

/// Of heads whose queries, keys and values are as long as each other.
fn plain_heads(keys: &Keys<'_, '_>, config: &mut Config) -> Result<u64, GgufError> {
    let (hidden_size, heads) = (keys.required("embedding_length")?, keys.required("attention.head_count")?);
    let head_dim = match keys.whole("attention.key_length")? {
        Some(head_dim) => head_dim,
        None => hidden_size
            .checked_div(heads)
            .ok_or_else(|| keys.invalid("attention.head_count", "it must be 1 or above"))?,
    };
    for key in ["attention.value_length", "rope.dimension_count"] {
        if keys.whole(key)?.is_some_and(|size| size != head_dim) {
            return Err(keys.invalid(key, format!("heads have {head_dim} values, and other sizes are not supported")));
        }
    }
    config.insert("num_key_value_heads".to_owned(), keys.whole("attention.head_count_kv")?.unwrap_or(heads).into());
    config.insert("head_dim".to_owned(), head_dim.into());
    Ok(head_dim)
}

fn named(config: &mut Config, model_type: &str, class: &str) {
    config.insert("model_type".to_owned(), model_type.into());
    config.insert("architectures".to_owned(), json!([class]));
}

/// Also Mistral, whose window llama.cpp does not write down, and Mixtral.
fn llama(keys: &Keys<'_, '_>, config: &mut Config) -> Result<(), GgufError> {
    if keys.whole("expert_count")?.unwrap_or(0) > 0 {
        named(config, "mixtral", "MixtralForCausalLM");
        keys.experts(config)?;
        let experts = config.remove("num_experts").unwrap_or_default();
        config.insert("num_local_experts".to_owned(), experts);
        return Ok(());
    }
    named(config, "llama", "LlamaForCausalLM");
    keys.whole("expert_used_count")?;
    config.insert("attention_bias".to_owned(), keys.has("blk.0.attn_q.bias").into());
    Ok(())
}

fn olmoe(keys: &Keys<'_, '_>, config: &mut Config) -> Result<(), GgufError> {
    named(config, "olmoe", "OlmoeForCausalLM");
    keys.experts(config)?;
    keys.renormalised(config, false)?;
    if let Some(limit) = keys.float("attention.clamp_kqv")?.filter(|limit| *limit != 0.0) {
        config.insert("clip_qkv".to_owned(), limit.into());
    }
    Ok(())
}

fn qwen2(_: &Keys<'_, '_>, config: &mut Config) -> Result<(), GgufError> {
    named(config, "qwen2", "Qwen2ForCausalLM");
    Ok(())
}

fn qwen2moe(keys: &Keys<'_, '_>, config: &mut Config) -> Result<(), GgufError> {
    named(config, "qwen2_moe", "Qwen2MoeForCausalLM");
    keys.experts(config)?;
    keys.renormalised(config, false)?;
    // Older files have no key for these widths.
    keys.whole("expert_feed_forward_length")?;
    keys.whole("expert_shared_feed_forward_length")?;
    let width = keys.dimension("blk.0.ffn_gate_exps.weight", 1)?;
    config.insert("moe_intermediate_size".to_owned(), width.into());
    config.insert("qkv_bias".to_owned(), keys.has("blk.0.attn_q.bias").into());
    let shared = keys.dimension("blk.0.ffn_gate_shexp.weight", 1)?;
    config.insert("shared_expert_intermediate_size".to_owned(), shared.into());
    Ok(())
}

fn qwen3(keys: &Keys<'_, '_>, config: &mut Config) -> Result<(), GgufError> {
    named(config, "qwen3", "Qwen3ForCausalLM");
    config.insert("attention_bias".to_owned(), keys.has("blk.0.attn_q.bias").into());
    Ok(())
}

fn qwen3moe(keys: &Keys<'_, '_>, config: &mut Config) -> Result<(), GgufError> {
    named(config, "qwen3_moe", "Qwen3MoeForCausalLM");
    keys.experts(config)?;
    keys.renormalised(config, true)?;
    config.insert("attention_bias".to_owned(), keys.has("blk.0.attn_q.bias").into());
    config.insert("moe_intermediate_size".to_owned(), keys.required("expert_feed_forward_length")?.into());
    Ok(())
}
