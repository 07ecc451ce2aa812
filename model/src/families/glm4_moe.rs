//! GLM-4.5 and what followed it. Source: arXiv:2508.06471.

use super::decoder::{Decoder, Defaults};
use super::latent::{read_corrected_moe, read_feed_forward};
use super::{Family, deepseek_v3};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GroupedQuerySpec, ModelSpec, QkNorm};

pub(super) const FAMILY: Family = Family { name: "glm4_moe", spec, tensors: deepseek_v3::TENSORS };

const DEFAULTS: Defaults = Defaults { kv_heads: Some(8), ..Defaults::new(1e-5, 1e4) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read_partial(config, &DEFAULTS, 0.5)?;
    let attention = GroupedQuerySpec {
        qkv_bias: config.flag("attention_bias", false)?,
        qk_norm: if config.flag("use_qk_norm", false)? { QkNorm::PerHead } else { QkNorm::None },
        ..decoder.attention()
    };
    let moe = read_corrected_moe(config, true)?;
    let feed_forward = read_feed_forward(config, decoder.layers, &moe)?;
    Ok(decoder.uniform(FAMILY.name, AttentionSpec::GroupedQuery(attention), feed_forward))
}
