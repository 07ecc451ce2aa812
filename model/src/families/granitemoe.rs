//! IBM Granite 3 MoE. Source: the Granite 3.0 technical report, and arXiv:2408.13359 for the multipliers.

use super::decoder::{Decoder, Defaults, NUM_LOCAL_EXPERTS, read_moe};
use super::{Family, SharedNames, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, FeedForwardSpec, GateSpec, GroupedQuerySpec, ModelSpec, Scoring, SharedExpertSpec};

pub(super) const FAMILY: Family =
    Family { name: "granitemoe", spec: |config| spec(config, "granitemoe", None), tensors: tensors(SharedNames::None) };

const DEFAULTS: Defaults = Defaults::new(1e-6, 1e4);

pub(super) const fn tensors(shared: SharedNames) -> TensorNames {
    TensorNames {
        gate: &["block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"],
        expert: None,
        fused: &[
            ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
            ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
        ],
        shared,
        ..TensorNames::MLP
    }
}

pub(super) fn spec(
    config: &Config<'_>,
    family: &'static str,
    shared: Option<SharedExpertSpec>,
) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, &DEFAULTS)?;
    match config.text("position_embedding_type")? {
        None | Some("rope") => {}
        Some(_) => return Err(config.invalid("position_embedding_type", "only rope is supported")),
    }
    let multiplier = |key: &str| Ok(config.positive(key)?.unwrap_or(1.0) as f32);
    let bias = config.flag("attention_bias", false)?;
    let attention = GroupedQuerySpec {
        qkv_bias: bias,
        o_bias: bias,
        scale: multiplier("attention_multiplier")?,
        ..decoder.attention()
    };
    let mut moe = read_moe(config, NUM_LOCAL_EXPERTS, "intermediate_size", GateSpec::new(Scoring::SoftmaxOfChosen))?;
    moe.shared = shared;
    let feed_forward = vec![FeedForwardSpec::Moe(moe); decoder.layers];
    Ok(ModelSpec {
        embedding_multiplier: multiplier("embedding_multiplier")?,
        residual_multiplier: multiplier("residual_multiplier")?,
        logits_scaling: multiplier("logits_scaling")?,
        ..decoder.uniform(family, AttentionSpec::GroupedQuery(attention), feed_forward)
    })
}
