//! Qwen1.5-MoE and Qwen2-MoE. Source: arXiv:2407.10671.

use super::decoder::{
    Decoder, Defaults, MAX_LAYERS, MAX_SIZE, NUM_EXPERTS, read_moe, read_used_window, read_windows, windowed,
};
use super::{Family, SharedNames, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{FeedForwardSpec, GateSpec, GroupedQuerySpec, ModelSpec, Scoring, SharedExpertSpec};

pub(super) const FAMILY: Family = Family {
    name: "qwen2_moe",
    spec,
    tensors: TensorNames {
        shared: SharedNames::Split("mlp.shared_expert", "mlp.shared_expert_gate.weight"),
        ..TensorNames::MLP
    },
};

const DEFAULTS: Defaults = Defaults { kv_heads: Some(16), ..Defaults::new(1e-6, 1e4) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, &DEFAULTS)?;
    let attention = GroupedQuerySpec { qkv_bias: config.flag("qkv_bias", true)?, ..decoder.attention() };
    // The layers of even number below `max_window_layers` have it.
    let below = config.whole("max_window_layers", 0, MAX_LAYERS)?.unwrap_or(28);
    let has_window = |layer| layer % 2 == 0 && layer < below;
    let windows = read_windows(config, decoder.layers, read_used_window(config)?, has_window)?;
    let intermediate_size = config.size("shared_expert_intermediate_size", MAX_SIZE)?;
    let shared = SharedExpertSpec { intermediate_size, gated: true };
    let feed_forward = read_feed_forward(config, decoder.layers, Some(shared))?;
    Ok(decoder.model(FAMILY.name, windowed(&attention, windows, feed_forward)))
}

/// The block after attention of each layer: dense for those in `mlp_only_layers` and for those that
/// `decoder_sparse_step` leaves out.
pub(super) fn read_feed_forward(
    config: &Config<'_>,
    layers: usize,
    shared: Option<SharedExpertSpec>,
) -> Result<Vec<FeedForwardSpec>, ConfigError> {
    let renormalise = config.flag("norm_topk_prob", false)?;
    let mut moe = read_moe(
        config,
        NUM_EXPERTS,
        "moe_intermediate_size",
        GateSpec { renormalise, ..GateSpec::new(Scoring::Softmax) },
    )?;
    moe.shared = shared;
    let step = config.whole("decoder_sparse_step", 1, MAX_LAYERS)?.unwrap_or(1);
    let mut dense = vec![false; layers];
    for entry in config.list("mlp_only_layers")?.unwrap_or_default() {
        let layer = entry.as_u64().ok_or_else(|| config.invalid("mlp_only_layers", "it must list layer numbers"))?;
        if let Some(dense) = usize::try_from(layer).ok().and_then(|layer| dense.get_mut(layer)) {
            *dense = true;
        }
    }
    dense
        .into_iter()
        .enumerate()
        .map(|(layer, dense)| {
            if dense || !(layer + 1).is_multiple_of(step) {
                let intermediate_size = config.size("intermediate_size", MAX_SIZE)?;
                Ok(FeedForwardSpec::Dense { intermediate_size })
            } else {
                Ok(FeedForwardSpec::Moe(moe.clone()))
            }
        })
        .collect()
}
