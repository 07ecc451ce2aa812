//! Where routed experts are computed: the trait that the trunk calls, and the answer in this process.

use std::sync::Arc;

use rayon::ThreadPool;

use crate::checkpoint::{Checkpoint, LoadError};
use crate::expert::{Expert, ExpertJob, run_experts};
use crate::gate::Routing;

/// Why the experts of a layer could not be computed.
pub type ExpertsError = Box<dyn std::error::Error + Send + Sync>;

/// Where the routed experts of a layer are computed: in this process or over the network.
pub trait Experts: Send {
    /// `hidden` is `[rows, hidden_size]`, after the norm of the MoE block. The answer is `[rows, hidden_size]`: the sum
    /// over a row's experts of weight times expert, added in ascending expert number to 0.0 with [`add_weighted`], so
    /// that it has the same bits wherever the experts are.
    ///
    /// # Errors
    /// Whatever kept an expert from answering. No expert may be left out instead.
    fn forward(&mut self, layer: usize, hidden: &[f32], routing: &Routing) -> Result<Vec<f32>, ExpertsError>;

    /// Whether [`Self::forward`] mostly waits for others, so that this process had better compute something else meanwhile.
    fn are_elsewhere(&self) -> bool {
        false
    }

    /// For each expert of `layer` whether the gate may choose it; `None` for all, without which nothing that a pass gives is the model's
    /// answer. Only drafts, which are verified, may say otherwise. If fewer may be chosen than a row needs, the routing names others as
    /// well.
    fn choosable(&self, _layer: usize) -> Option<&[bool]> {
        None
    }
}

/// Adds `weight * expert_row` to `out`. Everyone who combines expert rows does it here, so that all get the same bits.
pub fn add_weighted(out: &mut [f32], expert_row: &[f32], weight: f32) {
    for (out, value) in out.iter_mut().zip(expert_row) {
        *out += weight * value;
    }
}

/// All experts in this process.
#[derive(Debug)]
pub struct LocalExperts {
    /// By layer, then expert; empty for a dense layer.
    layers: Vec<Vec<Expert>>,
    hidden_size: usize,
    pool: Arc<ThreadPool>,
}

impl LocalExperts {
    /// All experts of the checkpoint. They are mapped, not copied.
    ///
    /// # Errors
    /// If the checkpoint lacks a tensor.
    pub fn load(checkpoint: &Checkpoint, pool: Arc<ThreadPool>) -> Result<Self, LoadError> {
        let spec = checkpoint.spec();
        let layers = (0..spec.layers.len())
            .map(|layer| {
                let experts = spec.moe(layer).map_or(0, |moe| moe.experts);
                (0..experts).map(|expert| Expert::load(checkpoint, layer, expert)).collect()
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { layers, hidden_size: spec.hidden_size, pool })
    }

    /// All experts of one layer, as layer 0.
    pub(crate) fn load_layer(checkpoint: &Checkpoint, layer: usize, pool: Arc<ThreadPool>) -> Result<Self, LoadError> {
        let spec = checkpoint.spec();
        let experts = 0..spec.moe(layer).map_or(0, |moe| moe.experts);
        let experts = experts.map(|expert| Expert::load(checkpoint, layer, expert)).collect::<Result<_, _>>()?;
        Ok(Self { layers: vec![experts], hidden_size: spec.hidden_size, pool })
    }
}

/// The gate chose an expert that is not there.
#[derive(Debug, thiserror::Error)]
#[error("no expert {expert} in layer {layer}")]
struct NoExpert {
    layer: usize,
    expert: u32,
}

impl Experts for LocalExperts {
    fn forward(&mut self, layer: usize, hidden: &[f32], routing: &Routing) -> Result<Vec<f32>, ExpertsError> {
        self.compute(layer, hidden, routing)
    }
}

/// One set of experts for several requests at once.
impl Experts for Arc<LocalExperts> {
    fn forward(&mut self, layer: usize, hidden: &[f32], routing: &Routing) -> Result<Vec<f32>, ExpertsError> {
        self.compute(layer, hidden, routing)
    }
}

impl LocalExperts {
    fn compute(&self, layer: usize, hidden: &[f32], routing: &Routing) -> Result<Vec<f32>, ExpertsError> {
        let size = self.hidden_size;
        let experts = self.layers.get(layer).map(Vec::as_slice).unwrap_or_default();
        let mut rows_of: Vec<Vec<usize>> = vec![Vec::new(); experts.len()];
        for row in 0..routing.rows() {
            for (expert, _) in routing.row(row) {
                rows_of.get_mut(expert as usize).ok_or(NoExpert { layer, expert })?.push(row);
            }
        }
        let mut inputs = Vec::with_capacity(routing.experts.len() * size);
        for row in rows_of.iter().flatten() {
            inputs.extend_from_slice(&hidden[row * size..(row + 1) * size]);
        }
        let mut outputs = vec![0.0; inputs.len()];
        let (mut inputs_left, mut outputs_left) = (inputs.as_slice(), outputs.as_mut_slice());
        let mut jobs = Vec::new();
        for (expert, rows) in experts.iter().zip(&rows_of) {
            let (input, output);
            (input, inputs_left) = inputs_left.split_at(rows.len() * size);
            (output, outputs_left) = outputs_left.split_at_mut(rows.len() * size);
            if !rows.is_empty() {
                jobs.push(ExpertJob { expert, hidden: input, output });
            }
        }
        run_experts(&mut jobs, &self.pool);
        // Experts come in ascending order here, so each row adds up in that order.
        let mut combined = vec![0.0; routing.rows() * size];
        let mut results = outputs.chunks_exact(size);
        for (expert, rows) in rows_of.iter().enumerate() {
            for (&row, result) in rows.iter().zip(&mut results) {
                let weight = routing.row(row).find(|(number, _)| *number as usize == expert).map_or(0.0, |(_, w)| w);
                add_weighted(&mut combined[row * size..(row + 1) * size], result, weight);
            }
        }
        Ok(combined)
    }
}
