//! The part of `config.json` that all families share: sizes, norms, heads.

use super::rope::{Rotated, read_rope, score_factor};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{
    Activation, AttentionSpec, FeedForwardSpec, GateSpec, GroupedQuerySpec, LayerSpec, ModelSpec, MoeSpec, QkNorm,
    RopeSpec,
};

/// The number of routed experts: Mixtral and Granite call it so, and transformers 5 in every family.
pub(super) const NUM_LOCAL_EXPERTS: [&str; 2] = ["num_local_experts", "num_experts"];
/// The number of routed experts in the other families.
pub(super) const NUM_EXPERTS: [&str; 2] = ["num_experts", "num_local_experts"];
/// The number of routed experts in DeepSeek and what followed it.
pub(super) const N_ROUTED_EXPERTS: [&str; 2] = ["n_routed_experts", "num_local_experts"];

/// Upper bounds of sizes. Their products stay far below the range of `usize`.
pub(super) const MAX_LAYERS: usize = 1024;
/// Routed experts of a layer, as in adverts.
pub(super) const MAX_EXPERTS: usize = 4096;
/// Values of one row, or outputs of a matrix.
pub(super) const MAX_SIZE: usize = 1 << 20;
const MAX_VOCAB: usize = 1 << 24;
pub(super) const MAX_HEADS: usize = 1 << 14;
pub(super) const MAX_HEAD_DIM: usize = 1 << 14;
pub(super) const MAX_POSITIONS: usize = 1 << 30;

/// What a family assumes when `config.json` leaves a key out: what the configuration classes of transformers say.
/// Only for keys that hub folders do leave out: a wrong guess computes something else, and nobody notices.
pub(super) struct Defaults {
    pub(super) rms_norm_eps: f64,
    pub(super) rope_theta: f64,
    /// `None`: as many as query heads.
    pub(super) kv_heads: Option<usize>,
    pub(super) tied_embeddings: bool,
}

impl Defaults {
    /// As many key/value heads as query heads, and an LM head of its own.
    pub(super) const fn new(rms_norm_eps: f64, rope_theta: f64) -> Self {
        Self { rms_norm_eps, rope_theta, kv_heads: None, tied_embeddings: false }
    }
}

/// The keys common to all families.
pub(super) struct Decoder {
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) layers: usize,
    pub(super) max_positions: usize,
    pub(super) rope: RopeSpec,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    /// What latent attention multiplies its scores by besides their scale.
    pub(super) score_factor: f32,
    rms_norm_eps: f32,
    tied_embeddings: bool,
    head_dim: usize,
}

impl Decoder {
    /// For a family that rotates whole heads.
    pub(super) fn read(config: &Config<'_>, defaults: &Defaults) -> Result<Self, ConfigError> {
        Self::with_heads(config, defaults, Rotated::Whole(read_head_dim(config)?))
    }

    /// For a family that rotates a part of each head: so much of it where the config does not say.
    pub(super) fn read_partial(config: &Config<'_>, defaults: &Defaults, factor: f64) -> Result<Self, ConfigError> {
        Self::with_heads(config, defaults, Rotated::Part { of: read_head_dim(config)?, factor })
    }

    pub(super) fn with_heads(config: &Config<'_>, defaults: &Defaults, rotated: Rotated) -> Result<Self, ConfigError> {
        let heads = config.size("num_attention_heads", MAX_HEADS)?;
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
            hidden_size: config.size("hidden_size", MAX_SIZE)?,
            layers: config.size("num_hidden_layers", MAX_LAYERS)?,
            max_positions,
            rope: read_rope(config, defaults.rope_theta, max_positions, rotated)?,
            heads,
            kv_heads,
            score_factor: score_factor(config)?,
            rms_norm_eps: config.positive("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps) as f32,
            tied_embeddings: config.flag("tie_word_embeddings", defaults.tied_embeddings)?,
            head_dim: rotated.head_dim(),
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
            sinks: false,
        }
    }

    /// The model whose layers all attend in the same way, without multipliers.
    pub(super) fn uniform(
        self,
        family: &'static str,
        attention: AttentionSpec,
        feed_forward: Vec<FeedForwardSpec>,
    ) -> ModelSpec {
        let layer = |feed_forward| LayerSpec { attention: attention.clone(), feed_forward };
        self.model(family, feed_forward.into_iter().map(layer).collect())
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
    moe_of(config, experts, "num_experts_per_tok", intermediate_key, gate)
}

/// Reads the rest of so many routed experts.
pub(super) fn moe_of(
    config: &Config<'_>,
    experts: usize,
    top_k_key: &str,
    intermediate_key: &str,
    gate: GateSpec,
) -> Result<MoeSpec, ConfigError> {
    let top_k = config.size(top_k_key, MAX_EXPERTS)?;
    if top_k > experts {
        return Err(config.invalid(top_k_key, format!("there are only {experts} experts")));
    }
    let intermediate_size = config.size(intermediate_key, MAX_SIZE)?;
    let activation = Activation::Swiglu;
    Ok(MoeSpec { experts, top_k, intermediate_size, activation, expert_biases: false, gate, shared: None })
}

/// Values of a head, of a family whose heads are alike.
pub(super) fn read_head_dim(config: &Config<'_>) -> Result<usize, ConfigError> {
    let hidden_size = config.size("hidden_size", MAX_SIZE)?;
    let heads = config.size("num_attention_heads", MAX_HEADS)?;
    let head_dim = match config.whole("head_dim", 1, MAX_HEAD_DIM)? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let reason = format!("it is not a multiple of `num_attention_heads` ({heads}) and there is no `head_dim`");
            return Err(config.invalid("hidden_size", reason));
        }
    };
    if !head_dim.is_multiple_of(2) {
        let key = if config.has("head_dim") { "head_dim" } else { "hidden_size" };
        return Err(config.invalid(key, format!("heads of {head_dim} values cannot rotate: it must be even")));
    }
    Ok(head_dim)
}

/// The sliding window of each layer, as `layer_types` says; without it, of the layers that have it by default.
pub(super) fn read_windows(
    config: &Config<'_>,
    layers: usize,
    window: Option<usize>,
    by_default: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let Some(kinds) = config.list("layer_types")? else {
        return Ok((0..layers).map(|layer| window.filter(|_| by_default(layer))).collect());
    };
    if kinds.len() != layers {
        return Err(config.invalid("layer_types", format!("there are {layers} layers")));
    }
    kinds
        .iter()
        .map(|kind| match (kind.as_str(), window) {
            (Some("full_attention"), _) => Ok(None),
            (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
            (Some("sliding_attention"), None) => {
                Err(config.invalid("layer_types", "sliding attention needs a `sliding_window` that is used"))
            }
            _ => Err(config.invalid("layer_types", "known kinds are full_attention and sliding_attention")),
        })
        .collect()
}

/// Layers that attend alike but for their windows.
pub(super) fn windowed(
    attention: &GroupedQuerySpec,
    windows: Vec<Option<usize>>,
    feed_forward: Vec<FeedForwardSpec>,
) -> Vec<LayerSpec> {
    let attention = |sliding_window| GroupedQuerySpec { sliding_window, ..attention.clone() };
    let layer =
        |(window, feed_forward)| LayerSpec { attention: AttentionSpec::GroupedQuery(attention(window)), feed_forward };
    windows.into_iter().zip(feed_forward).map(layer).collect()
}

/// The window of families that have one only where `use_sliding_window` says so.
pub(super) fn read_used_window(config: &Config<'_>) -> Result<Option<usize>, ConfigError> {
    if !config.flag("use_sliding_window", false)? {
        return Ok(None);
    }
    if !config.has("sliding_window") {
        return Ok(Some(4096));
    }
    config.whole("sliding_window", 1, MAX_POSITIONS)
}

/// The block after attention of each layer of a dense model.
pub(super) fn read_dense(config: &Config<'_>, layers: usize) -> Result<Vec<FeedForwardSpec>, ConfigError> {
    for key in ["num_experts", "num_local_experts"] {
        if config.whole(key, 0, MAX_EXPERTS)?.is_some_and(|experts| experts > 1) {
            return Err(config.invalid(key, "this family is dense"));
        }
    }
    if config.flag("mlp_bias", false)? {
        return Err(config.invalid("mlp_bias", "biases are not supported in this family"));
    }
    Ok(vec![FeedForwardSpec::Dense { intermediate_size: config.size("intermediate_size", MAX_SIZE)? }; layers])
}
