//! Mistral, dense. Source: arXiv:2310.06825.

use super::decoder::{Decoder, Defaults, MAX_POSITIONS, dense};
use super::{DENSE, Family};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{GroupedQuerySpec, ModelSpec};

pub(super) const FAMILY: Family = Family { name: "mistral", spec, tensors: DENSE };

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-6, rope_theta: 1e4, kv_heads: Some(8) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, &DEFAULTS)?;
    let sliding_window = match config.whole("sliding_window", 1, MAX_POSITIONS)? {
        None if !config.has("sliding_window") => Some(4096),
        other => other,
    };
    let attention = GroupedQuerySpec { sliding_window, ..decoder.attention() };
    let layers = dense(config, vec![attention; decoder.layers])?;
    Ok(decoder.model(FAMILY.name, layers))
}
