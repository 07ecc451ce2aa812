//! What the families with latent attention share: DeepSeek's layers.

use serde_json::Value;

use super::decoder::{Decoder, Defaults, MAX_HEAD_DIM, MAX_LAYERS, MAX_SIZE, N_ROUTED_EXPERTS, read_moe};
use super::rope::Rotated;
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{FeedForwardSpec, GateSpec, GroupSpec, LatentSpec, MoeSpec, RopePairs, Scoring, SharedExpertSpec};

/// Reads the decoder and its attention.
pub(super) fn read(config: &Config<'_>, defaults: &Defaults) -> Result<(Decoder, LatentSpec), ConfigError> {
    let qk_rope_head_dim = config.size("qk_rope_head_dim", MAX_HEAD_DIM)?;
    if !qk_rope_head_dim.is_multiple_of(2) {
        return Err(config.invalid("qk_rope_head_dim", "values rotate in pairs: it must be even"));
    }
    let mut decoder = Decoder::with_heads(config, defaults, Rotated::Whole(qk_rope_head_dim))?;
    if decoder.kv_heads != decoder.heads {
        let reason = format!("latent attention has as many as `num_attention_heads` ({})", decoder.heads);
        return Err(config.invalid("num_key_value_heads", reason));
    }
    // Transformers calls the part that rotates so.
    if let Some(head_dim) = config.whole("head_dim", 1, MAX_HEAD_DIM)?
        && head_dim != qk_rope_head_dim
    {
        return Err(config.invalid("head_dim", format!("`qk_rope_head_dim` is {qk_rope_head_dim}")));
    }
    if config.flag("rope_interleave", true)? {
        decoder.rope.pairs = RopePairs::Neighbours;
    }
    let qk_nope_head_dim = config.size("qk_nope_head_dim", MAX_HEAD_DIM)?;
    let scale = ((qk_nope_head_dim + qk_rope_head_dim) as f64).powf(-0.5);
    let attention = LatentSpec {
        heads: decoder.heads,
        q_lora_rank: config.whole("q_lora_rank", 1, MAX_SIZE)?,
        kv_lora_rank: config.size("kv_lora_rank", MAX_SIZE)?,
        qk_nope_head_dim,
        qk_rope_head_dim,
        v_head_dim: config.size("v_head_dim", MAX_HEAD_DIM)?,
        scale: (scale * f64::from(decoder.score_factor)) as f32,
        bias: config.flag("attention_bias", false)?,
        indexer: None,
    };
    Ok((decoder, attention))
}

/// Refuses a key that has another value than the one that the family computes.
pub(super) fn only(config: &Config<'_>, key: &str, known: &[&str]) -> Result<(), ConfigError> {
    match config.text(key)? {
        Some(value) if !known.contains(&value) => {
            Err(config.invalid(key, format!("this family is computed with {} only", known.join(" or "))))
        }
        _ => Ok(()),
    }
}

/// Reads routed experts whose weights are sigmoids and whose choice is corrected, and the shared ones: as DeepSeek V3 has them.
pub(super) fn read_corrected_moe(config: &Config<'_>, renormalise: bool) -> Result<MoeSpec, ConfigError> {
    only(config, "scoring_func", &["sigmoid", "noaux_tc"])?;
    only(config, "topk_method", &["noaux_tc"])?;
    let gate = GateSpec {
        correction: true,
        renormalise: config.flag("norm_topk_prob", renormalise)?,
        scale: config.positive("routed_scaling_factor")?.unwrap_or(1.0) as f32,
        ..GateSpec::new(Scoring::Sigmoid)
    };
    let mut moe = read_moe(config, N_ROUTED_EXPERTS, "moe_intermediate_size", gate)?;
    moe.gate.groups = read_groups(config, moe.experts, moe.top_k, 2)?;
    moe.shared = read_shared(config, "n_shared_experts", 0, moe.intermediate_size)?;
    Ok(moe)
}

/// Groups that experts are chosen of; `None` where all are. A group is as good as its `best` best.
pub(super) fn read_groups(
    config: &Config<'_>,
    experts: usize,
    top_k: usize,
    best: usize,
) -> Result<Option<GroupSpec>, ConfigError> {
    let groups = config.whole("n_group", 1, experts)?.unwrap_or(1);
    let chosen = config.whole("topk_group", 1, experts)?.unwrap_or(groups);
    if !experts.is_multiple_of(groups) {
        return Err(config.invalid("n_group", format!("it does not divide the {experts} experts")));
    }
    let size = experts / groups;
    if chosen > groups {
        return Err(config.invalid("topk_group", format!("there are only {groups} groups")));
    }
    if chosen == groups {
        return Ok(None);
    }
    if size < best {
        return Err(config.invalid("n_group", format!("groups of {size} experts are too small to have {best} best")));
    }
    if chosen * size < top_k {
        let reason =
            format!("so many groups have {} experts, fewer than `num_experts_per_tok` ({top_k})", chosen * size);
        return Err(config.invalid("topk_group", reason));
    }
    Ok(Some(GroupSpec { groups, chosen, best }))
}

/// The shared experts, each as wide as a routed one, which are one of their widths together; `by_default` as many.
pub(super) fn read_shared(
    config: &Config<'_>,
    key: &str,
    by_default: usize,
    width: usize,
) -> Result<Option<SharedExpertSpec>, ConfigError> {
    let count = config.whole(key, 0, MAX_SIZE / width)?.unwrap_or(by_default);
    let intermediate_size = count * width;
    Ok((count > 0).then_some(SharedExpertSpec { intermediate_size, gated: false }))
}

/// The block after attention of each layer: as `mlp_layer_types` says, or the first `first_k_dense_replace` are dense, and of those after
/// them every `moe_layer_freq`th has experts.
pub(super) fn read_feed_forward(
    config: &Config<'_>,
    layers: usize,
    moe: &MoeSpec,
) -> Result<Vec<FeedForwardSpec>, ConfigError> {
    let first = config.whole("first_k_dense_replace", 0, MAX_LAYERS)?;
    let frequency = config.whole("moe_layer_freq", 1, MAX_LAYERS)?.unwrap_or(1);
    let has_experts = |layer: usize| layer >= first.unwrap_or(0) && layer.is_multiple_of(frequency);
    let mut sparse: Vec<bool> = (0..layers).map(has_experts).collect();
    if let Some(kinds) = config.list("mlp_layer_types")? {
        let known = |kind: &Value| match kind.as_str() {
            Some("sparse") => Ok(true),
            Some("dense") => Ok(false),
            _ => Err(config.invalid("mlp_layer_types", "known kinds are dense and sparse")),
        };
        let listed = kinds.iter().map(known).collect::<Result<Vec<bool>, _>>()?;
        if listed.len() != layers {
            return Err(config.invalid("mlp_layer_types", format!("there are {layers} layers")));
        }
        if first.is_some() && listed != sparse {
            return Err(config.invalid("mlp_layer_types", "`first_k_dense_replace` and `moe_layer_freq` say otherwise"));
        }
        sparse = listed;
    }
    let block = |sparse| match sparse {
        true => Ok(FeedForwardSpec::Moe(moe.clone())),
        false => Ok(FeedForwardSpec::Dense { intermediate_size: config.size("intermediate_size", MAX_SIZE)? }),
    };
    sparse.into_iter().map(block).collect()
}
