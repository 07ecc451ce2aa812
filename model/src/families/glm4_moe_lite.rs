//! GLM-4.7-Flash: DeepSeek V3 with other sizes.

use super::decoder::Defaults;
use super::{Family, deepseek_v3};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::ModelSpec;

pub(super) const FAMILY: Family = Family { name: "glm4_moe_lite", spec, tensors: deepseek_v3::TENSORS };

const DEFAULTS: Defaults = Defaults::new(1e-5, 1e4);

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    for owner in [Some(Config::clone(config)), config.object("rope_parameters")?].into_iter().flatten() {
        if owner.positive("partial_rotary_factor")?.is_some_and(|partial| partial != 1.0) {
            return Err(owner.invalid("partial_rotary_factor", "`qk_rope_head_dim` says what rotates"));
        }
    }
    if config.list("mlp_layer_types")?.is_none() && config.value("first_k_dense_replace").is_none() {
        return Err(config.missing("first_k_dense_replace"));
    }
    deepseek_v3::spec(config, FAMILY.name, &DEFAULTS)
}
