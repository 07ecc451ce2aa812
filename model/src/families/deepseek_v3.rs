//! DeepSeek V3, R1 and V3.1, and Kimi K2, which is the same with other sizes. Source: arXiv:2412.19437, section 2.1.

use super::decoder::Defaults;
use super::latent::{self, read_corrected_moe, read_feed_forward};
use super::{Family, SharedNames, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{AttentionSpec, ModelSpec};

pub(super) const FAMILY: Family =
    Family { name: "deepseek_v3", spec: |config| spec(config, "deepseek_v3", &DEFAULTS), tensors: TENSORS };

pub(super) const KIMI_K2: Family =
    Family { name: "kimi_k2", spec: |config| spec(config, "kimi_k2", &DEFAULTS), tensors: TENSORS };

pub(super) const TENSORS: TensorNames =
    TensorNames { shared: SharedNames::Split("mlp.shared_experts", ""), draft_head: true, ..TensorNames::MLP };

const DEFAULTS: Defaults = Defaults::new(1e-6, 1e4);

pub(super) fn spec(config: &Config<'_>, family: &'static str, defaults: &Defaults) -> Result<ModelSpec, ConfigError> {
    let (decoder, attention) = latent::read(config, defaults)?;
    let moe = read_corrected_moe(config, true)?;
    let feed_forward = read_feed_forward(config, decoder.layers, &moe)?;
    Ok(decoder.uniform(family, AttentionSpec::Latent(attention), feed_forward))
}
