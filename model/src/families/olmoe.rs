//! OLMoE. Source: arXiv:2409.02060.

use super::decoder::{Decoder, Defaults, NUM_EXPERTS, read_moe};
use super::{Family, MLP_EXPERTS, MLP_FUSED, SharedNames, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, FeedForwardSpec, GateSpec, GroupedQuerySpec, LayerSpec, ModelSpec, QkNorm};

pub(super) const FAMILY: Family = Family {
    name: "olmoe",
    spec,
    tensors: TensorNames {
        gate: &["mlp.gate.weight"],
        expert: Some(MLP_EXPERTS),
        fused: MLP_FUSED,
        shared: SharedNames::None,
    },
};

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-5, rope_theta: 1e4, kv_heads: None };

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
    let moe = read_moe(config, NUM_EXPERTS, "intermediate_size", GateSpec::SoftmaxThenTopK { renormalise })?;
    let layer =
        LayerSpec { attention: AttentionSpec::GroupedQuery(attention), feed_forward: FeedForwardSpec::Moe(moe) };
    let layers = vec![layer; decoder.layers];
    Ok(decoder.model(FAMILY.name, layers))
}
