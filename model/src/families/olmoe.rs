//! OLMoE. Source: arXiv:2409.02060.

use super::decoder::{Decoder, Defaults, NUM_EXPERTS, read_moe};
use super::{Family, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, FeedForwardSpec, GateSpec, GroupedQuerySpec, ModelSpec, QkNorm, Scoring};

pub(super) const FAMILY: Family = Family { name: "olmoe", spec, tensors: TensorNames::MLP };

const DEFAULTS: Defaults = Defaults::new(1e-5, 1e4);

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, &DEFAULTS)?;
    let bias = config.flag("attention_bias", false)?;
    let attention = GroupedQuerySpec {
        qkv_bias: bias,
        o_bias: bias,
        qk_norm: QkNorm::WholeVector,
        clip_qkv: config.positive("clip_qkv")?.map(|limit| limit as f32),
        ..decoder.attention()
    };
    let renormalise = config.flag("norm_topk_prob", false)?;
    let moe = read_moe(
        config,
        NUM_EXPERTS,
        "intermediate_size",
        GateSpec { renormalise, ..GateSpec::new(Scoring::Softmax) },
    )?;
    let feed_forward = vec![FeedForwardSpec::Moe(moe); decoder.layers];
    Ok(decoder.uniform(FAMILY.name, AttentionSpec::GroupedQuery(attention), feed_forward))
}
