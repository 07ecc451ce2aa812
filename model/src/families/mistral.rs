//! Mistral, dense. Source: arXiv:2310.06825.

use super::decoder::{Decoder, Defaults, MAX_POSITIONS, read_dense};
use super::{Family, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GroupedQuerySpec, ModelSpec};

pub(super) const FAMILY: Family = Family { name: "mistral", spec, tensors: TensorNames::MLP };

const DEFAULTS: Defaults = Defaults { kv_heads: Some(8), ..Defaults::new(1e-6, 1e4) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, &DEFAULTS)?;
    let sliding_window = match config.whole("sliding_window", 1, MAX_POSITIONS)? {
        None if !config.has("sliding_window") => Some(4096),
        other => other,
    };
    let attention = GroupedQuerySpec { sliding_window, ..decoder.attention() };
    let feed_forward = read_dense(config, decoder.layers)?;
    Ok(decoder.uniform(FAMILY.name, AttentionSpec::GroupedQuery(attention), feed_forward))
}
