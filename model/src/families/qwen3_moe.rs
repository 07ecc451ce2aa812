//! Qwen3-MoE. Source: arXiv:2505.09388.

use super::decoder::{Decoder, Defaults, MAX_POSITIONS};
use super::qwen2_moe::read_feed_forward;
use super::{Family, MLP_EXPERTS, MLP_FUSED, SharedNames, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GroupedQuerySpec, LayerSpec, ModelSpec, QkNorm};

pub(super) const FAMILY: Family = Family {
    name: "qwen3_moe",
    spec,
    tensors: TensorNames {
        gate: &["mlp.gate.weight"],
        expert: Some(MLP_EXPERTS),
        fused: MLP_FUSED,
        shared: SharedNames::None,
    },
};

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-6, rope_theta: 1e4, kv_heads: Some(4) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, &DEFAULTS)?;
    let bias = config.flag("attention_bias", false)?;
    // All layers have the window or none has; `max_window_layers` is not looked at.
    let sliding_window = if !config.flag("use_sliding_window", false)? {
        None
    } else if config.has("sliding_window") {
        config.whole("sliding_window", 1, MAX_POSITIONS)?
    } else {
        Some(4096)
    };
    let attention = GroupedQuerySpec {
        qkv_bias: bias,
        o_bias: bias,
        qk_norm: QkNorm::PerHead,
        sliding_window,
        ..decoder.attention()
    };
    let layers = read_feed_forward(config, decoder.layers, None)?
        .into_iter()
        .map(|feed_forward| LayerSpec { attention: AttentionSpec::GroupedQuery(attention.clone()), feed_forward })
        .collect();
    Ok(decoder.model(FAMILY.name, layers))
}
