//! The routed experts: which tensors hold them, and the matrices of each.

mod stored;
mod written;

use std::ops::Range;

use super::Inner;
use super::dtype::StoredDtype;
use super::parts::Part;
use super::tensors::{Tensor, scale_name, scale_shape};
use crate::families::InterleavedNames;
use crate::linear::{GROUP, Matrix};
use crate::spec::{Activation, MoeSpec};
pub(crate) use written::{WrittenMatrix, WrittenTensor};

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

    /// For errors: the run of this part.
    fn what(&self, part: Part<'_>) -> String {
        let Self { name, parts, .. } = self;
        if *parts == 1 { format!("tensor `{name}`") } else { format!("tensor `{name}`, {part},") }
    }

    /// Bytes within `tensor`.
    pub(super) fn range(&self, tensor: &Tensor) -> Range<usize> {
        let bytes = tensor.bytes() / self.parts;
        self.part * bytes..(self.part + 1) * bytes
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

    /// Whether experts of `layer` are stored in this dtype, which shows at the tensor of this name.
    fn expert_is_stored(&self, layer: usize, name: &str, dtype: StoredDtype) -> bool {
        match &self.experts {
            Some(experts) => experts.layers.get(&layer).is_some_and(|dtypes| dtypes.contains(&dtype)),
            None => self.tensors.is_stored(name, dtype),
        }
    }

    /// What an expert's bytes are, one run after another.
    pub(super) fn expert_runs(&self, layer: usize, expert: usize, moe: &MoeSpec) -> Vec<ExpertRun> {
        let (hidden, width, experts) = (self.spec.hidden_size, moe.intermediate_size, moe.experts);
        let run = |name: String, shape: Vec<usize>, part: usize, parts: usize| ExpertRun { name, shape, part, parts };
        match self.expert_tensors(layer) {
            ExpertTensors::Split { prefix, gate_proj, up_proj, down_proj } => {
                let matrices = [(gate_proj, [width, hidden]), (up_proj, [width, hidden]), (down_proj, [hidden, width])]
                    .map(|(name, shape)| (format!("{prefix}.{expert}.{name}.weight"), shape));
                let scaled = self.expert_is_stored(layer, &matrices[0].0, StoredDtype::F8E4m3);
                let runs = matrices.into_iter().flat_map(|(name, shape)| {
                    let [outputs, inputs] = shape;
                    let scales = scaled.then(|| run(scale_name(&name), scale_shape(outputs, inputs), 0, 1));
                    [Some(run(name, shape.to_vec(), 0, 1)), scales].into_iter().flatten()
                });
                runs.collect()
            }
            ExpertTensors::Fused { gate_up_proj, down_proj } => {
                let shape = vec![experts, 2 * width, hidden];
                vec![
                    run(gate_up_proj.clone(), shape.clone(), 2 * expert, 2 * experts),
                    run(gate_up_proj, shape, 2 * expert + 1, 2 * experts),
                    run(down_proj, vec![experts, hidden, width], expert, experts),
                ]
            }
            ExpertTensors::Interleaved([gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias])
                if self.expert_is_stored(layer, &format!("{gate_up_proj}_blocks"), StoredDtype::F4E2m1) =>
            {
                let microscaled = |name: &str, outputs: usize, inputs: usize| {
                    let scales = vec![experts, outputs, inputs.div_ceil(GROUP)];
                    let blocks = [&scales[..], &[GROUP]].concat();
                    let names = (format!("{name}_blocks"), format!("{name}_scales"));
                    [run(names.0, blocks, expert, experts), run(names.1, scales, expert, experts)]
                };
                let mut runs = Vec::from(microscaled(&gate_up_proj, 2 * width, hidden));
                runs.push(run(gate_up_proj_bias, vec![experts, 2 * width], expert, experts));
                runs.extend(microscaled(&down_proj, hidden, width));
                runs.push(run(down_proj_bias, vec![experts, hidden], expert, experts));
                runs
            }
            ExpertTensors::Interleaved([gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias]) => vec![
                run(gate_up_proj, vec![experts, hidden, 2 * width], expert, experts),
                run(gate_up_proj_bias, vec![experts, 2 * width], expert, experts),
                run(down_proj, vec![experts, width, hidden], expert, experts),
                run(down_proj_bias, vec![experts, hidden], expert, experts),
            ],
        }
    }

    /// Bytes of one routed expert of `layer`, 0 if it is dense.
    pub(super) fn expert_bytes(&self, layer: usize) -> u64 {
        let Some(moe) = self.spec.moe(layer) else { return 0 };
        let runs = self.expert_runs(layer, 0, moe);
        let bytes = |(number, run): (usize, &ExpertRun)| match &self.experts {
            Some(experts) => experts.layers.get(&layer)?.get(number)?.bytes(run.values()),
            None => Some(run.range(self.tensors.get(&run.name)?).len()),
        };
        runs.iter().enumerate().filter_map(bytes).sum::<usize>() as u64
    }

    /// How the runs of the experts of `layer` are stored; nothing if it is dense.
    pub(super) fn expert_dtypes(&self, layer: usize) -> Vec<StoredDtype> {
        let Some(moe) = self.spec.moe(layer) else { return Vec::new() };
        if let Some(experts) = &self.experts {
            return experts.layers.get(&layer).cloned().unwrap_or_default();
        }
        let stored = |run: &ExpertRun| self.tensors.get(&run.name)?.stored(&run.name).ok();
        self.expert_runs(layer, 0, moe).iter().filter_map(stored).collect()
    }

    /// Names and shapes of the tensors that hold the routed experts.
    pub(super) fn expert_shapes(&self) -> Vec<(String, Vec<usize>)> {
        self.spec.moe_layers().flat_map(|(layer, moe)| self.layer_expert_shapes(layer, moe)).collect()
    }

    /// The same of one layer.
    pub(super) fn layer_expert_shapes(&self, layer: usize, moe: &MoeSpec) -> Vec<(String, Vec<usize>)> {
        let mut tensors: Vec<(String, Vec<usize>)> = Vec::new();
        let experts = match self.expert_tensors(layer) {
            ExpertTensors::Split { .. } => moe.experts,
            ExpertTensors::Fused { .. } | ExpertTensors::Interleaved(_) => 1,
        };
        for run in (0..experts).flat_map(|expert| self.expert_runs(layer, expert, moe)) {
            if tensors.last().is_none_or(|(last, _)| *last != run.name) {
                tensors.push((run.name, run.shape));
            }
        }
        tensors
    }
}
