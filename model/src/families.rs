//! Model families. Each is one file that maps `config.json` to a [`ModelSpec`] and names its tensors, and one line
//! in [`FAMILIES`].

pub(crate) mod carved;
mod decoder;
mod deepseek_v2;
mod deepseek_v3;
mod deepseek_v32;
mod dots1;
mod ernie4_5_moe;
mod glm4_moe;
mod glm4_moe_lite;
mod gpt_oss;
mod granitemoe;
mod granitemoeshared;
mod hunyuan_v1_moe;
mod latent;
mod llama;
mod minimax_m2;
mod mistral;
mod mixed;
mod mixtral;
mod olmoe;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod rope;

use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::ModelSpec;

/// All families, by `model_type`.
const FAMILIES: &[Family] = &[
    deepseek_v2::FAMILY,
    deepseek_v3::FAMILY,
    deepseek_v3::KIMI_K2,
    deepseek_v32::FAMILY,
    dots1::FAMILY,
    ernie4_5_moe::FAMILY,
    glm4_moe::FAMILY,
    glm4_moe_lite::FAMILY,
    gpt_oss::FAMILY,
    granitemoe::FAMILY,
    granitemoeshared::FAMILY,
    hunyuan_v1_moe::FAMILY,
    llama::FAMILY,
    minimax_m2::FAMILY,
    mistral::FAMILY,
    mixtral::FAMILY,
    olmoe::FAMILY,
    qwen2::FAMILY,
    qwen2_moe::FAMILY,
    qwen3::FAMILY,
    qwen3_moe::FAMILY,
];

/// Families that are left out, and what they need that is not there; `docs/models.md` says more.
const LEFT_OUT: &[(&str, &str)] = &[
    ("bailing_hybrid", RECURRENT),
    (
        "dbrx",
        "layer norms that subtract the mean, queries, keys and values in one tensor, and experts in tensors of other names",
    ),
    ("glm_moe_dsa", SHARED_INDEXERS),
    ("granitemoehybrid", RECURRENT),
    ("jamba", RECURRENT),
    ("jetmoe", "attention whose heads are experts themselves"),
    ("kimi_k25", WITH_PICTURES),
    ("kimi_linear", RECURRENT),
    ("lfm2_moe", RECURRENT),
    ("llama4", WITH_PICTURES),
    ("llama4_text", "experts whose inputs are weighted instead of their outputs, and attention in chunks"),
    ("longcat_flash", "experts that compute nothing, and two blocks of attention in a layer"),
    ("minimax", RECURRENT),
    ("nemotron_h", RECURRENT),
    (
        "phimoe",
        "layer norms with biases, a gate that masks experts near the best, and rope that changes with the length of the prompt",
    ),
    ("qwen3_5_moe", RECURRENT),
    ("qwen3_next", RECURRENT),
    ("qwen3_vl_moe", WITH_PICTURES),
];

const RECURRENT: &str =
    "layers with a recurrent state, which cannot go back to an earlier position as drafts and shared beginnings need";
const SHARED_INDEXERS: &str = "sparse attention whose layers share the positions that an indexer chooses";
const WITH_PICTURES: &str = "a model of pictures around its model of text";

/// Experts of all layers: ten times as many as any published model has. Their names are listed before it is known which tensors are there.
const MAX_ALL_EXPERTS: usize = 1 << 18;

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
        let spec = carved::apply(config, (self.spec)(config)?)?;
        let experts: usize = spec.moe_layers().map(|(_, moe)| moe.experts).sum();
        if experts > MAX_ALL_EXPERTS {
            let reason = format!("{experts} experts in all layers, more than the {MAX_ALL_EXPERTS} that are read");
            return Err(config.invalid("num_hidden_layers", reason));
        }
        Ok(spec)
    }
}

/// What a family calls the tensors of a layer; paths are below `model.layers.L.`. Where hubs hold several forms, all
/// are listed and the first that is present counts.
#[derive(Debug)]
pub(crate) struct TensorNames {
    /// Weight of the router, `[experts, hidden]`.
    pub(crate) gate: &'static [&'static str],
    /// Bias of the router, where the spec says that it has one.
    pub(crate) gate_bias: &'static str,
    /// What is added to scores for the choice, where the spec says so: its name, and its dimensions before the experts.
    pub(crate) correction: (&'static str, &'static [usize]),
    /// The norms of queries and keys, below `self_attn`.
    pub(crate) qk_norms: (&'static str, &'static str),
    /// One expert's matrices, one tensor each.
    pub(crate) expert: Option<ExpertNames>,
    /// All experts in two tensors: gate_proj over up_proj `[experts, 2 x intermediate, hidden]`, and down_proj
    /// `[experts, hidden, intermediate]`.
    pub(crate) fused: &'static [(&'static str, &'static str)],
    /// All experts in four tensors, instead of the above.
    pub(crate) interleaved: Option<InterleavedNames>,
    /// The shared expert's matrices.
    pub(crate) shared: SharedNames,
    /// Checkpoints may have a multi-token-prediction head, whose tensors are called as in DeepSeek V3.
    pub(crate) draft_head: bool,
}

impl TensorNames {
    /// What most families use.
    const MLP: Self = Self {
        gate: &["mlp.gate.weight"],
        gate_bias: "mlp.gate.bias",
        correction: ("mlp.gate.e_score_correction_bias", &[]),
        qk_norms: ("q_norm", "k_norm"),
        expert: Some(ExpertNames {
            prefixes: &["mlp.experts"],
            gate_proj: "gate_proj",
            up_proj: "up_proj",
            down_proj: "down_proj",
        }),
        fused: &[
            ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
            ("mlp.experts.gate_up_proj.weight", "mlp.experts.down_proj.weight"),
        ],
        interleaved: None,
        shared: SharedNames::None,
        draft_head: false,
    };
}

/// Names of one expert's tensors: `{prefix}.{expert}.{gate_proj}.weight`.
#[derive(Debug)]
pub(crate) struct ExpertNames {
    pub(crate) prefixes: &'static [&'static str],
    pub(crate) gate_proj: &'static str,
    pub(crate) up_proj: &'static str,
    pub(crate) down_proj: &'static str,
}

/// Names of experts' tensors whose inputs come first, with a gate and an up in turns: `[experts, hidden, 2 x intermediate]` with biases
/// `[experts, 2 x intermediate]`, and `[experts, intermediate, hidden]` with biases `[experts, hidden]`.
#[derive(Debug)]
pub(crate) struct InterleavedNames {
    pub(crate) gate_up_proj: &'static str,
    pub(crate) gate_up_proj_bias: &'static str,
    pub(crate) down_proj: &'static str,
    pub(crate) down_proj_bias: &'static str,
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

/// The family that `config.json` names.
pub(crate) fn find(config: &Config<'_>) -> Result<&'static Family, ConfigError> {
    let Some(found) = config.text("model_type")? else {
        return Err(ConfigError::Missing { key: "model_type".into(), also: None });
    };
    if let Some(family) = FAMILIES.iter().find(|family| family.name == found) {
        mixed::refuse(config, family.name)?;
        return Ok(family);
    }
    if let Some((_, missing)) = LEFT_OUT.iter().find(|(name, _)| *name == found) {
        return Err(ConfigError::UnsupportedFamily { found: found.to_owned(), missing });
    }
    Err(ConfigError::UnknownFamily { found: found.chars().take(80).collect(), known: known() })
}

/// The names of all families, separated by commas.
pub fn known() -> String {
    FAMILIES.iter().map(|family| family.name).collect::<Vec<_>>().join(", ")
}
