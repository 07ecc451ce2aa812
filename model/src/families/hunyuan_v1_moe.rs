//! Tencent's Hunyuan-A13B. Source: its technical report, and its modeling code in transformers.

use super::decoder::{Decoder, Defaults, MAX_EXPERTS, MAX_SIZE, NUM_EXPERTS};
use super::{Family, SharedNames, TensorNames};
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{
    Activation, AttentionSpec, FeedForwardSpec, GateSpec, GroupedQuerySpec, ModelSpec, MoeSpec, QkNorm, Scoring,
    SharedExpertSpec,
};

pub(super) const FAMILY: Family = Family {
    name: "hunyuan_v1_moe",
    spec,
    tensors: TensorNames {
        gate: &["mlp.gate.wg.weight"],
        qk_norms: ("query_layernorm", "key_layernorm"),
        shared: SharedNames::Split("mlp.shared_mlp", ""),
        ..TensorNames::MLP
    },
};

const DEFAULTS: Defaults = Defaults::new(1e-5, 1e4);

fn spec(config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
    let mut decoder = Decoder::read(config, &DEFAULTS)?;
    // Rope is called dynamic, but its base is stretched by a constant.
    let rope = config.object("rope_scaling")?.or(config.object("rope_parameters")?);
    if let Some(alpha) = rope.as_ref().map(|rope| rope.positive("alpha")).transpose()?.flatten() {
        let dims = decoder.rope.dims as f64;
        if dims <= 2.0 {
            return Err(config.invalid("head_dim", "heads are too small for rope with `alpha`"));
        }
        decoder.rope.theta *= alpha.powf(dims / (dims - 2.0));
    }
    if !config.flag("use_qk_norm", true)? {
        return Err(config.invalid("use_qk_norm", "this family is computed with it only"));
    }
    if config.flag("use_cla", false)? {
        return Err(config.invalid("use_cla", "attention across layers is not supported"));
    }
    let bias = config.flag("attention_bias", false)?;
    let attention =
        GroupedQuerySpec { qkv_bias: bias, o_bias: bias, qk_norm: QkNorm::PerHeadAfterRope, ..decoder.attention() };
    let intermediate_size = config.size("intermediate_size", MAX_SIZE)?;
    if same_in_all(config, "moe_intermediate_size", MAX_SIZE)?.is_some_and(|width| width != intermediate_size) {
        let reason = format!("experts are as wide as `intermediate_size` ({intermediate_size})");
        return Err(config.invalid("moe_intermediate_size", reason));
    }
    if same_in_all(config, "num_shared_expert", MAX_EXPERTS)?.is_some_and(|count| count != 1) {
        return Err(config.invalid("num_shared_expert", "this family is computed with 1 only"));
    }
    let key = config.first(&NUM_EXPERTS);
    let experts = same_in_all(config, key, MAX_EXPERTS)?.ok_or_else(|| config.missing(key))?;
    let top_k = same_in_all(config, "moe_topk", MAX_EXPERTS)?.ok_or_else(|| config.missing("moe_topk"))?;
    if top_k > experts {
        return Err(config.invalid("moe_topk", format!("there are only {experts} experts")));
    }
    let moe = MoeSpec {
        experts,
        top_k,
        intermediate_size,
        activation: Activation::Swiglu,
        expert_biases: false,
        gate: GateSpec { renormalise: true, ..GateSpec::new(Scoring::Softmax) },
        shared: Some(SharedExpertSpec { intermediate_size, gated: false }),
    };
    let feed_forward = vec![FeedForwardSpec::Moe(moe); decoder.layers];
    Ok(decoder.uniform(FAMILY.name, AttentionSpec::GroupedQuery(attention), feed_forward))
}

/// A whole number, or a list that says the same for each layer.
fn same_in_all(config: &Config<'_>, key: &str, max: usize) -> Result<Option<usize>, ConfigError> {
    if !config.value(key).is_some_and(serde_json::Value::is_array) {
        return config.whole(key, 1, max);
    }
    let of_layers = config.list(key)?.unwrap_or_default();
    let (Some(first), true) = (of_layers.first(), of_layers.iter().all(|value| Some(value) == of_layers.first()))
    else {
        return Err(config.invalid(key, "layers that differ are not supported"));
    };
    let whole = first.as_u64().and_then(|value| usize::try_from(value).ok()).filter(|value| (1..=max).contains(value));
    whole.map(Some).ok_or_else(|| config.invalid(key, format!("it must list whole numbers from 1 to {max}")))
}
