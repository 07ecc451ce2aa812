//! Which tensors the model consists of, by name and shape.

use std::ops::Range;

use super::error::{CheckpointError, LoadError};
use super::parts::{Part, StoredDtype};
use super::tensors::{Tensor, open_part};
use super::{Experts, Inner};
use crate::families::SharedNames;
use crate::linear::Matrix;
use crate::spec::{AttentionSpec, FeedForwardSpec, MoeSpec, QkNorm};

/// The three matrices of `down_proj(silu(gate_proj(x)) * up_proj(x))`.
#[derive(Debug)]
pub(crate) struct Swiglu {
    /// `[intermediate, hidden]`
    pub(crate) gate_proj: Matrix,
    /// `[intermediate, hidden]`
    pub(crate) up_proj: Matrix,
    /// `[hidden, intermediate]`
    pub(crate) down_proj: Matrix,
}

/// The tensors that hold a layer's routed experts.
enum ExpertTensors {
    /// `{prefix}.{expert}.{name}.weight`
    Split {
        prefix: String,
        gate_proj: &'static str,
        up_proj: &'static str,
        down_proj: &'static str,
    },
    Fused {
        gate_up_proj: String,
        down_proj: String,
    },
}

impl Inner {
    fn path(layer: usize, name: &str) -> String {
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

    fn expert_tensors(&self, layer: usize) -> ExpertTensors {
        let names = &self.family.tensors;
        for (gate_up_proj, down_proj) in names.fused {
            let (gate_up_proj, down_proj) = (Self::path(layer, gate_up_proj), Self::path(layer, down_proj));
            if self.tensors.get(&gate_up_proj).is_some() {
                return ExpertTensors::Fused { gate_up_proj, down_proj };
            }
        }
        let Some(expert) = &names.expert else {
            let (gate_up_proj, down_proj) = names.fused[0];
            return ExpertTensors::Fused {
                gate_up_proj: Self::path(layer, gate_up_proj),
                down_proj: Self::path(layer, down_proj),
            };
        };
        let found = expert.prefixes.iter().find(|prefix| {
            let first = format!("{}.0.{}.weight", Self::path(layer, prefix), expert.gate_proj);
            self.tensors.get(&first).is_some()
        });
        ExpertTensors::Split {
            prefix: Self::path(layer, found.unwrap_or(&expert.prefixes[0])),
            gate_proj: expert.gate_proj,
            up_proj: expert.up_proj,
            down_proj: expert.down_proj,
        }
    }

    pub(super) fn expert(&self, layer: usize, expert: usize) -> Result<Swiglu, LoadError> {
        let moe = self.spec.moe(layer).filter(|moe| expert < moe.experts);
        let Some(moe) = moe else { return Err(LoadError::NoSuchExpert { layer, expert }) };
        let (hidden, width) = (self.spec.hidden_size, moe.intermediate_size);
        if let Some(experts) = &self.experts {
            return Ok(self.expert_part(experts, layer, expert, width)?);
        }
        self.verify_expert(layer, expert, moe)?;
        Ok(match self.expert_tensors(layer) {
            ExpertTensors::Split { prefix, gate_proj, up_proj, down_proj } => {
                let matrix = |name, outputs, inputs| {
                    self.tensors.matrix(&format!("{prefix}.{expert}.{name}.weight"), &[outputs, inputs], 0..outputs)
                };
                Swiglu {
                    gate_proj: matrix(gate_proj, width, hidden)?,
                    up_proj: matrix(up_proj, width, hidden)?,
                    down_proj: matrix(down_proj, hidden, width)?,
                }
            }
            ExpertTensors::Fused { gate_up_proj, down_proj } => {
                let both = [moe.experts, 2 * width, hidden];
                let first = expert * 2 * width;
                let down_rows = expert * hidden..(expert + 1) * hidden;
                Swiglu {
                    gate_proj: self.tensors.matrix(&gate_up_proj, &both, first..first + width)?,
                    up_proj: self.tensors.matrix(&gate_up_proj, &both, first + width..first + 2 * width)?,
                    down_proj: self.tensors.matrix(&down_proj, &[moe.experts, hidden, width], down_rows)?,
                }
            }
        })
    }

    /// The matrices of an expert that lies in no file.
    fn expert_part(
        &self,
        experts: &Experts,
        layer: usize,
        expert: usize,
        width: usize,
    ) -> Result<Swiglu, CheckpointError> {
        let part = Part::Expert { layer, expert };
        let unlisted = || CheckpointError::Unlisted { part: part.to_string() };
        let dtypes = experts.layers.get(&layer).ok_or_else(unlisted)?;
        let bytes: usize = dtypes.iter().map(|dtype| dtype.bytes_per_value() * width * self.spec.hidden_size).sum();
        let map = open_part(&*experts.source, part, bytes)?;
        let hidden = self.spec.hidden_size;
        let mut start = 0;
        let mut next = |dtype: StoredDtype, outputs: usize, inputs: usize| {
            let matrix = Matrix::new(&map, start, dtype.safetensors(), outputs, inputs);
            start += dtype.bytes_per_value() * outputs * inputs;
            matrix
        };
        let [gate, up, down] = *dtypes;
        Ok(Swiglu {
            gate_proj: next(gate, width, hidden),
            up_proj: next(up, width, hidden),
            down_proj: next(down, hidden, width),
        })
    }

    /// Compares an expert with its hash, if hashes are known.
    fn verify_expert(&self, layer: usize, expert: usize, moe: &MoeSpec) -> Result<(), CheckpointError> {
        let Some(verifier) = &self.tensors.verifier else { return Ok(()) };
        let contents = self
            .expert_ranges(layer, expert, moe)
            .into_iter()
            .map(|(name, shape, within)| {
                let (map, range) = self.tensors.content(&name, &shape)?;
                Ok((map, range.start + within.start..range.start + within.end))
            })
            .collect::<Result<Vec<_>, CheckpointError>>()?;
        let slices: Vec<&[u8]> =
            contents.iter().map(|(map, range)| map.get(range.clone()).unwrap_or_default()).collect();
        verifier.expert(layer, expert, &slices)
    }

    /// Where gate_proj, up_proj and down_proj of an expert lie: the tensor, its shape, and the bytes within it. The range
    /// is empty where the tensor is missing.
    pub(super) fn expert_ranges(
        &self,
        layer: usize,
        expert: usize,
        moe: &MoeSpec,
    ) -> [(String, Vec<usize>, Range<usize>); 3] {
        let (hidden, width) = (self.spec.hidden_size, moe.intermediate_size);
        let bytes = |name: &str| self.tensors.get(name).map_or(0, Tensor::bytes);
        match self.expert_tensors(layer) {
            ExpertTensors::Split { prefix, gate_proj, up_proj, down_proj } => {
                [(gate_proj, [width, hidden]), (up_proj, [width, hidden]), (down_proj, [hidden, width])].map(
                    |(name, shape)| {
                        let name = format!("{prefix}.{expert}.{name}.weight");
                        let range = 0..bytes(&name);
                        (name, shape.to_vec(), range)
                    },
                )
            }
            ExpertTensors::Fused { gate_up_proj, down_proj } => {
                let both = bytes(&gate_up_proj) / moe.experts;
                let down = bytes(&down_proj) / moe.experts;
                let (start, half) = (expert * both, both / 2);
                let shape = vec![moe.experts, 2 * width, hidden];
                [
                    (gate_up_proj.clone(), shape.clone(), start..start + half),
                    (gate_up_proj, shape, start + half..start + both),
                    (down_proj, vec![moe.experts, hidden, width], expert * down..(expert + 1) * down),
                ]
            }
        }
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
                };
                Some((swiglu, None))
            }
        })
    }

    /// Bytes of one routed expert of `layer`, 0 if it is dense.
    pub(super) fn expert_bytes(&self, layer: usize) -> u64 {
        let Some(moe) = self.spec.moe(layer) else { return 0 };
        if let Some(experts) = &self.experts {
            let value_bytes =
                |dtypes: &[StoredDtype; 3]| dtypes.iter().map(|dtype| dtype.bytes_per_value() as u64).sum();
            let per_value: u64 = experts.layers.get(&layer).map_or(0, value_bytes);
            return per_value * (moe.intermediate_size * self.spec.hidden_size) as u64;
        }
        let bytes = |name: &str| self.tensors.get(name).map_or(0, |tensor| tensor.bytes() as u64);
        match self.expert_tensors(layer) {
            ExpertTensors::Split { prefix, gate_proj, up_proj, down_proj } => {
                [gate_proj, up_proj, down_proj].iter().map(|name| bytes(&format!("{prefix}.0.{name}.weight"))).sum()
            }
            ExpertTensors::Fused { gate_up_proj, down_proj } => {
                (bytes(&gate_up_proj) + bytes(&down_proj)) / moe.experts as u64
            }
        }
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
        for (number, layer) in spec.layers.iter().enumerate() {
            let mut add = |name: &str, shape: Vec<usize>| tensors.push((Self::path(number, name), shape));
            add("input_layernorm.weight", vec![hidden]);
            add("post_attention_layernorm.weight", vec![hidden]);
            let AttentionSpec::GroupedQuery(attention) = &layer.attention;
            let queries = attention.heads * attention.head_dim;
            let keys = attention.kv_heads * attention.head_dim;
            for (name, outputs) in [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)] {
                add(&format!("self_attn.{name}.weight"), vec![outputs, hidden]);
                if attention.qkv_bias {
                    add(&format!("self_attn.{name}.bias"), vec![outputs]);
                }
            }
            add("self_attn.o_proj.weight", vec![hidden, queries]);
            if attention.o_bias {
                add("self_attn.o_proj.bias", vec![hidden]);
            }
            let norms = match attention.qk_norm {
                QkNorm::None => None,
                QkNorm::PerHead => Some((attention.head_dim, attention.head_dim)),
                QkNorm::WholeVector => Some((queries, keys)),
            };
            if let Some((query_norm, key_norm)) = norms {
                add("self_attn.q_norm.weight", vec![query_norm]);
                add("self_attn.k_norm.weight", vec![key_norm]);
            }
            match &layer.feed_forward {
                FeedForwardSpec::Dense { intermediate_size } => {
                    add("mlp.gate_proj.weight", vec![*intermediate_size, hidden]);
                    add("mlp.up_proj.weight", vec![*intermediate_size, hidden]);
                    add("mlp.down_proj.weight", vec![hidden, *intermediate_size]);
                }
                FeedForwardSpec::Moe(moe) => {
                    if moe.has_gate() {
                        tensors.push((self.gate_name(number), vec![moe.experts, hidden]));
                    }
                    let Some(shared) = moe.shared else { continue };
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
                }
            }
        }
        tensors
    }

    /// Names and shapes of the tensors that hold the routed experts.
    fn expert_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.spec.hidden_size;
        let mut tensors = Vec::new();
        for (layer, moe) in self.spec.moe_layers() {
            let width = moe.intermediate_size;
            match self.expert_tensors(layer) {
                ExpertTensors::Split { prefix, gate_proj, up_proj, down_proj } => {
                    for expert in 0..moe.experts {
                        for (name, shape) in
                            [(gate_proj, [width, hidden]), (up_proj, [width, hidden]), (down_proj, [hidden, width])]
                        {
                            tensors.push((format!("{prefix}.{expert}.{name}.weight"), shape.to_vec()));
                        }
                    }
                }
                ExpertTensors::Fused { gate_up_proj, down_proj } => {
                    tensors.push((gate_up_proj, vec![moe.experts, 2 * width, hidden]));
                    tensors.push((down_proj, vec![moe.experts, hidden, width]));
                }
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
