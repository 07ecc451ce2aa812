//! OpenAI's gpt-oss. Source: the model card, arXiv:2508.10925.

use super::decoder::{
    Decoder, Defaults, MAX_EXPERTS, MAX_POSITIONS, NUM_LOCAL_EXPERTS, read_moe, read_windows, windowed,
};
use super::{Family, InterleavedNames, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{Activation, FeedForwardSpec, GateSpec, GroupedQuerySpec, ModelSpec, Scoring};

pub(super) const FAMILY: Family = Family {
    name: "gpt_oss",
    spec,
    tensors: TensorNames {
        gate: &["mlp.router.weight"],
        gate_bias: "mlp.router.bias",
        expert: None,
        fused: &[],
        interleaved: Some(InterleavedNames {
            gate_up_proj: "mlp.experts.gate_up_proj",
            gate_up_proj_bias: "mlp.experts.gate_up_proj_bias",
            down_proj: "mlp.experts.down_proj",
            down_proj_bias: "mlp.experts.down_proj_bias",
        }),
        ..TensorNames::MLP
    },
};

const DEFAULTS: Defaults = Defaults { kv_heads: Some(8), ..Defaults::new(1e-5, 1.5e5) };

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    if config.object("rope_scaling")?.is_none() && config.object("rope_parameters")?.is_none() {
        // The reference takes the yarn of the published models, whatever the context.
        return Err(config.missing("rope_scaling"));
    }
    let decoder = Decoder::read(config, &DEFAULTS)?;
    let bias = config.flag("attention_bias", true)?;
    let attention = GroupedQuerySpec { qkv_bias: bias, o_bias: bias, sinks: true, ..decoder.attention() };
    let gate = GateSpec { bias: true, ..GateSpec::new(Scoring::SoftmaxOfChosen) };
    let mut moe = read_moe(config, NUM_LOCAL_EXPERTS, "intermediate_size", gate)?;
    if config.whole("experts_per_token", 1, MAX_EXPERTS)?.is_some_and(|top_k| top_k != moe.top_k) {
        let reason = format!("`num_experts_per_tok` is {}", moe.top_k);
        return Err(config.invalid("experts_per_token", reason));
    }
    moe.expert_biases = true;
    moe.activation = Activation::ClampedSwiglu {
        limit: config.positive("swiglu_limit")?.unwrap_or(7.0) as f32,
        alpha: config.positive("swiglu_alpha")?.unwrap_or(1.702) as f32,
    };
    let window = config.whole("sliding_window", 1, MAX_POSITIONS)?;
    let window = if config.has("sliding_window") { window } else { Some(128) };
    let windows = read_windows(config, decoder.layers, window, |layer| layer % 2 == 0)?;
    let feed_forward = vec![FeedForwardSpec::Moe(moe); decoder.layers];
    Ok(decoder.model(FAMILY.name, windowed(&attention, windows, feed_forward)))
}
