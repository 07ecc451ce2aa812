//! DeepSeek V2 and V2-Lite. Source: arXiv:2405.04434.

use super::decoder::{Defaults, N_ROUTED_EXPERTS, read_moe};
use super::latent::{self, only, read_feed_forward, read_groups, read_shared};
use super::{Family, deepseek_v3};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, GateSpec, ModelSpec, Scoring};

pub(super) const FAMILY: Family = Family { name: "deepseek_v2", spec, tensors: deepseek_v3::TENSORS };

const DEFAULTS: Defaults = Defaults::new(1e-6, 1e4);

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let (decoder, attention) = latent::read(config, &DEFAULTS)?;
    only(config, "scoring_func", &["softmax"])?;
    only(config, "topk_method", &["greedy", "group_limited_greedy"])?;
    if config.flag("norm_topk_prob", false)? {
        // No published model has it, and the implementations that there are disagree.
        return Err(config.invalid("norm_topk_prob", "this family is computed without it only"));
    }
    if config.flag("mlp_bias", false)? {
        return Err(config.invalid("mlp_bias", "biases of experts are not supported in this family"));
    }
    let scale = config.positive("routed_scaling_factor")?.unwrap_or(1.0) as f32;
    let gate = GateSpec { scale, ..GateSpec::new(Scoring::Softmax) };
    let mut moe = read_moe(config, N_ROUTED_EXPERTS, "moe_intermediate_size", gate)?;
    if config.text("topk_method")? == Some("group_limited_greedy") {
        moe.gate.groups = read_groups(config, moe.experts, moe.top_k, 1)?;
    }
    moe.shared = read_shared(config, "n_shared_experts", 0, moe.intermediate_size)?;
    let feed_forward = read_feed_forward(config, decoder.layers, &moe)?;
    Ok(decoder.uniform(FAMILY.name, AttentionSpec::Latent(attention), feed_forward))
}
