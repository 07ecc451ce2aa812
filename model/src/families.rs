//! Model families. Each is one file that maps `config.json` to a [`ModelSpec`] and names its tensors, and one line
//! in [`FAMILIES`].

pub(crate) mod carved;
mod decoder;
mod granitemoe;
mod granitemoeshared;
mod llama;
mod mistral;
mod mixtral;
mod olmoe;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;

use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::ModelSpec;

/// All families, by `model_type`.
const FAMILIES: &[Family] = &[
    granitemoe::FAMILY,
    granitemoeshared::FAMILY,
    llama::FAMILY,
    mistral::FAMILY,
    mixtral::FAMILY,
    olmoe::FAMILY,
    qwen2::FAMILY,
    qwen2_moe::FAMILY,
    qwen3::FAMILY,
    qwen3_moe::FAMILY,
];

/// A model architecture.
#[derive(Debug)]
pub(crate) struct Family {
    /// `model_type` in `config.json`.
    pub(crate) name: &'static str,
    /// Maps `config.json` to the spec.
    pub(crate) spec: fn(&Config<'_>) -> Result<ModelSpec, ConfigError>,
    /// The names of its tensors.
    pub(crate) tensors: TensorNames,
}

impl Family {
    /// What the model with this `config.json` computes.
    pub(crate) fn read(&self, config: &Config<'_>) -> Result<ModelSpec, ConfigError> {
        carved::apply(config, (self.spec)(config)?)
    }
}

/// What a family calls the tensors of a layer; paths are below `model.layers.L.`. Where hubs hold several forms, all
/// are listed and the first that is present counts.
#[derive(Debug)]
pub(crate) struct TensorNames {
    /// Weight of the gate, `[experts, hidden]`.
    pub(crate) gate: &'static [&'static str],
    /// One expert's matrices, one tensor each.
    pub(crate) expert: Option<ExpertNames>,
    /// All experts in two tensors: gate_proj over up_proj `[experts, 2 x intermediate, hidden]`, and down_proj
    /// `[experts, hidden, intermediate]`.
    pub(crate) fused: &'static [(&'static str, &'static str)],
    /// The shared expert's matrices.
    pub(crate) shared: SharedNames,
}

/// Names of one expert's tensors: `{prefix}.{expert}.{gate_proj}.weight`.
#[derive(Debug)]
pub(crate) struct ExpertNames {
    pub(crate) prefixes: &'static [&'static str],
    pub(crate) gate_proj: &'static str,
    pub(crate) up_proj: &'static str,
    pub(crate) down_proj: &'static str,
}

/// Names of the shared expert's tensors.
#[derive(Debug)]
pub(crate) enum SharedNames {
    /// The family has none.
    None,
    /// `{0}.gate_proj.weight`, `{0}.up_proj.weight`, `{0}.down_proj.weight`, and `{1}` for its gate.
    Split(&'static str, &'static str),
    /// gate_proj over up_proj in one tensor, and down_proj.
    Fused(&'static str, &'static str),
}

/// The names that most families use.
const MLP_EXPERTS: ExpertNames =
    ExpertNames { prefixes: &["mlp.experts"], gate_proj: "gate_proj", up_proj: "up_proj", down_proj: "down_proj" };

/// The names of dense families, for the slices that they are carved into.
const DENSE: TensorNames =
    TensorNames { gate: &["mlp.gate.weight"], expert: Some(MLP_EXPERTS), fused: &[], shared: SharedNames::None };

/// The fused form of the same.
const MLP_FUSED: &[(&str, &str)] = &[
    ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ("mlp.experts.gate_up_proj.weight", "mlp.experts.down_proj.weight"),
];

/// The family that `config.json` names.
pub(crate) fn find(config: &Config<'_>) -> Result<&'static Family, ConfigError> {
    let Some(found) = config.text("model_type")? else {
        return Err(ConfigError::Missing { key: "model_type".into(), also: None });
    };
    FAMILIES
        .iter()
        .find(|family| family.name == found)
        .ok_or_else(|| ConfigError::UnknownFamily { found: found.chars().take(80).collect(), known: known() })
}

/// The names of all families, separated by commas.
pub fn known() -> String {
    FAMILIES.iter().map(|family| family.name).collect::<Vec<_>>().join(", ")
}
