//! An expert's matrices, made of what is stored of it.

use std::ops::Range;
use std::sync::Arc;

use super::{Biases, ExpertRun, Swiglu};
use crate::checkpoint::dtype::StoredDtype;
use crate::checkpoint::error::{CheckpointError, LoadError};
use crate::checkpoint::mapping::Mapping;
use crate::checkpoint::parts::Part;
use crate::checkpoint::tensors::{check_scales, finite, open_part};
use crate::checkpoint::{Experts, Inner};
use crate::linear::{GROUP, Matrix};
use crate::spec::MoeSpec;

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
    pub(in crate::checkpoint) fn expert(&self, layer: usize, expert: usize) -> Result<Swiglu, LoadError> {
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
