//! Which tensors the trunk consists of, by name and shape.

use super::Inner;
use super::error::CheckpointError;
use super::experts::Swiglu;
use crate::families::SharedNames;
use crate::linear::Matrix;
use crate::spec::{Activation, AttentionSpec, FeedForwardSpec, MoeSpec};

impl Inner {
    pub(super) fn path(layer: usize, name: &str) -> String {
        format!("model.layers.{layer}.{name}")
    }

    /// The LM head has a tensor of its own. A file may hold one although embeddings are said to be tied: the reference
    /// then uses it, as it would not have been written if it were the same.
    pub(super) fn has_lm_head(&self) -> bool {
        !self.spec.tied_embeddings || self.tensors.get("lm_head.weight").is_some()
    }

    pub(super) fn gate_name(&self, layer: usize) -> String {
        let names = self.family.tensors.gate;
        let found = names.iter().find(|name| self.tensors.get(&Self::path(layer, name)).is_some());
        Self::path(layer, found.unwrap_or(&names[0]))
    }

    /// The router's bias in `layer`, if it has one: its name and shape.
    pub(super) fn gate_bias(&self, layer: usize, moe: &MoeSpec) -> Option<(String, Vec<usize>)> {
        moe.gate.bias.then(|| (Self::path(layer, self.family.tensors.gate_bias), vec![moe.experts]))
    }

    /// What is added to the scores of `layer` for the choice, if there is such a thing: its name and shape.
    pub(super) fn correction(&self, layer: usize, moe: &MoeSpec) -> Option<(String, Vec<usize>)> {
        let (name, before) = self.family.tensors.correction;
        let shape = before.iter().copied().chain([moe.experts]).collect();
        moe.gate.correction.then(|| (Self::path(layer, name), shape))
    }

    pub(super) fn shared_expert(&self, layer: usize) -> Result<Option<(Swiglu, Option<Matrix>)>, CheckpointError> {
        let Some(shared) = self.spec.moe(layer).and_then(|moe| moe.shared) else { return Ok(None) };
        let (hidden, width) = (self.spec.hidden_size, shared.intermediate_size);
        let matrix =
            |name: &str, outputs, inputs| self.tensors.matrix(&Self::path(layer, name), &[outputs, inputs], 0..outputs);
        Ok(match self.family.tensors.shared {
            SharedNames::None => None,
            SharedNames::Split(prefix, gate) => {
                let swiglu = Swiglu {
                    gate_proj: matrix(&format!("{prefix}.gate_proj.weight"), width, hidden)?,
                    up_proj: matrix(&format!("{prefix}.up_proj.weight"), width, hidden)?,
                    down_proj: matrix(&format!("{prefix}.down_proj.weight"), hidden, width)?,
                    activation: Activation::Swiglu,
                    biases: None,
                };
                let gate = if shared.gated { Some(matrix(gate, 1, hidden)?) } else { None };
                Some((swiglu, gate))
            }
            SharedNames::Fused(gate_up_proj, down_proj) => {
                let both = [2 * width, hidden];
                let gate_up_proj = Self::path(layer, gate_up_proj);
                let swiglu = Swiglu {
                    gate_proj: self.tensors.matrix(&gate_up_proj, &both, 0..width)?,
                    up_proj: self.tensors.matrix(&gate_up_proj, &both, width..2 * width)?,
                    down_proj: matrix(down_proj, hidden, width)?,
                    activation: Activation::Swiglu,
                    biases: None,
                };
                Some((swiglu, None))
            }
        })
    }

    /// Names and shapes of everything but the routed experts.
    pub(super) fn trunk_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let spec = &self.spec;
        let hidden = spec.hidden_size;
        let mut tensors = vec![
            ("model.embed_tokens.weight".to_owned(), vec![spec.vocab_size, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ];
        if self.has_lm_head() {
            tensors.push(("lm_head.weight".to_owned(), vec![spec.vocab_size, hidden]));
        }
        (0..spec.layers.len()).for_each(|layer| tensors.extend(self.layer_tensors(layer)));
        tensors.extend(self.head.map(|layer| self.head_tensors(layer)).into_iter().flatten());
        let scales: Vec<_> = tensors.iter().filter_map(|(name, shape)| self.tensors.scales_of(name, shape)).collect();
        tensors.extend(scales);
        tensors
    }

    /// Names and shapes of everything in a layer but the routed experts, without scales.
    pub(super) fn layer_tensors(&self, number: usize) -> Vec<(String, Vec<usize>)> {
        let (hidden, mut tensors) = (self.spec.hidden_size, Vec::new());
        let Some(layer) = self.spec.layers.get(number) else { return tensors };
        let mut add = |name: &str, shape: Vec<usize>| tensors.push((Self::path(number, name), shape));
        add("input_layernorm.weight", vec![hidden]);
        add("post_attention_layernorm.weight", vec![hidden]);
        for (name, shape) in attention_tensors(&layer.attention, self.family.tensors.qk_norms, hidden) {
            add(&format!("self_attn.{name}"), shape);
        }
        let moe = match &layer.feed_forward {
            FeedForwardSpec::Dense { intermediate_size } => {
                add("mlp.gate_proj.weight", vec![*intermediate_size, hidden]);
                add("mlp.up_proj.weight", vec![*intermediate_size, hidden]);
                add("mlp.down_proj.weight", vec![hidden, *intermediate_size]);
                return tensors;
            }
            FeedForwardSpec::Moe(moe) => moe,
        };
        if moe.has_gate() {
            tensors.push((self.gate_name(number), vec![moe.experts, hidden]));
        }
        tensors.extend(self.gate_bias(number, moe));
        tensors.extend(self.correction(number, moe));
        let Some(shared) = moe.shared else { return tensors };
        let width = shared.intermediate_size;
        let mut add = |name: &str, shape: Vec<usize>| tensors.push((Self::path(number, name), shape));
        match self.family.tensors.shared {
            SharedNames::None => {}
            SharedNames::Split(prefix, gate) => {
                add(&format!("{prefix}.gate_proj.weight"), vec![width, hidden]);
                add(&format!("{prefix}.up_proj.weight"), vec![width, hidden]);
                add(&format!("{prefix}.down_proj.weight"), vec![hidden, width]);
                if shared.gated {
                    add(gate, vec![1, hidden]);
                }
            }
            SharedNames::Fused(gate_up_proj, down_proj) => {
                add(gate_up_proj, vec![2 * width, hidden]);
                add(down_proj, vec![hidden, width]);
            }
        }
        tensors
    }

    /// Names and shapes of every tensor of the model: the trunk's, then the routed experts'.
    pub(super) fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = self.trunk_tensors();
        tensors.extend(self.expert_shapes());
        tensors
    }

    /// Checks that every tensor of the model is there with the right shape and a supported dtype.
    pub(super) fn check(&self) -> Result<(), CheckpointError> {
        let shapes = if self.experts.is_some() { self.trunk_tensors() } else { self.shapes() };
        for (name, shape) in shapes {
            self.tensors.expect(&name, &shape)?;
        }
        Ok(())
    }
}

/// Names and shapes of the tensors of attention, below `self_attn`.
fn attention_tensors(attention: &AttentionSpec, qk_norms: (&str, &str), hidden: usize) -> Vec<(String, Vec<usize>)> {
    let mut tensors = Vec::new();
    let mut add = |name: &str, shape: &[usize]| tensors.push((name.to_owned(), shape.to_vec()));
    match attention {
        AttentionSpec::GroupedQuery(spec) => {
            let (queries, keys) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
            for (name, outputs) in [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)] {
                add(&format!("{name}.weight"), &[outputs, hidden]);
                if spec.qkv_bias {
                    add(&format!("{name}.bias"), &[outputs]);
                }
            }
            add("o_proj.weight", &[hidden, queries]);
            if spec.o_bias {
                add("o_proj.bias", &[hidden]);
            }
            if let Some((query_norm, key_norm)) = spec.norm_lengths() {
                add(&format!("{}.weight", qk_norms.0), &[query_norm]);
                add(&format!("{}.weight", qk_norms.1), &[key_norm]);
            }
            if spec.sinks {
                add("sinks", &[spec.heads]);
            }
        }
        AttentionSpec::Latent(spec) => {
            let (rank, rotated) = (spec.kv_lora_rank, spec.qk_rope_head_dim);
            let queries = spec.heads * (spec.qk_nope_head_dim + rotated);
            let compressed = [("kv_a_proj_with_mqa", rank + rotated)];
            match spec.q_lora_rank {
                None => add("q_proj.weight", &[queries, hidden]),
                Some(q_rank) => {
                    add("q_a_layernorm.weight", &[q_rank]);
                    add("q_b_proj.weight", &[queries, q_rank]);
                }
            }
            for (name, outputs) in spec.q_lora_rank.map(|rank| ("q_a_proj", rank)).into_iter().chain(compressed) {
                add(&format!("{name}.weight"), &[outputs, hidden]);
                if spec.bias {
                    add(&format!("{name}.bias"), &[outputs]);
                }
            }
            if let (Some(indexer), Some(q_rank)) = (&spec.indexer, spec.q_lora_rank) {
                add("indexer.wq_b.weight", &[indexer.heads * indexer.head_dim, q_rank]);
                add("indexer.wk.weight", &[indexer.head_dim, hidden]);
                add("indexer.k_norm.weight", &[indexer.head_dim]);
                add("indexer.k_norm.bias", &[indexer.head_dim]);
                add("indexer.weights_proj.weight", &[indexer.heads, hidden]);
            }
            add("kv_a_layernorm.weight", &[rank]);
            add("kv_b_proj.weight", &[spec.heads * (spec.qk_nope_head_dim + spec.v_head_dim), rank]);
            add("o_proj.weight", &[hidden, spec.heads * spec.v_head_dim]);
            if spec.bias {
                add("o_proj.bias", &[hidden]);
            }
        }
    }
    tensors
}
