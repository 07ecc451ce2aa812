//! The gate: which experts a row goes to, and with what weights.

use candle_core::{Device, Tensor};
use candle_nn::ops::softmax_last_dim;

use crate::spec::{GateSpec, GroupSpec, Scoring};

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

/// Routes rows by their router's `outputs` of `[rows, experts]`. `correction` is added to the scores for the choice. Equal scores go to
/// the lower expert number. An expert that is not `choosable` is chosen only where there are too few others.
pub(crate) fn route(
    outputs: &[f32],
    experts: usize,
    top_k: usize,
    gate: &GateSpec,
    correction: Option<&[f32]>,
    choosable: Option<&[bool]>,
) -> candle_core::Result<Routing> {
    let softmax = |values: Vec<f32>, columns: usize| -> candle_core::Result<Vec<f32>> {
        softmax_last_dim(&Tensor::from_vec(values, ((), columns), &Device::Cpu)?)?.flatten_all()?.to_vec1()
    };
    let rows = outputs.len() / experts;
    let scores = match gate.scoring {
        Scoring::SoftmaxOfChosen | Scoring::All => None,
        Scoring::Softmax => Some(softmax(outputs.to_vec(), experts)?),
        Scoring::Sigmoid => Some(outputs.iter().map(|output| 1.0 / (1.0 + (-output).exp())).collect()),
    };
    // The choice: outputs are in the order of their scores, and further apart, but sums of scores are not sums of outputs.
    let mut criteria = match &scores {
        Some(scores) if correction.is_some() || gate.groups.is_some_and(|groups| groups.best > 1) => scores.clone(),
        _ => outputs.to_vec(),
    };
    if let Some(correction) = correction {
        for row in criteria.chunks_exact_mut(experts) {
            row.iter_mut().zip(correction).for_each(|(score, correction)| *score += correction);
        }
    }
    let mut chosen = Vec::with_capacity(rows * top_k);
    let mut choice = Choice::new(experts, gate.groups, choosable);
    for row in criteria.chunks_exact(experts) {
        choice.best(row, top_k, &mut chosen);
    }
    let pick = |values: &[f32]| -> Vec<f32> {
        chosen.iter().enumerate().map(|(i, expert)| values[i / top_k * experts + *expert as usize]).collect()
    };
    let mut weights = match scores {
        None if gate.scoring == Scoring::All => vec![1.0; chosen.len()],
        None => softmax(pick(outputs), top_k)?,
        Some(scores) => pick(&scores),
    };
    if gate.renormalise {
        for row in weights.chunks_exact_mut(top_k) {
            let sum = row.iter().sum::<f32>().max(gate.least_sum);
            row.iter_mut().for_each(|weight| *weight /= sum);
        }
    }
    if gate.scale != 1.0 {
        weights.iter_mut().for_each(|weight| *weight *= gate.scale);
    }
    Ok(Routing { top_k, experts: chosen, weights })
}

/// Chooses the best experts of one row after the other.
struct Choice<'a> {
    groups: Option<GroupSpec>,
    choosable: Option<&'a [bool]>,
    order: Vec<u32>,
    /// Of each group: its number and how good it is, then the best only.
    group_scores: Vec<(usize, f32)>,
    /// Scores of one group, in order.
    in_order: Vec<f32>,
    /// By expert: it is in one of the best groups.
    in_best: Vec<bool>,
}

impl<'a> Choice<'a> {
    fn new(experts: usize, groups: Option<GroupSpec>, choosable: Option<&'a [bool]>) -> Self {
        let (order, in_best) = ((0..experts as u32).collect(), vec![true; experts]);
        Self { groups, choosable, order, group_scores: Vec::new(), in_order: Vec::new(), in_best }
    }

    /// Appends the numbers of the `top_k` best scores, ascending.
    fn best(&mut self, scores: &[f32], top_k: usize, chosen: &mut Vec<u32>) {
        if let Some(groups) = self.groups {
            self.choose_groups(scores, groups);
        }
        let may = |expert: &u32| self.choosable.is_none_or(|all| all.get(*expert as usize).is_some_and(|may| *may));
        let in_best = |expert: &u32| self.in_best[*expert as usize];
        let best_first = |a: &u32, b: &u32| {
            let by_score = || scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
            may(b).cmp(&may(a)).then_with(|| in_best(b).cmp(&in_best(a))).then_with(by_score)
        };
        if top_k < scores.len() {
            self.order.select_nth_unstable_by(top_k, best_first);
        }
        let best = &mut self.order[..top_k];
        best.sort_unstable();
        chosen.extend_from_slice(best);
    }

    fn choose_groups(&mut self, scores: &[f32], GroupSpec { groups, chosen, best }: GroupSpec) {
        let size = scores.len() / groups;
        self.group_scores.clear();
        for (number, group) in scores.chunks_exact(size).enumerate() {
            self.in_order.clear();
            self.in_order.extend_from_slice(group);
            self.in_order.sort_unstable_by(|a, b| b.total_cmp(a));
            self.group_scores.push((number, self.in_order.iter().take(best).sum()));
        }
        self.group_scores.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        self.in_best.fill(false);
        for (number, _) in self.group_scores.iter().take(chosen) {
            self.in_best[number * size..(number + 1) * size].fill(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sigmoid(value: f32) -> f32 {
        1.0 / (1.0 + (-value).exp())
    }

    /// What is chosen of one row, with its weights.
    fn chosen(outputs: &[f32], top_k: usize, gate: &GateSpec, correction: Option<&[f32]>) -> Vec<(u32, f32)> {
        route(outputs, outputs.len(), top_k, gate, correction, None).unwrap().row(0).collect()
    }

    #[test]
    fn a_correction_changes_the_choice_and_not_the_weights() {
        let gate = GateSpec { correction: true, ..GateSpec::new(Scoring::Sigmoid) };
        let outputs = [0.5, 1.0, -1.0, 0.0];
        assert_eq!(chosen(&outputs, 2, &gate, Some(&[0.0; 4])), [(0, sigmoid(0.5)), (1, sigmoid(1.0))]);
        let corrected = chosen(&outputs, 2, &gate, Some(&[0.0, 0.0, 0.9, 0.0]));
        assert_eq!(corrected, [(1, sigmoid(1.0)), (2, sigmoid(-1.0))]);
        let scaled = GateSpec { renormalise: true, scale: 2.0, ..gate };
        let weights = chosen(&outputs, 2, &scaled, Some(&[0.0, 0.0, 0.9, 0.0]));
        assert!((weights[0].1 + weights[1].1 - 2.0).abs() < 1e-6, "{weights:?}");
    }

    #[test]
    fn experts_outside_the_best_groups_are_out_however_good_they_are() {
        let groups = Some(GroupSpec { groups: 3, chosen: 2, best: 2 });
        let gate = GateSpec { correction: true, groups, ..GateSpec::new(Scoring::Sigmoid) };
        // The best expert is in the group whose two best are worst together. Corrected scores may be negative.
        let outputs = [9.0, -9.0, 1.0, 1.1, 2.0, 2.1];
        let experts = |correction: &[f32]| {
            chosen(&outputs, 4, &gate, Some(correction)).iter().map(|(expert, _)| *expert).collect::<Vec<_>>()
        };
        assert_eq!(experts(&[0.0; 6]), [2, 3, 4, 5]);
        assert_eq!(experts(&[-5.0; 6]), [2, 3, 4, 5]);
        let by_best =
            GateSpec { groups: Some(GroupSpec { best: 1, chosen: 1, groups: 3 }), ..GateSpec::new(Scoring::Softmax) };
        assert_eq!(chosen(&outputs, 2, &by_best, None).iter().map(|(expert, _)| *expert).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn weights_of_scores_that_vanish_are_finite() {
        let gate = GateSpec { renormalise: true, ..GateSpec::new(Scoring::Sigmoid) };
        assert_eq!(chosen(&[-200.0; 3], 2, &gate, None), [(0, 0.0), (1, 0.0)]);
    }

    #[test]
    fn what_may_be_chosen_comes_first_whatever_its_group() {
        let groups = Some(GroupSpec { groups: 2, chosen: 1, best: 1 });
        let gate = GateSpec { groups, ..GateSpec::new(Scoring::Softmax) };
        let may = [false, false, true, false];
        let routing = route(&[3.0, 2.0, 1.0, 0.0], 4, 2, &gate, None, Some(&may)).unwrap();
        assert_eq!(routing.experts, [0, 2]);
    }
}
