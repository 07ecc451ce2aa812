//! DeepSeek V3.2: V3 whose tokens see only the positions that an indexer chooses. Source: arXiv:2512.02556, section 2.1.

use super::decoder::{Defaults, MAX_HEAD_DIM, MAX_HEADS, MAX_POSITIONS};
use super::latent::{self, read_corrected_moe, read_feed_forward};
use super::{Family, deepseek_v3};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, IndexerSpec, ModelSpec};

pub(super) const FAMILY: Family = Family { name: "deepseek_v32", spec, tensors: deepseek_v3::TENSORS };

const DEFAULTS: Defaults = Defaults::new(1e-6, 1e4);

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let (decoder, mut attention) = latent::read(config, &DEFAULTS)?;
    if attention.q_lora_rank.is_none() {
        return Err(config.missing("q_lora_rank"));
    }
    let head_dim = config.size("index_head_dim", MAX_HEAD_DIM)?;
    if head_dim < attention.qk_rope_head_dim {
        let reason = format!("`qk_rope_head_dim` ({}) of them rotate", attention.qk_rope_head_dim);
        return Err(config.invalid("index_head_dim", reason));
    }
    let (heads, top_k) = (config.size("index_n_heads", MAX_HEADS)?, config.size("index_topk", MAX_POSITIONS)?);
    attention.indexer = Some(IndexerSpec { heads, head_dim, top_k });
    let moe = read_corrected_moe(config, true)?;
    let feed_forward = read_feed_forward(config, decoder.layers, &moe)?;
    Ok(decoder.uniform(FAMILY.name, AttentionSpec::Latent(attention), feed_forward))
}
