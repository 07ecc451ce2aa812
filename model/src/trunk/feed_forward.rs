//! What follows attention in a layer.

use rayon::ThreadPool;

use super::placed::{Placing, TrunkMatrix, TrunkSwiglu, linear};
use super::{ForwardError, within};
use crate::activation::add_bias;
use crate::checkpoint::{Checkpoint, CheckpointError, LoadError, Swiglu};
use crate::device::DeviceError;
use crate::experts::Experts;
use crate::gate::{Routing, route};
use crate::linear::{self, Matrix};
use crate::spec::{Activation, FeedForwardSpec, MoeSpec};

#[derive(Debug)]
pub(super) enum FeedForward {
    Dense(Box<TrunkSwiglu>),
    Moe(Box<Moe>),
}

/// A mixture-of-experts block but for its experts.
#[derive(Debug)]
pub(super) struct Moe {
    spec: MoeSpec,
    gate: Gate,
    shared: Option<Shared>,
    hidden_size: usize,
}

/// What chooses the experts.
#[derive(Debug)]
pub(super) struct Gate {
    /// `[experts, hidden]`; none where every row goes to all experts.
    weight: Option<TrunkMatrix>,
    /// `[experts]`
    bias: Option<Vec<f32>>,
    /// `[experts]`: what is added to scores for the choice.
    correction: Option<Vec<f32>>,
}

/// The expert that every row goes through.
#[derive(Debug)]
pub(super) struct Shared {
    swiglu: TrunkSwiglu,
    /// Weighs it, where there is one. It is one row: the way to a card would take longer.
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
                let swiglu = Swiglu {
                    gate_proj: matrix("gate_proj", *intermediate_size, hidden)?,
                    up_proj: matrix("up_proj", *intermediate_size, hidden)?,
                    down_proj: matrix("down_proj", hidden, *intermediate_size)?,
                    activation: Activation::Swiglu,
                    biases: None,
                };
                Self::Dense(Box::new(swiglu.into()))
            }
            FeedForwardSpec::Moe(moe) => Self::Moe(Box::new(Moe {
                gate: Gate::load(checkpoint, layer, moe)?,
                shared: checkpoint.shared_expert(layer)?.map(|(swiglu, gate)| Shared { swiglu: swiglu.into(), gate }),
                spec: moe.clone(),
                hidden_size: hidden,
            })),
        })
    }

    pub(super) fn place(&self, placing: &mut Placing<'_>) -> Result<(), DeviceError> {
        match self {
            Self::Dense(swiglu) => placing.swiglu(swiglu),
            Self::Moe(moe) => {
                moe.gate.weight.as_ref().map_or(Ok(()), |weight| placing.matrix(weight))?;
                moe.shared.as_ref().map_or(Ok(()), |shared| placing.swiglu(&shared.swiglu))
            }
        }
    }

    /// `x` is `[rows, hidden]`, after the norm; so is the result.
    pub(super) fn forward(
        &self,
        layer: usize,
        x: &[f32],
        experts: &mut dyn Experts,
        pool: &ThreadPool,
    ) -> Result<Vec<f32>, ForwardError> {
        let Moe { spec, gate, shared, hidden_size } = match self {
            Self::Dense(swiglu) => return Ok(swiglu.forward(x, pool)),
            Self::Moe(moe) => &**moe,
        };
        let choosable = experts.choosable(layer);
        let routing = within(pool, x.len() == *hidden_size, || gate.route(x, *hidden_size, spec, choosable, pool))?;
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
        let mut weight = None;
        if moe.has_gate() {
            let name = checkpoint.gate_name(layer);
            let matrix = checkpoint.matrix(&name, moe.experts, checkpoint.spec().hidden_size)?;
            matrix.check_finite(&name)?;
            weight = Some(matrix.into());
        }
        Ok(Self { weight, bias: checkpoint.gate_bias(layer, moe)?, correction: checkpoint.correction(layer, moe)? })
    }

    /// `x` is `[rows, hidden]`.
    fn route(
        &self,
        x: &[f32],
        hidden_size: usize,
        spec: &MoeSpec,
        choosable: Option<&[bool]>,
        pool: &ThreadPool,
    ) -> candle_core::Result<Routing> {
        let mut outputs = match &self.weight {
            Some(weight) => linear(x, weight, pool),
            None => vec![0.0; x.len() / hidden_size * spec.experts],
        };
        if let Some(bias) = &self.bias {
            outputs.chunks_exact_mut(bias.len()).for_each(|row| add_bias(row, bias));
        }
        route(&outputs, spec.experts, spec.top_k, &spec.gate, self.correction.as_deref(), choosable)
    }
}

impl Shared {
    /// `x` is `[rows, hidden]`, and so is the result.
    fn forward(&self, x: &[f32], pool: &ThreadPool) -> Vec<f32> {
        let mut out = self.swiglu.forward(x, pool);
        if let Some(gate) = &self.gate {
            let rows = out.chunks_exact_mut(gate.inputs());
            for (row, score) in rows.zip(linear::linear(x, gate, pool)) {
                let weight = 1.0 / (1.0 + (-score).exp());
                row.iter_mut().for_each(|value| *value *= weight);
            }
        }
        out
    }
}
