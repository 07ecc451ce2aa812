//! The part of `config.json` that all families share: sizes, norms, heads, rope.

use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{
    AttentionSpec, FeedForwardSpec, GateSpec, GroupedQuerySpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, RopeScaling,
    RopeSpec,
};

/// The number of routed experts: Mixtral and Granite call it so, and transformers 5 in every family.
pub(super) const NUM_LOCAL_EXPERTS: [&str; 2] = ["num_local_experts", "num_experts"];
/// The number of routed experts in the other families.
pub(super) const NUM_EXPERTS: [&str; 2] = ["num_experts", "num_local_experts"];

/// Upper bounds of sizes. Their products stay far below the range of `usize`.
pub(super) const MAX_LAYERS: usize = 1024;
pub(super) const MAX_EXPERTS: usize = 4096;
pub(super) const MAX_SIZE: usize = 1 << 20;
const MAX_VOCAB: usize = 1 << 24;
const MAX_HEADS: usize = 1 << 14;
const MAX_HEAD_DIM: usize = 1 << 14;
pub(super) const MAX_POSITIONS: usize = 1 << 30;

/// What a family assumes when `config.json` leaves a key out: what the configuration classes of transformers say.
/// Only for keys that hub folders do leave out: a wrong guess computes something else, and nobody notices.
pub(super) struct Defaults {
    pub(super) rms_norm_eps: f64,
    pub(super) rope_theta: f64,
    /// `None`: as many as query heads.
    pub(super) kv_heads: Option<usize>,
}

/// The keys common to all families.
pub(super) struct Decoder {
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) layers: usize,
    pub(super) max_positions: usize,
    rms_norm_eps: f32,
    tied_embeddings: bool,
    rope: RopeSpec,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Decoder {
    pub(super) fn read(config: &Config<'_>, defaults: &Defaults) -> Result<Self, ConfigError> {
        let hidden_size = config.size("hidden_size", MAX_SIZE)?;
        let heads = config.size("num_attention_heads", MAX_HEADS)?;
        let head_dim = match config.whole("head_dim", 1, MAX_HEAD_DIM)? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                let reason =
                    format!("it is not a multiple of `num_attention_heads` ({heads}) and there is no `head_dim`");
                return Err(config.invalid("hidden_size", reason));
            }
        };
        if !head_dim.is_multiple_of(2) {
            let key = if config.has("head_dim") { "head_dim" } else { "hidden_size" };
            return Err(config.invalid(key, format!("heads of {head_dim} values cannot rotate: it must be even")));
        }
        let kv_heads = match (config.whole("num_key_value_heads", 1, MAX_HEADS)?, defaults.kv_heads) {
            (Some(kv_heads), _) => kv_heads,
            (None, Some(default)) if !config.has("num_key_value_heads") => default,
            (None, _) => heads,
        };
        if !heads.is_multiple_of(kv_heads) {
            let reason = format!("{kv_heads} key/value heads do not divide `num_attention_heads` ({heads})");
            return Err(config.invalid("num_key_value_heads", reason));
        }
        let max_positions = config.size("max_position_embeddings", MAX_POSITIONS)?;
        match config.text("hidden_act")? {
            None | Some("silu" | "swish") => {}
            Some(_) => return Err(config.invalid("hidden_act", "only silu is supported")),
        }
        Ok(Self {
            vocab_size: config.size("vocab_size", MAX_VOCAB)?,
            hidden_size,
            layers: config.size("num_hidden_layers", MAX_LAYERS)?,
            max_positions,
            rms_norm_eps: config.positive("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps) as f32,
            tied_embeddings: config.flag("tie_word_embeddings", false)?,
            rope: read_rope(config, defaults.rope_theta, max_positions)?,
            heads,
            kv_heads,
            head_dim,
        })
    }

    /// Plain grouped-query attention: no bias, no norm, no window.
    pub(super) fn attention(&self) -> GroupedQuerySpec {
        GroupedQuerySpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: (self.head_dim as f64).powf(-0.5) as f32,
            qkv_bias: false,
            o_bias: false,
            qk_norm: QkNorm::None,
            clip_qkv: None,
            sliding_window: None,
        }
    }

    /// The model, without multipliers.
    pub(super) fn model(self, family: &'static str, layers: Vec<LayerSpec>) -> ModelSpec {
        ModelSpec {
            family,
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            layers,
            max_positions: self.max_positions,
            rms_norm_eps: self.rms_norm_eps,
            tied_embeddings: self.tied_embeddings,
            rope: self.rope,
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logits_scaling: 1.0,
        }
    }
}

/// Reads the routed experts: `experts_keys` name their number, the classic key first, and `intermediate_key` their
/// width. The gate and the shared expert are the family's.
pub(super) fn read_moe(
    config: &Config<'_>,
    experts_keys: [&'static str; 2],
    intermediate_key: &str,
    gate: GateSpec,
) -> Result<MoeSpec, ConfigError> {
    let experts = config.size_of_either(experts_keys, MAX_EXPERTS)?;
    let top_k = config.size("num_experts_per_tok", MAX_EXPERTS)?;
    if top_k > experts {
        return Err(config.invalid("num_experts_per_tok", format!("there are only {experts} experts")));
    }
    let intermediate_size = config.size(intermediate_key, MAX_SIZE)?;
    Ok(MoeSpec { experts, top_k, intermediate_size, gate, shared: None })
}

/// Dense layers that attend so.
pub(super) fn dense(config: &Config<'_>, attention: Vec<GroupedQuerySpec>) -> Result<Vec<LayerSpec>, ConfigError> {
    let intermediate_size = config.size("intermediate_size", MAX_SIZE)?;
    let layer = |attention| LayerSpec {
        attention: AttentionSpec::GroupedQuery(attention),
        feed_forward: FeedForwardSpec::Dense { intermediate_size },
    };
    Ok(attention.into_iter().map(layer).collect())
}

/// Reads rope in the classic form (`rope_theta`, `rope_scaling`) or the newer one (`rope_parameters`).
fn read_rope(config: &Config<'_>, default_theta: f64, max_positions: usize) -> Result<RopeSpec, ConfigError> {
    const ABOVE_ONE: &str = "a finite number above 1";
    let outer_theta = config.number("rope_theta", |v| v > 1.0, ABOVE_ONE)?;
    let outer_partial = config.positive("partial_rotary_factor")?;
    let scaling = match config.object("rope_scaling")? {
        Some(scaling) => Some(scaling),
        None => config.object("rope_parameters")?,
    };
    let Some(rope) = scaling else {
        return Ok(RopeSpec { theta: outer_theta.unwrap_or(default_theta), scaling: RopeScaling::None });
    };
    if let Some(key) = rope.nested().next() {
        return Err(rope.invalid(key, "rope that differs between kinds of layers is not supported"));
    }
    let theta = rope.number("rope_theta", |v| v > 1.0, ABOVE_ONE)?.or(outer_theta).unwrap_or(default_theta);
    let kind_key = rope.first(&["rope_type", "type"]);
    let kind = rope.text(kind_key)?.unwrap_or("default");
    // The families here rotate whole heads. Their reference ignores the factor for plain rope and fails otherwise.
    if let Some(partial) = rope.positive("partial_rotary_factor")?.or(outer_partial)
        && partial != 1.0
    {
        if kind == "default" {
            tracing::warn!(partial_rotary_factor = partial, "ignored: this family rotates whole heads");
            return Ok(RopeSpec { theta, scaling: RopeScaling::None });
        }
        let owner = if rope.has("partial_rotary_factor") { &rope } else { config };
        return Err(owner.invalid("partial_rotary_factor", "this family rotates whole heads"));
    }
    let original = || -> Result<f64, ConfigError> {
        let outer = config.whole("original_max_position_embeddings", 1, MAX_POSITIONS)?;
        let inner = rope.whole("original_max_position_embeddings", 1, MAX_POSITIONS)?;
        Ok(outer.or(inner).unwrap_or(max_positions) as f64)
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        // Its base changes only beyond `max_position_embeddings`, where no sequence of ours goes.
        "dynamic" => rope.required_positive("factor").map(|_| RopeScaling::None)?,
        "linear" => RopeScaling::Linear { factor: rope.required_positive("factor")? },
        "yarn" => {
            let original_max_positions = original()?;
            let factor = match rope.positive("factor")? {
                Some(factor) => factor,
                None if rope.has("factor") => max_positions as f64 / original_max_positions,
                None => rope.required_positive("factor")?,
            };
            let at_least_zero = |key| rope.number(key, |v| v >= 0.0, "a finite number, 0 or above");
            // In the reference 0 and absent are the same for these four.
            let nonzero = |key| at_least_zero(key).map(|v| v.filter(|v| *v != 0.0));
            let attention_factor =
                match (at_least_zero("attention_factor")?, nonzero("mscale")?, nonzero("mscale_all_dim")?) {
                    (Some(given), _, _) => given,
                    (None, Some(mscale), Some(all_dim)) => yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim),
                    (None, _, _) => yarn_mscale(factor, 1.0),
                };
            RopeScaling::Yarn {
                factor,
                attention_factor,
                beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
                beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
                original_max_positions,
                truncate: rope.flag("truncate", true)?,
            }
        }
        "llama3" => {
            let low_freq_factor = rope.required_positive("low_freq_factor")?;
            let high_freq_factor = rope.required_positive("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                return Err(rope.invalid("high_freq_factor", "it must be above `low_freq_factor`"));
            }
            RopeScaling::Llama3 {
                factor: rope.required_positive("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_positions: original()?,
            }
        }
        _ => return Err(rope.invalid(kind_key, "known kinds of rope are default, linear, dynamic, yarn and llama3")),
    };
    Ok(RopeSpec { theta, scaling })
}

fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
