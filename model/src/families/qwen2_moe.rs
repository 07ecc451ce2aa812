//! Qwen1.5-MoE and Qwen2-MoE. Source: arXiv:2407.10671.

use super::decoder::{Decoder, Defaults, MAX_LAYERS, MAX_POSITIONS, MAX_SIZE, NUM_EXPERTS, read_moe};
use super::{Family, MLP_EXPERTS, MLP_FUSED, SharedNames, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, FeedForwardSpec, GateSpec, GroupedQuerySpec, LayerSpec, ModelSpec, SharedExpertSpec};

pub(super) const FAMILY: Family = Family {
    name: "qwen2_moe",
    spec,
    tensors: TensorNames {
        gate: &["mlp.gate.weight"],
        expert: Some(MLP_EXPERTS),
        fused: MLP_FUSED,
        shared: SharedNames::Split("mlp.shared_expert", "mlp.shared_expert_gate.weight"),
    },
};

const DEFAULTS: Defaults = Defaults { rms_norm_eps: 1e-6, rope_theta: 1e4, kv_heads: Some(16) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, &DEFAULTS)?;
    let attention = GroupedQuerySpec { qkv_bias: config.flag("qkv_bias", true)?, ..decoder.attention() };
    let windows = read_windows(config, decoder.layers, |layer, below| layer % 2 == 0 && layer < below)?;
    let intermediate_size = config.size("shared_expert_intermediate_size", MAX_SIZE)?;
    let shared = SharedExpertSpec { intermediate_size, gated: true };
    let layers = read_feed_forward(config, decoder.layers, Some(shared))?
        .into_iter()
        .zip(windows)
        .map(|(feed_forward, sliding_window)| LayerSpec {
            attention: AttentionSpec::GroupedQuery(GroupedQuerySpec { sliding_window, ..attention.clone() }),
            feed_forward,
        })
        .collect();
    Ok(decoder.model(FAMILY.name, layers))
}

/// The sliding window of each layer. Without `layer_types`, the layers have it for which `windowed` says so, of their number
/// and `max_window_layers`.
pub(super) fn read_windows(
    config: &Config<'_>,
    layers: usize,
    windowed: fn(usize, usize) -> bool,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let used = config.flag("use_sliding_window", false)?;
    let window = match config.whole("sliding_window", 1, MAX_POSITIONS) {
        _ if !used => None,
        Ok(None) if !config.has("sliding_window") => Some(4096),
        other => other?,
    };
    let Some(kinds) = config.list("layer_types")? else {
        let limit = config.whole("max_window_layers", 0, MAX_POSITIONS)?.unwrap_or(28);
        return Ok((0..layers).map(|layer| window.filter(|_| windowed(layer, limit))).collect());
    };
    if kinds.len() != layers {
        return Err(config.invalid("layer_types", format!("there are {layers} layers")));
    }
    kinds
        .iter()
        .map(|kind| match (kind.as_str(), window) {
            (Some("full_attention"), _) => Ok(None),
            (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
            (Some("sliding_attention"), None) => {
                Err(config.invalid("layer_types", "sliding attention needs `use_sliding_window` and `sliding_window`"))
            }
            _ => Err(config.invalid("layer_types", "known kinds are full_attention and sliding_attention")),
        })
        .collect()
}

/// The block after attention of each layer: dense for those in `mlp_only_layers` and for those that
/// `decoder_sparse_step` leaves out.
pub(super) fn read_feed_forward(
    config: &Config<'_>,
    layers: usize,
    shared: Option<SharedExpertSpec>,
) -> Result<Vec<FeedForwardSpec>, ConfigError> {
    let renormalise = config.flag("norm_topk_prob", false)?;
    let mut moe = read_moe(config, NUM_EXPERTS, "moe_intermediate_size", GateSpec::SoftmaxThenTopK { renormalise })?;
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
