//! One pass: joins rows by expert, computes them, and gives each request what is its own.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use hanse_model::{HeldJob, add_weighted, run_held};
use hanse_protocol::Combine;

use super::queue::Slice;
use super::{Work, WorkError};
use crate::store::{ExpertStore, Snapshot};

/// The rows of one expert over all requests of a pass.
struct Joined<'a> {
    /// The expert as the first of the requests has it; the others have the same weights.
    experts: &'a Snapshot,
    /// Slices, in the order of the rows.
    slices: Vec<usize>,
    input: Vec<f32>,
    output: Vec<f32>,
    /// Its device was lent: nothing is computed.
    lent: bool,
}

/// A part of an assignment: its place among the work's, and the range of its rows.
type Part = (usize, Range<usize>);

/// The parts of assignments that a range of pairs covers, in order.
fn parts(work: &Work, pairs: &Range<usize>) -> Vec<Part> {
    let mut first = 0;
    let mut parts = Vec::new();
    for (index, assigned) in work.assignments.iter().enumerate() {
        let last = first + assigned.rows.len();
        let (start, end) = (pairs.start.max(first), pairs.end.min(last));
        if start < end {
            parts.push((index, start - first..end - first));
        }
        first = last;
    }
    parts
}

/// Computes ranges of requests' pairs together, and has the requests advance. Those that needed a device that failed are refused, and
/// the store gives the device up; those that need one that was lent are refused before anything of theirs is computed there.
pub(super) fn compute(slices: &[Slice], store: &ExpertStore) {
    let started = Instant::now();
    let all_parts: Vec<Vec<Part>> = slices.iter().map(|(request, pairs)| parts(&request.work, pairs)).collect();
    let mut joined: BTreeMap<(u32, u32), Joined<'_>> = BTreeMap::new();
    for (slice, ((request, _), parts)) in slices.iter().zip(&all_parts).enumerate() {
        let work = &request.work;
        for (index, rows) in parts {
            let assigned = &work.assignments[*index];
            let expert = joined.entry((work.layer, assigned.expert)).or_insert_with(|| Joined {
                experts: &work.experts,
                slices: Vec::new(),
                input: Vec::with_capacity(rows.len() * work.hidden_size),
                output: Vec::new(),
                lent: false,
            });
            expert.slices.push(slice);
            for &row in &assigned.rows[rows.clone()] {
                let start = row as usize * work.hidden_size;
                expert.input.extend_from_slice(&work.hidden[start..start + work.hidden_size]);
            }
        }
    }
    let mut jobs: Vec<HeldJob<'_>> = joined
        .iter_mut()
        .filter_map(|((layer, expert), rows)| {
            rows.output.resize(rows.input.len(), 0.0);
            let expert = rows.experts.expert(*layer, *expert)?;
            rows.lent = !store.works(expert.device());
            if rows.lent {
                return None;
            }
            Some(HeldJob { expert, hidden: &rows.input, output: &mut rows.output })
        })
        .collect();
    let failures = run_held(&mut jobs);
    drop(jobs);
    failures.iter().for_each(|(device, error)| store.give_up(device, error));
    let computed = started.elapsed();

    // Experts ascend in `joined` as they do in each request, so that each slice's outputs come in the order of its parts.
    let mut outputs: Vec<Vec<&[f32]>> = all_parts.iter().map(|parts| Vec::with_capacity(parts.len())).collect();
    for rows in joined.values() {
        let mut rest = rows.output.as_slice();
        for &slice in &rows.slices {
            let values = all_parts[slice][outputs[slice].len()].1.len() * slices[slice].0.work.hidden_size;
            let (own, others) = rest.split_at(values);
            outputs[slice].push(own);
            rest = others;
        }
    }
    let lost = |layer: u32, expert: u32| {
        let rows = joined.get(&(layer, expert))?;
        let held = rows.experts.expert(layer, expert)?;
        let failed = failures.iter().any(|(device, _)| held.is_on(device));
        if failed { Some(WorkError::Device) } else { rows.lent.then_some(WorkError::Lent) }
    };
    for (((request, pairs), parts), outputs) in slices.iter().zip(&all_parts).zip(outputs) {
        let Work { layer, assignments, .. } = &request.work;
        if let Some(error) = parts.iter().find_map(|(index, _)| lost(*layer, assignments[*index].expert)) {
            request.refuse(error);
            continue;
        }
        request.advance(pairs.len(), started, computed, |values| add(&request.work, parts, &outputs, values));
    }
}

/// Adds the outputs of some parts to a request's values.
fn add(work: &Work, parts: &[Part], outputs: &[&[f32]], values: &mut Vec<f32>) {
    match work.combine {
        Combine::Client => {
            if values.is_empty() {
                values.reserve_exact(work.pairs() * work.hidden_size);
            }
            outputs.iter().for_each(|output| values.extend_from_slice(output));
        }
        // The weighted sum of each row's experts, in ascending expert number.
        Combine::Peer => {
            values.resize(work.hidden.len(), 0.0);
            let width = work.hidden_size;
            for ((index, rows), output) in parts.iter().zip(outputs) {
                let assigned = &work.assignments[*index];
                let weighted = assigned.rows[rows.clone()].iter().zip(&assigned.weights[rows.clone()]);
                for ((&row, &weight), value) in weighted.zip(output.chunks_exact(width)) {
                    let start = row as usize * width;
                    add_weighted(&mut values[start..start + width], value, weight);
                }
            }
        }
    }
}
