//! dots.llm1. Source: arXiv:2506.05767.

use super::decoder::{Decoder, Defaults, MAX_LAYERS, MAX_POSITIONS, read_windows, windowed};
use super::latent::{read_corrected_moe, read_feed_forward};
use super::{Family, deepseek_v3};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{GroupedQuerySpec, ModelSpec, QkNorm};

pub(super) const FAMILY: Family = Family { name: "dots1", spec, tensors: deepseek_v3::TENSORS };

const DEFAULTS: Defaults = Defaults::new(1e-6, 1e4);

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, &DEFAULTS)?;
    let bias = config.flag("attention_bias", false)?;
    let attention = GroupedQuerySpec { qkv_bias: bias, o_bias: bias, qk_norm: QkNorm::PerHead, ..decoder.attention() };
    let window = config.whole("sliding_window", 1, MAX_POSITIONS)?;
    let full = config.whole("max_window_layers", 0, MAX_LAYERS)?.unwrap_or(62);
    let windows = read_windows(config, decoder.layers, window, |layer| layer >= full)?;
    let moe = read_corrected_moe(config, false)?;
    let feed_forward = read_feed_forward(config, decoder.layers, &moe)?;
    Ok(decoder.model(FAMILY.name, windowed(&attention, windows, feed_forward)))
}
