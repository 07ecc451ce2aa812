//! The gate: which experts a row goes to, and with what weights.

use candle_core::{Device, Tensor};
use candle_nn::ops::softmax_last_dim;

use crate::spec::GateSpec;

/// What the gate chose.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// Experts per row.
    pub top_k: usize,
    /// `[rows, top_k]`, in ascending expert number in each row.
    pub experts: Vec<u32>,
    /// `[rows, top_k]`: what each expert's output is multiplied by.
    pub weights: Vec<f32>,
}

impl Routing {
    /// Rows routed.
    pub fn rows(&self) -> usize {
        self.experts.len().checked_div(self.top_k).unwrap_or(0)
    }

    /// Experts and weights of one row, in ascending expert number.
    ///
    /// # Panics
    /// If `row` is out of range.
    pub fn row(&self, row: usize) -> impl Iterator<Item = (u32, f32)> + '_ {
        let range = row * self.top_k..(row + 1) * self.top_k;
        self.experts[range.clone()].iter().copied().zip(self.weights[range].iter().copied())
    }
}

/// Routes rows by their `scores` of `[rows, experts]`. Equal scores go to the lower expert number. An expert that is not `choosable` is
/// chosen only where there are too few others.
pub(crate) fn route(
    scores: &[f32],
    experts: usize,
    top_k: usize,
    gate: GateSpec,
    choosable: Option<&[bool]>,
) -> candle_core::Result<Routing> {
    let rows = scores.len() / experts;
    let mut chosen = Vec::with_capacity(rows * top_k);
    let mut order: Vec<u32> = Vec::with_capacity(experts);
    for row in scores.chunks_exact(experts) {
        order.clear();
        order.extend(0..experts as u32);
        let may = |expert: &u32| choosable.is_none_or(|all| all.get(*expert as usize).is_some_and(|may| *may));
        let best_first =
            |a: &u32, b: &u32| may(b).cmp(&may(a)).then(row[*b as usize].total_cmp(&row[*a as usize])).then(a.cmp(b));
        if top_k < experts {
            order.select_nth_unstable_by(top_k, best_first);
        }
        let best = &mut order[..top_k];
        best.sort_unstable();
        chosen.extend_from_slice(best);
    }
    let pick = |values: &[f32]| -> Vec<f32> {
        chosen.iter().enumerate().map(|(i, expert)| values[i / top_k * experts + *expert as usize]).collect()
    };
    let softmax = |values: Vec<f32>, columns: usize| -> candle_core::Result<Vec<f32>> {
        softmax_last_dim(&Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)?.flatten_all()?.to_vec1()
    };
    let weights = match gate {
        GateSpec::Always => vec![1.0; chosen.len()],
        GateSpec::TopKThenSoftmax => softmax(pick(scores), top_k)?,
        GateSpec::SoftmaxThenTopK { renormalise } => {
            let mut weights = pick(&softmax(scores.to_vec(), experts)?);
            if renormalise {
                for row in weights.chunks_exact_mut(top_k) {
                    let sum: f32 = row.iter().sum();
                    row.iter_mut().for_each(|weight| *weight /= sum);
                }
            }
            weights
        }
    };
    Ok(Routing { top_k, experts: chosen, weights })
}
