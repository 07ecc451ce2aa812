//! The routed experts: which tensors hold them, and the matrices of each.

use std::ops::Range;
use std::sync::Arc;

use super::dtype::StoredDtype;
use super::error::{CheckpointError, LoadError};
use super::mapping::Mapping;
use super::parts::Part;
use super::tensors::{Tensor, check_scales, finite, open_part, scale_name, scale_shape};
use super::{Experts, Inner};
use crate::families::InterleavedNames;
use crate::linear::{GROUP, Matrix};
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

/// A tensor of experts as it is written: matrices, one after another.
#[derive(Debug)]
pub(crate) struct WrittenTensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) matrices: Vec<WrittenMatrix>,
}

/// One matrix of one expert of a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WrittenMatrix {
    pub(crate) expert: usize,
    which: Which,
}

#[derive(Debug, Clone, Copy)]
enum Which {
    Gate,
    Up,
    Down,
}

impl WrittenMatrix {
    /// This one of those of its expert.
    pub(crate) fn of(self, swiglu: &Swiglu) -> &Matrix {
        match self.which {
            Which::Gate => &swiglu.gate_proj,
            Which::Up => &swiglu.up_proj,
            Which::Down => &swiglu.down_proj,
        }
    }
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

/// A run of an expert, where it lies.
struct Stored {
    /// What it is, for errors.
    what: String,
    map: Arc<Mapping>,
    range: Range<usize>,
    dtype: StoredDtype,
}

impl Stored {
    fn bytes(&self) -> &[u8] {
        self.map.get(self.range.clone()).unwrap_or_default()
    }

    fn place(&self) -> (&Arc<Mapping>, usize) {
        (&self.map, self.range.start)
    }

    /// As the values lie there; `None` if they cannot be used so.
    fn matrix(&self, outputs: usize, inputs: usize) -> Option<Matrix> {
        Matrix::new(&self.map, self.range.start, self.dtype, outputs, inputs)
    }

    /// Output *o* and input *i* is value `of(o, i)`.
    fn gathered(&self, shape: (usize, usize), of: impl Fn(usize, usize) -> usize) -> Option<Matrix> {
        Matrix::gathered(&self.map, self.range.start, self.dtype, shape, of)
    }

    /// Number *i* is value `of(i)`.
    fn vector(&self, len: usize, of: impl Fn(usize) -> usize) -> Option<Vec<f32>> {
        let mut values = vec![0.0; len];
        self.gathered((1, len), |_, at| of(at))?.widen_row(0, &mut values);
        Some(values)
    }

    /// Refuses scales that make weights infinite, or are no numbers.
    fn check_scales(&self) -> Result<(), CheckpointError> {
        match self.dtype {
            StoredDtype::F32 => check_scales(self.bytes(), || self.what.clone()),
            StoredDtype::F8E8m0 => self
                .dtype
                .not_finite(self.bytes())
                .map_or(Ok(()), |(at, value)| Err(CheckpointError::NotFinite { part: self.what.clone(), at, value })),
            other => Err(CheckpointError::Dtype { tensor: self.what.clone(), found: format!("{other:?}") }),
        }
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

    pub(super) fn expert(&self, layer: usize, expert: usize) -> Result<Swiglu, LoadError> {
        let moe = self.spec.moe(layer).filter(|moe| expert < moe.experts);
        let Some(moe) = moe else { return Err(LoadError::NoSuchExpert { layer, expert }) };
        let runs = self.expert_runs(layer, expert, moe);
        let stored = match &self.experts {
            Some(experts) => Self::stored_in_part(experts, layer, expert, &runs)?,
            None => self.stored_in_files(layer, expert, &runs)?,
        };
        let unlisted = || CheckpointError::Unlisted { part: Part::Expert { layer, expert }.to_string() };
        let swiglu = self.assemble(moe, &stored)?.ok_or_else(unlisted)?;
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
        let bytes = runs.iter().zip(dtypes).map(|(run, dtype)| dtype.bytes(run.values()));
        let bytes = bytes.collect::<Option<Vec<usize>>>().ok_or_else(unlisted)?;
        let map = open_part(&*experts.source, part, bytes.iter().sum())?;
        let mut start = 0;
        let stored = runs.iter().zip(dtypes).zip(bytes).map(|((run, dtype), bytes)| {
            let range = start..start + bytes;
            start = range.end;
            Stored { what: run.what(part), map: map.clone(), range, dtype: *dtype }
        });
        Ok(stored.collect())
    }

    /// Where the runs of an expert lie in files. Compares it with its hash, if hashes are known.
    fn stored_in_files(&self, layer: usize, expert: usize, runs: &[ExpertRun]) -> Result<Vec<Stored>, CheckpointError> {
        let part = Part::Expert { layer, expert };
        let mut stored = Vec::with_capacity(runs.len());
        for run in runs {
            let (tensor, dtype) = self.tensors.expect(&run.name, &run.shape)?;
            let (map, range) = self.tensors.content(&run.name, &run.shape)?;
            let within = run.range(tensor);
            let range = range.start + within.start..range.start + within.end;
            stored.push(Stored { what: run.what(part), map, range, dtype });
        }
        if let Some(verifier) = &self.tensors.verifier {
            let contents: Vec<_> = stored.iter().map(|stored| (stored.bytes(), stored.dtype)).collect();
            verifier.expert(layer, expert, &contents)?;
        }
        Ok(stored)
    }

    /// An expert of its runs; `None` if they are not those that [`Self::expert_runs`] gives.
    fn assemble(&self, moe: &MoeSpec, runs: &[Stored]) -> Result<Option<Swiglu>, CheckpointError> {
        let (hidden, width) = (self.spec.hidden_size, moe.intermediate_size);
        let plain = |[gate_proj, up_proj, down_proj]: [Option<Matrix>; 3]| {
            let (gate_proj, up_proj, down_proj) = (gate_proj?, up_proj?, down_proj?);
            Some(Swiglu { gate_proj, up_proj, down_proj, activation: moe.activation, biases: None })
        };
        Ok(match runs {
            [gate, up, down] => {
                plain([gate.matrix(width, hidden), up.matrix(width, hidden), down.matrix(hidden, width)])
            }
            [gate, gate_scales, up, up_scales, down, down_scales] if gate.dtype == StoredDtype::F8E4m3 => {
                let matrix = |values: &Stored, scales: &Stored, outputs: usize, inputs: usize| {
                    scales.check_scales()?;
                    let fits = values.dtype == StoredDtype::F8E4m3 && scales.dtype == StoredDtype::F32;
                    Ok::<_, CheckpointError>(fits.then(|| Matrix::fp8(values.place(), scales.place(), outputs, inputs)))
                };
                plain([
                    matrix(gate, gate_scales, width, hidden)?,
                    matrix(up, up_scales, width, hidden)?,
                    matrix(down, down_scales, hidden, width)?,
                ])
            }
            [gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias] => {
                gate_up_scales.check_scales()?;
                down_scales.check_scales()?;
                let turn = |number| microscaled(gate_up, gate_up_scales, (number, 2), width, hidden);
                let down = microscaled(down, down_scales, (0, 1), hidden, width);
                let biases = self.biases(moe, gate_up_bias, down_bias);
                plain([turn(0), turn(1), down])
                    .zip(biases)
                    .map(|(swiglu, biases)| Swiglu { biases: Some(biases), ..swiglu })
            }
            // Inputs come first in the file, so that matrices have to be copied.
            [gate_up, gate_up_bias, down, down_bias] => {
                let matrices = [
                    gate_up.gathered((width, hidden), |output, input| input * 2 * width + 2 * output),
                    gate_up.gathered((width, hidden), |output, input| input * 2 * width + 2 * output + 1),
                    down.gathered((hidden, width), |output, input| input * hidden + output),
                ];
                let biases = self.biases(moe, gate_up_bias, down_bias);
                plain(matrices).zip(biases).map(|(swiglu, biases)| Swiglu { biases: Some(biases), ..swiglu })
            }
            _ => None,
        })
    }

    /// Biases of which those of gate and up take turns.
    fn biases(&self, moe: &MoeSpec, gate_up: &Stored, down: &Stored) -> Option<Biases> {
        Some(Biases {
            gate_proj: gate_up.vector(moe.intermediate_size, |at| 2 * at)?,
            up_proj: gate_up.vector(moe.intermediate_size, |at| 2 * at + 1)?,
            down_proj: down.vector(self.spec.hidden_size, |at| at)?,
            bytes: (gate_up.range.len() + down.range.len()) as u64,
        })
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

    /// The tensors that a folder has for the experts of `layer`, as a folder that is written anew has them. `None` for families whose
    /// experts have more than three matrices.
    pub(super) fn written_experts(&self, layer: usize) -> Option<Vec<WrittenTensor>> {
        let moe = self.spec.moe(layer)?;
        let (hidden, width, experts) = (self.spec.hidden_size, moe.intermediate_size, moe.experts);
        let matrix = |expert, which| WrittenMatrix { expert, which };
        match self.expert_tensors(layer) {
            ExpertTensors::Split { prefix, gate_proj, up_proj, down_proj } => {
                let of = |expert| {
                    let tensor = |name: &str, shape: [usize; 2], which| WrittenTensor {
                        name: format!("{prefix}.{expert}.{name}.weight"),
                        shape: shape.to_vec(),
                        matrices: vec![matrix(expert, which)],
                    };
                    [
                        tensor(gate_proj, [width, hidden], Which::Gate),
                        tensor(up_proj, [width, hidden], Which::Up),
                        tensor(down_proj, [hidden, width], Which::Down),
                    ]
                };
                Some((0..experts).flat_map(of).collect())
            }
            ExpertTensors::Fused { gate_up_proj, down_proj } => {
                let both = (0..experts).flat_map(|expert| [matrix(expert, Which::Gate), matrix(expert, Which::Up)]);
                let down = (0..experts).map(|expert| matrix(expert, Which::Down));
                Some(vec![
                    WrittenTensor {
                        name: gate_up_proj,
                        shape: vec![experts, 2 * width, hidden],
                        matrices: both.collect(),
                    },
                    WrittenTensor { name: down_proj, shape: vec![experts, hidden, width], matrices: down.collect() },
                ])
            }
            ExpertTensors::Interleaved(_) => None,
        }
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

/// Every `step`th row of MXFP4, from row `first` on; `None` if it is not that, or rows are no whole blocks.
fn microscaled(
    values: &Stored,
    scales: &Stored,
    (first, step): (usize, usize),
    outputs: usize,
    inputs: usize,
) -> Option<Matrix> {
    let ((map, start), (scale_map, scale_start)) = (values.place(), scales.place());
    let row = values.dtype.bytes(inputs).filter(|_| values.dtype == StoredDtype::F4E2m1)?;
    let scale_row = scales.dtype.bytes(inputs / GROUP).filter(|_| scales.dtype == StoredDtype::F8E8m0)?;
    Matrix::mxfp4((map, start + first * row), (scale_map, scale_start + first * scale_row), step, outputs, inputs)
}

impl Biases {
    fn named(&self) -> [(&'static str, &[f32]); 3] {
        let Self { gate_proj, up_proj, down_proj, .. } = self;
        [("the bias of gate_proj", gate_proj), ("the bias of up_proj", up_proj), ("the bias of down_proj", down_proj)]
    }
}
