//! What follows attention in a layer.

use rayon::ThreadPool;

use super::{ForwardError, within};
use crate::activation::add_bias;
use crate::checkpoint::{Checkpoint, CheckpointError, LoadError, Swiglu};
use crate::expert::{SwigluJob, run_swiglus};
use crate::experts::Experts;
use crate::gate::{Routing, route};
use crate::linear::{Matrix, linear};
use crate::spec::{Activation, FeedForwardSpec, MoeSpec};

#[derive(Debug)]
pub(super) enum FeedForward {
    Dense(Swiglu),
    Moe { spec: MoeSpec, gate: Gate, shared: Option<Box<Shared>> },
}

/// What chooses the experts.
#[derive(Debug)]
pub(super) struct Gate {
    /// `[experts, hidden]`
    weight: Matrix,
    /// `[experts]`
    bias: Option<Vec<f32>>,
    /// `[experts]`: what is added to scores for the choice.
    correction: Option<Vec<f32>>,
}

/// The expert that every row goes through.
#[derive(Debug)]
pub(super) struct Shared {
    swiglu: Swiglu,
    /// Weighs it, where there is one.
    gate: Option<Matrix>,
}

impl FeedForward {
    pub(super) fn load(checkpoint: &Checkpoint, layer: usize) -> Result<Self, LoadError> {
        let hidden = checkpoint.spec().hidden_size;
        Ok(match &checkpoint.spec().layers[layer].feed_forward {
            FeedForwardSpec::Dense { intermediate_size } => {
                let matrix = |name: &str, outputs, inputs| {
                    checkpoint.matrix(&format!("model.layers.{layer}.mlp.{name}.weight"), outputs, inputs)
                };
                Self::Dense(Swiglu {
                    gate_proj: matrix("gate_proj", *intermediate_size, hidden)?,
                    up_proj: matrix("up_proj", *intermediate_size, hidden)?,
                    down_proj: matrix("down_proj", hidden, *intermediate_size)?,
                    activation: Activation::Swiglu,
                    biases: None,
                })
            }
            FeedForwardSpec::Moe(moe) => Self::Moe {
                gate: Gate::load(checkpoint, layer, moe)?,
                shared: checkpoint.shared_expert(layer)?.map(|(swiglu, gate)| Box::new(Shared { swiglu, gate })),
                spec: moe.clone(),
            },
        })
    }

    /// `x` is `[rows, hidden]`, after the norm; so is the result.
    pub(super) fn forward(
        &self,
        layer: usize,
        x: &[f32],
        experts: &mut dyn Experts,
        pool: &ThreadPool,
    ) -> Result<Vec<f32>, ForwardError> {
        let (spec, gate, shared) = match self {
            Self::Dense(swiglu) => return Ok(apply(swiglu, x, pool)),
            Self::Moe { spec, gate, shared } => (spec, gate, shared),
        };
        let choosable = experts.choosable(layer);
        let routing = within(pool, x.len() == gate.weight.inputs(), || gate.route(x, spec, choosable, pool))?;
        let mut added = None;
        let out = match shared {
            // They wait in this thread, while the shared expert is computed in the pool.
            Some(shared) if experts.are_elsewhere() => pool.in_place_scope(|scope| {
                scope.spawn(|_| added = Some(shared.forward(x, pool)));
                experts.forward(layer, x, &routing)
            }),
            _ => experts.forward(layer, x, &routing),
        };
        let mut out = out.map_err(|source| ForwardError::Experts { layer, source })?;
        if out.len() != x.len() {
            return Err(ForwardError::ExpertsShape { layer, expected: x.len(), found: out.len() });
        }
        if let Some(added) = added.or_else(|| shared.as_ref().map(|shared| shared.forward(x, pool))) {
            out.iter_mut().zip(added).for_each(|(value, added)| *value += added);
        }
        Ok(out)
    }
}

impl Gate {
    fn load(checkpoint: &Checkpoint, layer: usize, moe: &MoeSpec) -> Result<Self, CheckpointError> {
        let name = checkpoint.gate_name(layer);
        let weight = checkpoint.matrix(&name, moe.experts, checkpoint.spec().hidden_size)?;
        weight.check_finite(&name)?;
        Ok(Self { weight, bias: checkpoint.gate_bias(layer, moe)?, correction: checkpoint.correction(layer, moe)? })
    }

    /// `x` is `[rows, hidden]`.
    fn route(
        &self,
        x: &[f32],
        spec: &MoeSpec,
        choosable: Option<&[bool]>,
        pool: &ThreadPool,
    ) -> candle_core::Result<Routing> {
        let mut outputs = linear(x, &self.weight, pool);
        if let Some(bias) = &self.bias {
            outputs.chunks_exact_mut(bias.len()).for_each(|row| add_bias(row, bias));
        }
        route(&outputs, spec.experts, spec.top_k, &spec.gate, self.correction.as_deref(), choosable)
    }
}

impl Shared {
    /// `x` is `[rows, hidden]`, and so is the result.
    fn forward(&self, x: &[f32], pool: &ThreadPool) -> Vec<f32> {
        let mut out = apply(&self.swiglu, x, pool);
        if let Some(gate) = &self.gate {
            let rows = out.chunks_exact_mut(gate.inputs());
            for (row, score) in rows.zip(linear(x, gate, pool)) {
                let weight = 1.0 / (1.0 + (-score).exp());
                row.iter_mut().for_each(|value| *value *= weight);
            }
        }
        out
    }
}

fn apply(swiglu: &Swiglu, x: &[f32], pool: &ThreadPool) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    run_swiglus(&mut [SwigluJob { swiglu, hidden: x, output: &mut out }], pool);
    out
}
