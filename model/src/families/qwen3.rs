//! Dense Qwen3: nothing is asked of peers. Source: arXiv:2505.09388.

use super::decoder::{Decoder, Defaults, MAX_LAYERS, read_dense, read_used_window, read_windows, windowed};
use super::{Family, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{GroupedQuerySpec, ModelSpec, QkNorm};

pub(super) const FAMILY: Family = Family { name: "qwen3", spec, tensors: TensorNames::MLP };

const DEFAULTS: Defaults = Defaults { kv_heads: Some(32), ..Defaults::new(1e-6, 1e4) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    if config.value("head_dim").is_none() {
        // The reference takes 128, whatever the hidden size.
        return Err(config.missing("head_dim"));
    }
    let decoder = Decoder::read(config, &DEFAULTS)?;
    let bias = config.flag("attention_bias", false)?;
    let attention = GroupedQuerySpec { qkv_bias: bias, o_bias: bias, qk_norm: QkNorm::PerHead, ..decoder.attention() };
    let full = config.whole("max_window_layers", 0, MAX_LAYERS)?.unwrap_or(28);
    let windows = read_windows(config, decoder.layers, read_used_window(config)?, |layer| layer >= full)?;
    let feed_forward = read_dense(config, decoder.layers)?;
    Ok(decoder.model(FAMILY.name, windowed(&attention, windows, feed_forward)))
}
