//! MiniMax M2. Source: its modeling code in transformers.

use super::decoder::{Decoder, Defaults, MAX_HEAD_DIM, NUM_LOCAL_EXPERTS, read_head_dim, read_moe};
use super::latent::only;
use super::{Family, TensorNames, mixtral};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, FeedForwardSpec, GateSpec, GroupedQuerySpec, ModelSpec, QkNorm, Scoring};

pub(super) const FAMILY: Family = Family {
    name: "minimax_m2",
    spec,
    tensors: TensorNames { correction: ("block_sparse_moe.e_score_correction_bias", &[]), ..mixtral::TENSORS },
};

const DEFAULTS: Defaults = Defaults { kv_heads: Some(8), ..Defaults::new(1e-6, 5e6) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    only(config, "scoring_func", &["sigmoid"])?;
    only(config, "qk_norm_type", &["per_layer"])?;
    for key in ["use_qk_norm", "use_routing_bias"] {
        if !config.flag(key, true)? {
            return Err(config.invalid(key, "this family is computed with it only"));
        }
    }
    if config.list("attn_type_list")?.unwrap_or_default().iter().any(|kind| kind.as_u64() != Some(1)) {
        return Err(config.invalid("attn_type_list", "only full attention, 1, is supported"));
    }
    let factor = match config.whole("rotary_dim", 1, MAX_HEAD_DIM)? {
        Some(rotary_dim) => rotary_dim as f64 / read_head_dim(config)? as f64,
        None => 1.0,
    };
    let decoder = Decoder::read_partial(config, &DEFAULTS, factor)?;
    let attention = GroupedQuerySpec { qk_norm: QkNorm::WholeVector, ..decoder.attention() };
    let gate = GateSpec { correction: true, renormalise: true, ..GateSpec::new(Scoring::Sigmoid) };
    let moe = read_moe(config, NUM_LOCAL_EXPERTS, "intermediate_size", gate)?;
    let feed_forward = vec![FeedForwardSpec::Moe(moe); decoder.layers];
    Ok(decoder.uniform(FAMILY.name, AttentionSpec::GroupedQuery(attention), feed_forward))
}
