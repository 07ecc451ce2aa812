//! Architectures: how the metadata of a GGUF file become a `config.json`. One entry of [`ARCHITECTURES`] each.
//!
//! Source: `conversion/` and `src/models/` of llama.cpp, for names of keys and for what its graphs take for granted.

use serde_json::{Map, Value, json};

use super::error::GgufError;
use super::file::Gguf;

type Config = Map<String, Value>;

/// An architecture.
pub(super) struct Architecture {
    /// What `general.architecture` says.
    pub(super) name: &'static str,
    /// Writes what is not common to all.
    config: fn(&Keys<'_, '_>, &mut Config) -> Result<(), GgufError>,
    /// The rows of queries and keys are in another order: those that rotate against each other are neighbours.
    pub(super) neighbours: bool,
}

const ARCHITECTURES: &[Architecture] = &[
    Architecture { name: "llama", config: llama, neighbours: true },
    Architecture { name: "olmoe", config: olmoe, neighbours: false },
    Architecture { name: "qwen2", config: qwen2, neighbours: false },
    Architecture { name: "qwen2moe", config: qwen2moe, neighbours: false },
    Architecture { name: "qwen3", config: qwen3, neighbours: false },
    Architecture { name: "qwen3moe", config: qwen3moe, neighbours: false },
];

/// Keys that change nothing here.
const HARMLESS: [&str; 3] = ["tensor_data_layout", "rope.scaling.finetuned", "vocab_size"];
/// What llama.cpp's converter takes for Llama 3's rope where the file has no more than the factors.
const LLAMA3: (f64, f64, u64) = (1.0, 4.0, 8192);

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

/// The file's architecture, and the `config.json` of the model in it.
pub(super) fn read(gguf: &Gguf<'_>) -> Result<(&'static Architecture, Config), GgufError> {
    let key = "general.architecture";
    let missing = || GgufError::MissingKey { key: key.to_owned() };
    let found = gguf.metadata.text(key)?.ok_or_else(missing)?;
    let architecture = ARCHITECTURES.iter().find(|known| known.name == found).ok_or_else(|| {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|known| known.name).collect();
        GgufError::Architecture { found: found.chars().take(80).collect(), known: known.join(", ") }
    })?;
    let keys = Keys { gguf, architecture: architecture.name };
    let mut config = common(&keys)?;
    (architecture.config)(&keys, &mut config)?;
    for key in HARMLESS {
        gguf.metadata.value(&keys.name(key));
    }
    match gguf.metadata.not_asked(&keys.name("")) {
        Some(key) => Err(GgufError::UnknownKey { key }),
        None => Ok((architecture, config)),
    }
}

fn common(keys: &Keys<'_, '_>) -> Result<Config, GgufError> {
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
    let layers = keys.required("block_count")?;
    // The number of layers is bounded by what is there, before anything is made for each of them.
    let last = format!("blk.{}.attn_norm.weight", layers.saturating_sub(1));
    if !keys.has(&last) {
        return Err(GgufError::MissingTensor { tensor: last });
    }
    let mut config = Config::new();
    let mut put = |key: &str, value: Value| config.insert(key.to_owned(), value);
    put("hidden_act", "silu".into());
    put("hidden_size", hidden_size.into());
    put("intermediate_size", keys.required("feed_forward_length")?.into());
    put("num_hidden_layers", layers.into());
    put("num_attention_heads", heads.into());
    put("num_key_value_heads", keys.whole("attention.head_count_kv")?.unwrap_or(heads).into());
    put("head_dim", head_dim.into());
    put("max_position_embeddings", keys.required("context_length")?.into());
    let eps = "attention.layer_norm_rms_epsilon";
    let missing = || GgufError::MissingKey { key: keys.name(eps) };
    put("rms_norm_eps", keys.float(eps)?.ok_or_else(missing)?.into());
    put("vocab_size", keys.dimension("token_embd.weight", 1)?.into());
    put("tie_word_embeddings", (!keys.has("output.weight")).into());
    put("rope_theta", keys.float("rope.freq_base")?.unwrap_or(10_000.0).into());
    if let Some(scaling) = rope_scaling(keys, head_dim)? {
        put("rope_scaling", scaling);
    }
    Ok(config)
}

fn rope_scaling(keys: &Keys<'_, '_>, head_dim: u64) -> Result<Option<Value>, GgufError> {
    let kind = keys.gguf.metadata.text(&keys.name("rope.scaling.type"))?;
    let factor = keys.float("rope.scaling.factor")?;
    let original = keys.whole("rope.scaling.original_context_length")?;
    let missing = |key: &str| GgufError::MissingKey { key: keys.name(key) };
    let of_file = match kind {
        None | Some("none") => None,
        Some("linear") => {
            let factor = factor.ok_or_else(|| missing("rope.scaling.factor"))?;
            Some(json!({ "rope_type": "linear", "factor": factor }))
        }
        Some("yarn") => {
            let mut scaling = json!({
                "rope_type": "yarn",
                "factor": factor.ok_or_else(|| missing("rope.scaling.factor"))?,
                "original_max_position_embeddings":
                    original.ok_or_else(|| missing("rope.scaling.original_context_length"))?,
            });
            for (key, name) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                if let Some(value) = keys.float(&format!("rope.scaling.{key}"))? {
                    scaling[name] = value.into();
                }
            }
            Some(scaling)
        }
        Some(_) => return Err(keys.invalid("rope.scaling.type", "known are none, linear and yarn")),
    };
    let Some(factors) = keys.gguf.tensors.get("rope_freqs.weight") else { return Ok(of_file) };
    let unknown =
        |reason: &str| GgufError::Tensor { tensor: "rope_freqs.weight".to_owned(), reason: reason.to_owned() };
    if of_file.is_some() {
        return Err(unknown("the file scales its frequencies twice"));
    }
    let factors = factors.kind.widen(factors.data)?;
    let theta = keys.float("rope.freq_base")?.unwrap_or(10_000.0);
    llama3(&factors, theta, head_dim).map(Some).ok_or_else(|| unknown("it holds no factors of Llama 3's kind"))
}

/// Llama 3's scaling, if `factors` divide the frequencies as it does.
fn llama3(factors: &[f32], theta: f64, head_dim: u64) -> Option<Value> {
    let (low, high, original) = LLAMA3;
    let factor = f64::from(factors.iter().copied().fold(0.0, f32::max));
    let expected = |pair: usize| {
        let frequency = theta.powf(-(2.0 * pair as f64) / head_dim as f64);
        let waves = original as f64 * frequency / std::f64::consts::TAU;
        if waves > high {
            1.0
        } else if waves < low {
            factor
        } else {
            let smooth = (waves - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    // The writer computes them in f32.
    let close = |(pair, found): (usize, &f32)| (f64::from(*found) / expected(pair) - 1.0).abs() < 1e-4;
    let fits = factors.len() as u64 * 2 == head_dim && factor > 1.0 && factors.iter().enumerate().all(close);
    fits.then(|| {
        json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        })
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_of_llama_3_are_known_and_others_are_not() {
        // Llama 3.2's, as the converter computes them: the first pairs keep their frequency, the last are slowed 32 times.
        let factors: Vec<f32> = (0..32)
            .map(|pair| {
                let wavelength = std::f32::consts::TAU * 500_000f32.powf(2.0 * pair as f32 / 64.0);
                if wavelength < 2048.0 {
                    1.0
                } else if wavelength > 8192.0 {
                    32.0
                } else {
                    let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                    1.0 / ((1.0 - smooth) / 32.0 + smooth)
                }
            })
            .collect();
        assert_eq!(llama3(&factors, 500_000.0, 64).unwrap()["factor"], 32.0);
        assert_eq!(llama3(&factors, 10_000.0, 64), None);
        assert_eq!(llama3(&factors[1..], 500_000.0, 64), None);
        let mut other = factors;
        other[3] = 1.01;
        assert_eq!(llama3(&other, 500_000.0, 64), None);
    }
}
