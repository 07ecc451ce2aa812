//! Qwen2 and Qwen2.5, dense. Source: arXiv:2407.10671.

use super::decoder::{Decoder, Defaults, MAX_LAYERS, read_dense, read_used_window, read_windows, windowed};
use super::{Family, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{GroupedQuerySpec, ModelSpec};

pub(super) const FAMILY: Family = Family { name: "qwen2", spec, tensors: TensorNames::MLP };

const DEFAULTS: Defaults = Defaults { kv_heads: Some(32), ..Defaults::new(1e-6, 1e4) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, &DEFAULTS)?;
    // Queries, keys and values have biases although no key says so.
    let attention = GroupedQuerySpec { qkv_bias: true, ..decoder.attention() };
    let full = config.whole("max_window_layers", 0, MAX_LAYERS)?.unwrap_or(28);
    let windows = read_windows(config, decoder.layers, read_used_window(config)?, |layer| layer >= full)?;
    let feed_forward = read_dense(config, decoder.layers)?;
    Ok(decoder.model(FAMILY.name, windowed(&attention, windows, feed_forward)))
}
