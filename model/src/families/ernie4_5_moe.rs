//! Baidu's ERNIE 4.5. Source: the ERNIE 4.5 technical report.

use super::decoder::{Decoder, Defaults, MAX_EXPERTS, MAX_LAYERS, MAX_SIZE, moe_of};
use super::latent::read_shared;
use super::{Family, SharedNames, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, FeedForwardSpec, GateSpec, ModelSpec, RopePairs, Scoring};

pub(super) const FAMILY: Family = Family {
    name: "ernie4_5_moe",
    spec,
    tensors: TensorNames {
        correction: ("mlp.moe_statics.e_score_correction_bias", &[1]),
        shared: SharedNames::Split("mlp.shared_experts", ""),
        ..TensorNames::MLP
    },
};

const DEFAULTS: Defaults = Defaults { kv_heads: Some(4), tied_embeddings: true, ..Defaults::new(1e-5, 5e5) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let mut decoder = Decoder::read(config, &DEFAULTS)?;
    decoder.rope.pairs = RopePairs::Neighbours;
    if config.flag("use_bias", false)? {
        return Err(config.invalid("use_bias", "biases are not supported in this family"));
    }
    let least_sum = config.positive("moe_norm_min")?.unwrap_or(1e-12) as f32;
    let gate = GateSpec { correction: true, renormalise: true, least_sum, ..GateSpec::new(Scoring::Softmax) };
    let experts = config.size("moe_num_experts", MAX_EXPERTS)?;
    let mut moe = moe_of(config, experts, "moe_k", "moe_intermediate_size", gate)?;
    moe.shared = read_shared(config, "moe_num_shared_experts", 2, moe.intermediate_size)?;
    let first = config.whole("moe_layer_start_index", 0, MAX_LAYERS)?.unwrap_or(1);
    let last = match config.value("moe_layer_end_index").and_then(serde_json::Value::as_i64) {
        Some(-1) => None,
        _ => config.whole("moe_layer_end_index", 0, MAX_LAYERS)?,
    };
    let interval = config.whole("moe_layer_interval", 1, MAX_LAYERS)?.unwrap_or(1);
    let has_experts =
        |layer: usize| (layer + 1).is_multiple_of(interval) && layer >= first && last.is_none_or(|last| layer <= last);
    let block = |layer| match has_experts(layer) {
        true => Ok(FeedForwardSpec::Moe(moe.clone())),
        false => Ok(FeedForwardSpec::Dense { intermediate_size: config.size("intermediate_size", MAX_SIZE)? }),
    };
    let feed_forward = (0..decoder.layers).map(block).collect::<Result<_, ConfigError>>()?;
    let attention = AttentionSpec::GroupedQuery(decoder.attention());
    Ok(decoder.uniform(FAMILY.name, attention, feed_forward))
}
