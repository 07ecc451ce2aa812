//! What a checkpoint computes, as a table of choices that every family maps its `config.json` to.

/// A whole model. Sizes are those of `config.json` and have been checked against each other.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// The family's name as `config.json` writes it in `model_type`.
    pub family: &'static str,
    /// Tokens in the vocabulary: rows of the embedding and of the LM head.
    pub vocab_size: usize,
    /// Values in a hidden state.
    pub hidden_size: usize,
    /// The decoder layers, first to last.
    pub layers: Vec<LayerSpec>,
    /// Positions that a sequence may have (`max_position_embeddings`).
    pub max_positions: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f32,
    /// The LM head is the embedding matrix.
    pub tied_embeddings: bool,
    /// Rotary position embedding of every layer.
    pub rope: RopeSpec,
    /// Embeddings are multiplied by this (1 except in Granite).
    pub embedding_multiplier: f32,
    /// Each block's output is multiplied by this before it joins the residual (1 except in Granite).
    pub residual_multiplier: f32,
    /// Logits are divided by this (1 except in Granite).
    pub logits_scaling: f32,
}

impl ModelSpec {
    /// The MoE block of `layer`; `None` for a dense layer and for a layer out of range.
    pub fn moe(&self, layer: usize) -> Option<&MoeSpec> {
        match &self.layers.get(layer)?.feed_forward {
            FeedForwardSpec::Moe(moe) => Some(moe),
            FeedForwardSpec::Dense { .. } => None,
        }
    }

    /// All MoE layers with their numbers, ascending.
    pub fn moe_layers(&self) -> impl Iterator<Item = (usize, &MoeSpec)> {
        (0..self.layers.len()).filter_map(|layer| Some((layer, self.moe(layer)?)))
    }
}

/// One decoder layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// How the layer attends.
    pub attention: AttentionSpec,
    /// What follows attention.
    pub feed_forward: FeedForwardSpec,
}

/// The kind of attention.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum AttentionSpec {
    /// Grouped-query attention; with `kv_heads == heads` multi-head, with 1 multi-query. Source: arXiv:2305.13245.
    GroupedQuery(GroupedQuerySpec),
    /// Multi-head latent attention: keys and values of all heads are made of one short vector per token, and only that is
    /// kept. Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    Latent(LatentSpec),
}

/// Grouped-query attention.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupedQuerySpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Values per head; even.
    pub head_dim: usize,
    /// Scores are multiplied by this before the softmax.
    pub scale: f32,
    /// `q_proj`, `k_proj` and `v_proj` have biases.
    pub qkv_bias: bool,
    /// `o_proj` has a bias.
    pub o_bias: bool,
    /// RMS norm of queries and keys.
    pub qk_norm: QkNorm,
    /// Queries, keys and values are clamped to ± this, after a norm before rope, and before rope.
    pub clip_qkv: Option<f32>,
    /// A token sees itself and this many minus one tokens before it; `None` sees all before it.
    pub sliding_window: Option<usize>,
    /// Each head has one more score, a weight of its own, that counts in the softmax and has no value: a sink.
    pub sinks: bool,
}

impl GroupedQuerySpec {
    /// Values of the weights of the norms of queries and of keys.
    pub(crate) fn norm_lengths(&self) -> Option<(usize, usize)> {
        match self.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead | QkNorm::PerHeadAfterRope => Some((self.head_dim, self.head_dim)),
            QkNorm::WholeVector => Some((self.heads * self.head_dim, self.kv_heads * self.head_dim)),
        }
    }
}

/// Multi-head latent attention.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentSpec {
    /// Heads.
    pub heads: usize,
    /// Values of the vector that queries are made of; `None` makes them of the hidden state.
    pub q_lora_rank: Option<usize>,
    /// Values of the vector that keys and values are made of.
    pub kv_lora_rank: usize,
    /// Values of a key that do not rotate, and are made of the short vector.
    pub qk_nope_head_dim: usize,
    /// Values of a key that rotate, the same in all heads; even.
    pub qk_rope_head_dim: usize,
    /// Values of a head's value.
    pub v_head_dim: usize,
    /// Scores are multiplied by this before the softmax.
    pub scale: f32,
    /// `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have biases.
    pub bias: bool,
    /// What chooses the positions that a token sees, where it does not see all.
    pub indexer: Option<IndexerSpec>,
}

/// Sparse attention: scores of a kind of attention of its own choose the positions that a token sees. Source: DeepSeek-V3.2,
/// arXiv:2512.02556, section 2.1.
#[derive(Debug, Clone, PartialEq)]
pub struct IndexerSpec {
    /// Heads.
    pub heads: usize,
    /// Values of a head, the first `qk_rope_head_dim` of which rotate.
    pub head_dim: usize,
    /// Positions that a token sees at most, itself among those to choose from.
    pub top_k: usize,
}

impl LatentSpec {
    /// Values of what all heads share as key and value: the short vector, and the part of the keys that rotates. The cache keeps them of a token, and
    /// the key of an indexer.
    #[must_use]
    pub fn cached_values(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    /// Values that a cache of full keys and values would keep of a token.
    #[must_use]
    pub fn expanded_values(&self) -> usize {
        self.heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim)
    }
}

/// How queries and keys are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Not at all.
    None,
    /// Over each head by itself, with one weight of `head_dim`.
    PerHead,
    /// The same, after rope.
    PerHeadAfterRope,
    /// Over all heads together.
    WholeVector,
}

/// What follows attention in a layer.
#[derive(Debug, Clone, PartialEq)]
pub enum FeedForwardSpec {
    /// One SwiGLU for every token.
    Dense {
        /// Its width.
        intermediate_size: usize,
    },
    /// Routed experts.
    Moe(MoeSpec),
}

/// A mixture-of-experts block.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeSpec {
    /// Routed experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Width of each expert's SwiGLU.
    pub intermediate_size: usize,
    /// What routed experts compute between their matrices.
    pub activation: Activation,
    /// The three projections of routed experts have biases.
    pub expert_biases: bool,
    /// How the router's outputs become a choice and weights.
    pub gate: GateSpec,
    /// The expert that every token passes through, if there is one. It belongs to the trunk.
    pub shared: Option<SharedExpertSpec>,
}

impl MoeSpec {
    /// There is a router that chooses.
    #[must_use]
    pub fn has_gate(&self) -> bool {
        self.gate.scoring != Scoring::All
    }
}

/// What a SwiGLU computes of the outputs g of `gate_proj` and u of `up_proj`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Activation {
    /// `silu(g) * u`
    Swiglu,
    /// `g * sigmoid(alpha * g) * (u + 1)`, with g at most `limit` and u from `-limit` to `limit`. Source: gpt-oss.
    ClampedSwiglu {
        /// Bound of both.
        limit: f32,
        /// Steepness of the sigmoid.
        alpha: f32,
    },
}

/// How the router's outputs become a choice of experts and their weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateSpec {
    /// What an expert's weight is made of.
    pub scoring: Scoring,
    /// The router has a bias.
    pub bias: bool,
    /// A weight per expert is added to the scores for the choice, and not for the weights. Source: arXiv:2408.15664.
    pub correction: bool,
    /// Experts are chosen among those of the best groups only.
    pub groups: Option<GroupSpec>,
    /// The weights of the chosen are divided by their sum.
    pub renormalise: bool,
    /// What they are divided by is at least this, so that it is not zero.
    pub least_sum: f32,
    /// The weights are multiplied by this, last.
    pub scale: f32,
}

impl GateSpec {
    /// The best scores, neither renormalised nor scaled.
    #[must_use]
    pub const fn new(scoring: Scoring) -> Self {
        Self { scoring, bias: false, correction: false, groups: None, renormalise: false, least_sum: 1e-20, scale: 1.0 }
    }
}

/// How an expert's score is made of the router's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Softmax over the chosen experts alone; the choice is made by the outputs themselves.
    SoftmaxOfChosen,
    /// The sigmoid of the expert's own output.
    Sigmoid,
    /// There is no router: every row goes to all experts with weight 1, as they are slices of a dense layer.
    All,
}

/// Experts in groups of equal size, of consecutive numbers. Source: DeepSeek-V2, arXiv:2405.04434, section 2.2.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupSpec {
    /// Groups; divides the number of experts.
    pub groups: usize,
    /// Groups per token that experts are chosen of.
    pub chosen: usize,
    /// A group is as good as the sum of so many of its best experts' scores.
    pub best: usize,
}

/// A shared expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedExpertSpec {
    /// Width of its SwiGLU.
    pub intermediate_size: usize,
    /// Its output is multiplied by the sigmoid of `shared_expert_gate`.
    pub gated: bool,
}

/// Rotary position embedding. Source: arXiv:2104.09864.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Values of a head that rotate; even. In grouped-query attention they are the first.
    pub dims: usize,
    /// Which of them rotate against each other.
    pub pairs: RopePairs,
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are stretched beyond the trained context.
    pub scaling: RopeScaling,
}

/// Which values of a head rotate against each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairs {
    /// The first half against the second.
    Halves,
    /// Each against its neighbour: the first against the second, the third against the fourth.
    Neighbours,
}

/// How rotary frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// Divisor of the frequencies.
        factor: f64,
    },
    /// Low frequencies interpolated, high ones kept, a ramp between. Source: arXiv:2309.00071.
    Yarn {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Multiplies cos and sin.
        attention_factor: f64,
        /// Rotations over the trained context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is fully interpolated.
        beta_slow: f64,
        /// Trained context in positions.
        original_max_positions: f64,
        /// Round the ends of the ramp to whole dimensions.
        truncate: bool,
    },
    /// Llama 3.1's smooth interpolation by wavelength.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Trained context divided by this is the longest wavelength that is not fully interpolated.
        low_freq_factor: f64,
        /// Trained context divided by this is the shortest wavelength that is interpolated at all.
        high_freq_factor: f64,
        /// Trained context in positions.
        original_max_positions: f64,
    },
}
