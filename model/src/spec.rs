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
    /// RMS norm of queries and keys before rope.
    pub qk_norm: QkNorm,
    /// Queries, keys and values are clamped to ± this, after the norm and before rope.
    pub clip_qkv: Option<f32>,
    /// A token sees itself and this many minus one tokens before it; `None` sees all before it.
    pub sliding_window: Option<usize>,
}

/// How queries and keys are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Not at all.
    None,
    /// Over each head by itself, with one weight of `head_dim`.
    PerHead,
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
    /// How scores become a choice and weights.
    pub gate: GateSpec,
    /// The expert that every token passes through, if there is one. It belongs to the trunk.
    pub shared: Option<SharedExpertSpec>,
}

impl MoeSpec {
    /// There is a gate that chooses.
    #[must_use]
    pub fn has_gate(&self) -> bool {
        self.gate != GateSpec::Always
    }
}

/// How the gate's scores become a choice of experts and their weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GateSpec {
    /// Softmax over all experts, then the best `top_k`.
    SoftmaxThenTopK {
        /// Divide the chosen probabilities by their sum.
        renormalise: bool,
    },
    /// The best `top_k` scores, then softmax over these alone.
    TopKThenSoftmax,
    /// All experts with weight 1, and no gate: they are slices of a dense layer.
    Always,
}

/// A shared expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedExpertSpec {
    /// Width of its SwiGLU.
    pub intermediate_size: usize,
    /// Its output is multiplied by the sigmoid of `shared_expert_gate`.
    pub gated: bool,
}

/// Rotary position embedding: the first half of a head rotates against the second. Source: arXiv:2104.09864.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are stretched beyond the trained context.
    pub scaling: RopeScaling,
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
