//! Answers become the layer's output: who weights, who adds, and in which order.

use hanse_model::add_weighted;
use hanse_protocol::{Combine, ExpertRows};

use super::rows_of;

/// Adds all answers of a layer to `output`, `[rows, width]`: of each the assignments that were asked for, the layer's rows that the
/// frame carried, and the values.
pub(crate) fn add_answers<'a>(
    combine: Combine,
    width: usize,
    answers: impl Iterator<Item = (&'a [ExpertRows], &'a [u32], &'a [f32])>,
    output: &mut [f32],
) {
    let mut by_expert: Vec<(&ExpertRows, &[f32])> = Vec::new();
    for (assignments, rows, values) in answers {
        match combine {
            Combine::Peer => {
                for (&row, sum) in rows.iter().zip(values.chunks_exact(width)) {
                    add_row(output, width, row as usize, sum, 1.0);
                }
            }
            Combine::Client => {
                let mut rest = values;
                for assigned in assignments {
                    let (own, others) = rest.split_at(assigned.rows.len() * width);
                    by_expert.push((assigned, own));
                    rest = others;
                }
            }
        }
    }
    // In ascending expert number, as one process that holds everything adds: the same bits.
    by_expert.sort_unstable_by_key(|(assigned, _)| assigned.expert);
    for (assigned, values) in by_expert {
        for ((&row, &weight), value) in assigned.rows.iter().zip(&assigned.weights).zip(values.chunks_exact(width)) {
            add_row(output, width, row as usize, value, weight);
        }
    }
}

/// What a peer would have answered: the rows of its frame and the values, from each assignment's unweighted `outputs`.
pub(super) fn as_answer(
    combine: Combine,
    width: usize,
    assignments: &[ExpertRows],
    outputs: &[Vec<f32>],
) -> (Vec<u32>, Vec<f32>) {
    let rows = rows_of(assignments);
    if combine == Combine::Client {
        return (rows, outputs.concat());
    }
    let mut sums = vec![0.0; rows.len() * width];
    for (assigned, values) in assignments.iter().zip(outputs) {
        for ((row, &weight), value) in assigned.rows.iter().zip(&assigned.weights).zip(values.chunks_exact(width)) {
            if let Ok(index) = rows.binary_search(row) {
                add_row(&mut sums, width, index, value, weight);
            }
        }
    }
    (rows, sums)
}

fn add_row(output: &mut [f32], width: usize, row: usize, value: &[f32], weight: f32) {
    add_weighted(&mut output[row * width..(row + 1) * width], value, weight);
}
