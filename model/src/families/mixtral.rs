//! Mixtral. Source: arXiv:2401.04088.

use super::decoder::{Decoder, Defaults, MAX_POSITIONS, NUM_LOCAL_EXPERTS, read_moe};
use super::{ExpertNames, Family, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, FeedForwardSpec, GateSpec, GroupedQuerySpec, ModelSpec, Scoring};

pub(super) const FAMILY: Family = Family { name: "mixtral", spec, tensors: TENSORS };

pub(super) const TENSORS: TensorNames = TensorNames {
    gate: &["block_sparse_moe.gate.weight", "mlp.gate.weight"],
    expert: Some(ExpertNames {
        prefixes: &["block_sparse_moe.experts", "mlp.experts"],
        gate_proj: "w1",
        up_proj: "w3",
        down_proj: "w2",
    }),
    fused: &[
        ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
        ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ],
    ..TensorNames::MLP
};

const DEFAULTS: Defaults = Defaults { kv_heads: Some(8), ..Defaults::new(1e-5, 1e6) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, &DEFAULTS)?;
    let attention =
        GroupedQuerySpec { sliding_window: config.whole("sliding_window", 1, MAX_POSITIONS)?, ..decoder.attention() };
    let moe = read_moe(
        config,
        NUM_LOCAL_EXPERTS,
        "intermediate_size",
        GateSpec { renormalise: true, ..GateSpec::new(Scoring::Softmax) },
    )?;
    let feed_forward = vec![FeedForwardSpec::Moe(moe); decoder.layers];
    Ok(decoder.uniform(FAMILY.name, AttentionSpec::GroupedQuery(attention), feed_forward))
}
