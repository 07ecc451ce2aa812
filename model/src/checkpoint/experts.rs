//! The routed experts: which tensors hold them, and the matrices of each.

use std::ops::Range;
use std::sync::Arc;

use safetensors::Dtype;

use super::error::{CheckpointError, LoadError};
use super::mapping::Mapping;
use super::parts::{Part, StoredDtype};
use super::tensors::{Tensor, finite, open_part};
use super::{Experts, Inner};
use crate::families::InterleavedNames;
use crate::linear::Matrix;
use crate::spec::{Activation, MoeSpec};

/// The three matrices of `down_proj(silu(gate_proj(x)) * up_proj(x))`, or of another activation.
#[derive(Debug)]
pub(crate) struct Swiglu {
    /// `[intermediate, hidden]`
    pub(crate) gate_proj: Matrix,
    /// `[intermediate, hidden]`
    pub(crate) up_proj: Matrix,
    /// `[hidden, intermediate]`
    pub(crate) down_proj: Matrix,
    pub(crate) activation: Activation,
    pub(crate) biases: Option<Biases>,
}

/// What is added to the products of a [`Swiglu`]'s matrices.
#[derive(Debug)]
pub(crate) struct Biases {
    /// `[intermediate]`
    pub(crate) gate_proj: Vec<f32>,
    /// `[intermediate]`
    pub(crate) up_proj: Vec<f32>,
    /// `[hidden]`
    pub(crate) down_proj: Vec<f32>,
    /// Bytes as stored.
    pub(crate) bytes: u64,
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
    /// gate_up_proj, its bias, down_proj, its bias.
    Interleaved([String; 4]),
}

/// Some values of an expert that lie side by side: one of its tensors, or a part of a tensor of many experts.
pub(super) struct ExpertRun {
    /// The tensor.
    pub(super) name: String,
    /// The tensor's shape.
    shape: Vec<usize>,
    /// Which part of the tensor, of how many that are alike.
    part: usize,
    parts: usize,
}

impl ExpertRun {
    /// Values.
    pub(super) fn values(&self) -> usize {
        self.shape.iter().product::<usize>() / self.parts
    }

    /// Bytes within `tensor`.
    pub(super) fn range(&self, tensor: &Tensor) -> Range<usize> {
        let bytes = tensor.bytes() / self.parts;
        self.part * bytes..(self.part + 1) * bytes
    }
}

/// Values at some place of a mapping.
struct Stored {
    map: Arc<Mapping>,
    start: usize,
    dtype: Dtype,
}

impl Stored {
    /// As they lie there.
    fn matrix(&self, outputs: usize, inputs: usize) -> Matrix {
        Matrix::new(&self.map, self.start, self.dtype, outputs, inputs)
    }

    /// Output *o* and input *i* is value `of(o, i)`.
    fn gathered(&self, shape: (usize, usize), of: impl Fn(usize, usize) -> usize) -> Matrix {
        Matrix::gathered(&self.map, self.start, self.dtype, shape, of)
    }

    /// Number *i* is value `of(i)`.
    fn vector(&self, len: usize, of: impl Fn(usize) -> usize) -> Vec<f32> {
        let mut values = vec![0.0; len];
        self.gathered((1, len), |_, at| of(at)).widen_row(0, &mut values);
        values
    }

    /// Bytes of so many of them.
    fn bytes(&self, values: usize) -> u64 {
        (values * StoredDtype::of(self.dtype).map_or(0, StoredDtype::bytes_per_value)) as u64
    }
}

impl Inner {
    fn expert_tensors(&self, layer: usize) -> ExpertTensors {
        let names = &self.family.tensors;
        if let Some(InterleavedNames { gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias }) =
            &names.interleaved
        {
            let names = [gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias];
            return ExpertTensors::Interleaved(names.map(|name| Self::path(layer, name)));
        }
        let fused = |(gate_up_proj, down_proj): &(&str, &str)| ExpertTensors::Fused {
            gate_up_proj: Self::path(layer, gate_up_proj),
            down_proj: Self::path(layer, down_proj),
        };
        if let Some(found) = names.fused.iter().find(|names| self.tensors.get(&Self::path(layer, names.0)).is_some()) {
            return fused(found);
        }
        let Some(expert) = &names.expert else { return fused(&names.fused[0]) };
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

    /// What an expert's bytes are, one run after another.
    pub(super) fn expert_runs(&self, layer: usize, expert: usize, moe: &MoeSpec) -> Vec<ExpertRun> {
        let (hidden, width, experts) = (self.spec.hidden_size, moe.intermediate_size, moe.experts);
        let run = |name: String, shape: Vec<usize>, part: usize, parts: usize| ExpertRun { name, shape, part, parts };
        match self.expert_tensors(layer) {
            ExpertTensors::Split { prefix, gate_proj, up_proj, down_proj } => {
                [(gate_proj, [width, hidden]), (up_proj, [width, hidden]), (down_proj, [hidden, width])]
                    .map(|(name, shape)| run(format!("{prefix}.{expert}.{name}.weight"), shape.to_vec(), 0, 1))
                    .into()
            }
            ExpertTensors::Fused { gate_up_proj, down_proj } => {
                let shape = vec![experts, 2 * width, hidden];
                vec![
                    run(gate_up_proj.clone(), shape.clone(), 2 * expert, 2 * experts),
                    run(gate_up_proj, shape, 2 * expert + 1, 2 * experts),
                    run(down_proj, vec![experts, hidden, width], expert, experts),
                ]
            }
            ExpertTensors::Interleaved([gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias]) => vec![
                run(gate_up_proj, vec![experts, hidden, 2 * width], expert, experts),
                run(gate_up_proj_bias, vec![experts, 2 * width], expert, experts),
                run(down_proj, vec![experts, width, hidden], expert, experts),
                run(down_proj_bias, vec![experts, hidden], expert, experts),
            ],
        }
    }

    pub(super) fn expert(&self, layer: usize, expert: usize) -> Result<Swiglu, LoadError> {
        let moe = self.spec.moe(layer).filter(|moe| expert < moe.experts);
        let Some(moe) = moe else { return Err(LoadError::NoSuchExpert { layer, expert }) };
        let runs = self.expert_runs(layer, expert, moe);
        let stored = match &self.experts {
            Some(experts) => Self::stored_in_part(experts, layer, expert, &runs)?,
            None => self.stored_in_files(layer, expert, &runs)?,
        };
        let unlisted = || CheckpointError::Unlisted { part: Part::Expert { layer, expert }.to_string() };
        let swiglu = self.assemble(moe, &stored).ok_or_else(unlisted)?;
        swiglu.biases.iter().flat_map(Biases::named).try_for_each(|(name, values)| {
            finite(values, 0, || format!("{name} of {}", Part::Expert { layer, expert }))
        })?;
        Ok(swiglu)
    }

    /// Where the runs of an expert lie that is a part by itself.
    fn stored_in_part(
        experts: &Experts,
        layer: usize,
        expert: usize,
        runs: &[ExpertRun],
    ) -> Result<Vec<Stored>, CheckpointError> {
        let part = Part::Expert { layer, expert };
        let unlisted = || CheckpointError::Unlisted { part: part.to_string() };
        let dtypes = experts.layers.get(&layer).filter(|dtypes| dtypes.len() == runs.len()).ok_or_else(unlisted)?;
        let bytes = |(run, dtype): (&ExpertRun, &StoredDtype)| run.values() * dtype.bytes_per_value();
        let map = open_part(&*experts.source, part, runs.iter().zip(dtypes).map(bytes).sum())?;
        let mut start = 0;
        let stored = runs.iter().zip(dtypes).map(|(run, dtype)| {
            let stored = Stored { map: map.clone(), start, dtype: dtype.safetensors() };
            start += bytes((run, dtype));
            stored
        });
        Ok(stored.collect())
    }

    /// Where the runs of an expert lie in files. Compares it with its hash, if hashes are known.
    fn stored_in_files(&self, layer: usize, expert: usize, runs: &[ExpertRun]) -> Result<Vec<Stored>, CheckpointError> {
        let mut contents = Vec::with_capacity(runs.len());
        for run in runs {
            let tensor = self.tensors.expect(&run.name, &run.shape)?;
            let (map, range) = self.tensors.content(&run.name, &run.shape)?;
            let within = run.range(tensor);
            contents.push((map, range.start + within.start..range.start + within.end, tensor.dtype));
        }
        if let Some(verifier) = &self.tensors.verifier {
            let missing = || CheckpointError::Unlisted { part: Part::Expert { layer, expert }.to_string() };
            let mut slices = Vec::with_capacity(contents.len());
            for (map, range, dtype) in &contents {
                let bytes = map.get(range.clone()).ok_or_else(missing)?;
                slices.push((bytes, StoredDtype::of(*dtype).ok_or_else(missing)?));
            }
            verifier.expert(layer, expert, &slices)?;
        }
        Ok(contents.into_iter().map(|(map, range, dtype)| Stored { map, start: range.start, dtype }).collect())
    }

    /// An expert of its runs; `None` if they are not those that [`Self::expert_runs`] gives.
    fn assemble(&self, moe: &MoeSpec, runs: &[Stored]) -> Option<Swiglu> {
        let (hidden, width, activation) = (self.spec.hidden_size, moe.intermediate_size, moe.activation);
        match runs {
            [gate, up, down] => Some(Swiglu {
                gate_proj: gate.matrix(width, hidden),
                up_proj: up.matrix(width, hidden),
                down_proj: down.matrix(hidden, width),
                activation,
                biases: None,
            }),
            // Inputs come first in the file, so that matrices have to be copied.
            [gate_up, gate_up_bias, down, down_bias] => Some(Swiglu {
                gate_proj: gate_up.gathered((width, hidden), |output, input| input * 2 * width + 2 * output),
                up_proj: gate_up.gathered((width, hidden), |output, input| input * 2 * width + 2 * output + 1),
                down_proj: down.gathered((hidden, width), |output, input| input * hidden + output),
                activation,
                biases: Some(Biases {
                    gate_proj: gate_up_bias.vector(width, |at| 2 * at),
                    up_proj: gate_up_bias.vector(width, |at| 2 * at + 1),
                    down_proj: down_bias.vector(hidden, |at| at),
                    bytes: gate_up_bias.bytes(2 * width) + down_bias.bytes(hidden),
                }),
            }),
            _ => None,
        }
    }

    /// Bytes of one routed expert of `layer`, 0 if it is dense.
    pub(super) fn expert_bytes(&self, layer: usize) -> u64 {
        let Some(moe) = self.spec.moe(layer) else { return 0 };
        let runs = self.expert_runs(layer, 0, moe);
        let bytes_per_value = |number: usize, run: &ExpertRun| match &self.experts {
            Some(experts) => experts.layers.get(&layer)?.get(number).copied(),
            None => StoredDtype::of(self.tensors.get(&run.name)?.dtype),
        };
        let bytes = |(number, run): (usize, &ExpertRun)| {
            run.values() * bytes_per_value(number, run).map_or(0, StoredDtype::bytes_per_value)
        };
        runs.iter().enumerate().map(bytes).sum::<usize>() as u64
    }

    /// Names and shapes of the tensors that hold the routed experts.
    pub(super) fn expert_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = Vec::new();
        for (layer, moe) in self.spec.moe_layers() {
            let experts = match self.expert_tensors(layer) {
                ExpertTensors::Split { .. } => moe.experts,
                ExpertTensors::Fused { .. } | ExpertTensors::Interleaved(_) => 1,
            };
            for run in (0..experts).flat_map(|expert| self.expert_runs(layer, expert, moe)) {
                if tensors.last().is_none_or(|(last, _)| *last != run.name) {
                    tensors.push((run.name, run.shape));
                }
            }
        }
        tensors
    }
}

impl Biases {
    fn named(&self) -> [(&'static str, &[f32]); 3] {
        let Self { gate_proj, up_proj, down_proj, .. } = self;
        [("the bias of gate_proj", gate_proj), ("the bias of up_proj", up_proj), ("the bias of down_proj", down_proj)]
    }
}
