//! Llama, dense: Llama 2 and 3, SmolLM, and what else calls itself so. Source: arXiv:2302.13971, arXiv:2407.21783.

use super::decoder::{Decoder, Defaults, dense};
use super::{DENSE, Family};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{GroupedQuerySpec, ModelSpec};

pub(super) const FAMILY: Family = Family { name: "llama", spec, tensors: DENSE };

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-6, rope_theta: 1e4, kv_heads: None };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, &DEFAULTS)?;
    if config.flag("mlp_bias", false)? {
        return Err(config.invalid("mlp_bias", "biases in feed-forward layers are not supported"));
    }
    let bias = config.flag("attention_bias", false)?;
    let attention = GroupedQuerySpec { qkv_bias: bias, o_bias: bias, ..decoder.attention() };
    let layers = dense(config, vec![attention; decoder.layers])?;
    Ok(decoder.model(FAMILY.name, layers))
}
