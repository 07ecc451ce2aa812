//! Llama and what has its form, such as SmolLM: dense, so that nothing is asked of peers. Source: arXiv:2302.13971.

use super::decoder::{Decoder, Defaults, read_dense};
use super::{Family, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GroupedQuerySpec, ModelSpec};

pub(super) const FAMILY: Family = Family { name: "llama", spec, tensors: TensorNames::MLP };

const DEFAULTS: Defaults = Defaults::new(1e-6, 1e4);

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, &DEFAULTS)?;
    let bias = config.flag("attention_bias", false)?;
    let attention = GroupedQuerySpec { qkv_bias: bias, o_bias: bias, ..decoder.attention() };
    let feed_forward = read_dense(config, decoder.layers)?;
    Ok(decoder.uniform(FAMILY.name, AttentionSpec::GroupedQuery(attention), feed_forward))
}
