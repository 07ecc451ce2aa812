//! Qwen2 and Qwen2.5, dense. Source: arXiv:2407.10671.

use super::decoder::{Decoder, Defaults, dense};
use super::qwen2_moe::read_windows;
use super::{DENSE, Family};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{GroupedQuerySpec, ModelSpec};

pub(super) const FAMILY: Family = Family { name: "qwen2", spec, tensors: DENSE };

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-6, rope_theta: 1e4, kv_heads: Some(32) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, &DEFAULTS)?;
    // Queries, keys and values have biases although no key says so.
    let attention = GroupedQuerySpec { qkv_bias: true, ..decoder.attention() };
    let windows = read_windows(config, decoder.layers, |layer, from| layer >= from)?;
    let windowed = |sliding_window| GroupedQuerySpec { sliding_window, ..attention.clone() };
    let layers = dense(config, windows.into_iter().map(windowed).collect())?;
    Ok(decoder.model(FAMILY.name, layers))
}
