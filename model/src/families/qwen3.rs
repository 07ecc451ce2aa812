//! Qwen3, dense. Source: arXiv:2505.09388.

use super::decoder::{Decoder, Defaults, MAX_SIZE, dense};
use super::qwen2_moe::read_windows;
use super::{DENSE, Family};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{GroupedQuerySpec, ModelSpec, QkNorm};

pub(super) const FAMILY: Family = Family { name: "qwen3", spec, tensors: DENSE };

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-6, rope_theta: 1e4, kv_heads: Some(32) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    // The family's heads have 128 values where nobody says otherwise, not as many as the hidden size gives: it must be said.
    config.size("head_dim", MAX_SIZE)?;
    let decoder = Decoder::read(config, &DEFAULTS)?;
    let bias = config.flag("attention_bias", false)?;
    let attention = GroupedQuerySpec { qkv_bias: bias, o_bias: bias, qk_norm: QkNorm::PerHead, ..decoder.attention() };
    let windows = read_windows(config, decoder.layers, |layer, from| layer >= from)?;
    let windowed = |sliding_window| GroupedQuerySpec { sliding_window, ..attention.clone() };
    let layers = dense(config, windows.into_iter().map(windowed).collect())?;
    Ok(decoder.model(FAMILY.name, layers))
}
