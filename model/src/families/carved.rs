//! Dense models whose feed-forward layers were carved into slices by [`carve`](crate::carve).
//!
//! `config.json` is the dense model's with one more key: `"carved": {"slices": 4, "from": "<id of the dense model>"}`.

use super::decoder::MAX_EXPERTS;
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{Activation, FeedForwardSpec, GateSpec, ModelSpec, MoeSpec, Scoring};

/// The key that a carved model's `config.json` has.
pub(crate) const KEY: &str = "carved";

/// What `spec` becomes if `config.json` says that it was carved: each dense layer is so many experts that are always chosen.
pub(super) fn apply(config: &Config<'_>, mut spec: ModelSpec) -> Result<ModelSpec, ConfigError> {
    let Some(carved) = config.object(KEY)? else { return Ok(spec) };
    let slices = carved.size("slices", MAX_EXPERTS)?;
    for layer in &mut spec.layers {
        let FeedForwardSpec::Dense { intermediate_size: width } = layer.feed_forward else {
            return Err(carved.invalid("slices", "this family has experts, and only dense models are carved"));
        };
        if !width.is_multiple_of(slices) {
            return Err(carved.invalid("slices", format!("it does not divide `intermediate_size` ({width})")));
        }
        layer.feed_forward = FeedForwardSpec::Moe(MoeSpec {
            experts: slices,
            top_k: slices,
            intermediate_size: width / slices,
            activation: Activation::Swiglu,
            expert_biases: false,
            gate: GateSpec::new(Scoring::All),
            shared: None,
        });
    }
    Ok(spec)
}
