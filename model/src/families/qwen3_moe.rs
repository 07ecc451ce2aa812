//! Qwen3-MoE. Source: arXiv:2505.09388.

use super::decoder::{Decoder, Defaults, read_used_window};
use super::qwen2_moe::read_feed_forward;
use super::{Family, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GroupedQuerySpec, ModelSpec, QkNorm};

pub(super) const FAMILY: Family = Family { name: "qwen3_moe", spec, tensors: TensorNames::MLP };

const DEFAULTS: Defaults = Defaults { kv_heads: Some(4), ..Defaults::new(1e-6, 1e4) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, &DEFAULTS)?;
    let bias = config.flag("attention_bias", false)?;
    // All layers have the window or none has; `max_window_layers` is not looked at.
    let sliding_window = read_used_window(config)?;
    let attention = GroupedQuerySpec {
        qkv_bias: bias,
        o_bias: bias,
        qk_norm: QkNorm::PerHead,
        sliding_window,
        ..decoder.attention()
    };
    let feed_forward = read_feed_forward(config, decoder.layers, None)?;
    Ok(decoder.uniform(FAMILY.name, AttentionSpec::GroupedQuery(attention), feed_forward))
}
