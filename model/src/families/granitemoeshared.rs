//! IBM Granite MoE with a shared expert beside the routed ones.

use super::decoder::MAX_SIZE;
use super::{Family, SharedNames, granitemoe};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{ModelSpec, SharedExpertSpec};

pub(super) const FAMILY: Family = Family {
    name: "granitemoeshared",
    spec,
    tensors: granitemoe::tensors(SharedNames::Fused(
        "shared_mlp.input_linear.weight",
        "shared_mlp.output_linear.weight",
    )),
};

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    // Zero or absent: the model has no shared expert.
    let width = config.whole("shared_intermediate_size", 0, MAX_SIZE)?.unwrap_or(0);
    let shared = (width > 0).then_some(SharedExpertSpec { intermediate_size: width, gated: false });
    granitemoe::spec(config, FAMILY.name, shared)
}
