//! What chooses the positions that a token sees in sparse attention. Source: DeepSeek-V3.2, arXiv:2512.02556, section 2.1, as transformers computes it:
//! without the Hadamard transform, which changes no product, and without rounding to fp8.
//!
//! The score of a position is the sum over heads of a weight times `relu(q . k)`; the token sees those with the highest scores, of equal ones the
//! earlier. A row's choice depends on nothing but its own query and the keys before it, so that it is the same however a prompt is cut.

use std::sync::{Mutex, PoisonError};

use super::layer::Pass;
use super::placed::{Placing, TrunkMatrix, linear};
use crate::checkpoint::{Checkpoint, LoadError};
use crate::device::DeviceError;
use crate::lanes::Isa;
use crate::linear::{Inputs, SharedMut, kernel, run_tasks};
use crate::spec::{IndexerSpec, LatentSpec, RopePairs};

/// Added to the variance in the norm of keys, whatever the config says of other norms.
const EPS: f32 = 1e-6;
/// Positions whose scores are one piece of work.
const RANGE: usize = 512;
/// What choosing among positions costs, in multiplications for each.
const PICKING: usize = 16;
/// Scores that are kept at a time: 16 MiB.
const MOST_SCORES: usize = 4 << 20;

#[derive(Debug)]
pub(super) struct Indexer {
    spec: IndexerSpec,
    /// `[heads, head_dim]` of the vector that queries are made of.
    wq_b: TrunkMatrix,
    wk: TrunkMatrix,
    k_norm: (Vec<f32>, Vec<f32>),
    weights_proj: TrunkMatrix,
}

/// What a pass of rows asks of an indexer.
pub(super) struct Asked {
    /// `[rows, heads, head_dim]`; like the weights none where all rows see all before them.
    queries: Vec<f32>,
    /// `[rows, heads]`
    weights: Vec<f32>,
    /// `[rows, head_dim]`: what the cache keeps.
    pub(super) keys: Vec<f32>,
}

impl Indexer {
    pub(super) fn load(
        checkpoint: &Checkpoint,
        layer: usize,
        attention: &LatentSpec,
        hidden: usize,
    ) -> Result<Option<Self>, LoadError> {
        let (Some(spec), Some(rank)) = (&attention.indexer, attention.q_lora_rank) else { return Ok(None) };
        let path = |name: &str| format!("model.layers.{layer}.self_attn.indexer.{name}");
        let matrix =
            |name: &str, outputs, inputs| checkpoint.matrix(&path(name), outputs, inputs).map(TrunkMatrix::from);
        let vector = |name: &str| checkpoint.vector(&path(name), spec.head_dim);
        Ok(Some(Self {
            wq_b: matrix("wq_b.weight", spec.heads * spec.head_dim, rank)?,
            wk: matrix("wk.weight", spec.head_dim, hidden)?,
            k_norm: (vector("k_norm.weight")?, vector("k_norm.bias")?),
            weights_proj: matrix("weights_proj.weight", spec.heads, hidden)?,
            spec: spec.clone(),
        }))
    }

    pub(super) fn place(&self, placing: &mut Placing<'_>) -> Result<(), DeviceError> {
        [&self.wq_b, &self.wk, &self.weights_proj].into_iter().try_for_each(|matrix| placing.matrix(matrix))
    }

    /// Queries, weights and keys of rows; `x` is `[rows, hidden]`, `compressed` what queries are made of.
    pub(super) fn ask(&self, x: &[f32], compressed: &[f32], pass: &Pass<'_, '_>) -> Asked {
        let IndexerSpec { heads, head_dim, .. } = self.spec;
        let mut keys = linear(x, &self.wk, pass.pool);
        keys.chunks_exact_mut(head_dim).for_each(|key| self.norm(key));
        // Other than in the attention around it, the first half rotates against the second.
        pass.angles.rotate_pairs(&mut keys, (1, head_dim), 0, RopePairs::Halves);
        if pass.rows.longest() <= self.spec.top_k {
            // Every row sees all before it; only later ones will ask for the keys.
            return Asked { queries: Vec::new(), weights: Vec::new(), keys };
        }
        let mut queries = linear(compressed, &self.wq_b, pass.pool);
        pass.angles.rotate_pairs(&mut queries, (heads, head_dim), 0, RopePairs::Halves);
        let mut weights = linear(x, &self.weights_proj, pass.pool);
        let scale = (heads as f32).powf(-0.5) * (head_dim as f32).powf(-0.5);
        weights.iter_mut().for_each(|weight| *weight *= scale);
        Asked { queries, weights, keys }
    }

    /// Layer norm, with mean and bias.
    fn norm(&self, key: &mut [f32]) {
        let len = key.len() as f32;
        let mean = key.iter().sum::<f32>() / len;
        let variance = key.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / len;
        let factor = 1.0 / (variance + EPS).sqrt();
        for ((value, weight), bias) in key.iter_mut().zip(&self.k_norm.0).zip(&self.k_norm.1) {
            *value = (*value - mean) * factor * weight + bias;
        }
    }

    /// For each row the positions that it sees, ascending, once the rows' keys are in the caches; `None` where it sees all before it.
    pub(super) fn choose(&self, asked: &Asked, pass: &Pass<'_, '_>) -> Vec<Option<Vec<usize>>> {
        let positions = &pass.rows.positions;
        let mut chosen = vec![None; positions.len()];
        let sparse: Vec<usize> = (0..positions.len()).filter(|row| positions[*row] + 1 > self.spec.top_k).collect();
        let width = pass.rows.longest();
        for rows in sparse.chunks((MOST_SCORES / width.max(1)).max(1)) {
            let scores = self.scores(asked, rows, width, pass);
            let picked: Vec<Mutex<Vec<usize>>> = rows.iter().map(|_| Mutex::default()).collect();
            run_tasks(rows.len(), rows.len() * width * PICKING, pass.pool, |number| {
                let scores = &scores[number * width..][..positions[rows[number]] + 1];
                *picked[number].lock().unwrap_or_else(PoisonError::into_inner) = best(scores, self.spec.top_k);
            });
            for (row, picked) in rows.iter().zip(picked) {
                chosen[*row] = Some(picked.into_inner().unwrap_or_else(PoisonError::into_inner));
            }
        }
        chosen
    }

    /// Scores of all positions up to that of each of `rows`, `width` apart.
    fn scores(&self, asked: &Asked, rows: &[usize], width: usize, pass: &Pass<'_, '_>) -> Vec<f32> {
        let IndexerSpec { heads, head_dim, .. } = self.spec;
        let isa = Isa::detect();
        let mut scores = vec![0.0; rows.len() * width];
        let out = SharedMut(scores.as_mut_ptr());
        let ranges = width.div_ceil(RANGE);
        run_tasks(rows.len() * ranges, rows.len() * width * heads * head_dim, pass.pool, |number| {
            let (index, first) = (number / ranges, number % ranges * RANGE);
            let row = rows[index];
            let Some(count) = (pass.rows.positions[row] + 1).checked_sub(first).filter(|left| *left > 0) else {
                return;
            };
            let count = count.min(RANGE);
            let (_, keys) = pass.cache_of(row).head(0);
            let keys = &keys[first * head_dim..][..count * head_dim];
            let queries = &asked.queries[row * heads * head_dim..][..heads * head_dim];
            let mut products = vec![0.0; heads * count];
            let shape = kernel::Shape { rows: heads, inputs: head_dim, outputs: count, columns: (0, count) };
            let queries = Inputs::new(isa, queries.as_ptr(), heads, head_dim);
            // SAFETY: detected above; the lengths sliced and allocated above.
            unsafe { kernel::multiply(isa, &queries, keys.as_ptr(), products.as_mut_ptr(), shape) };
            // SAFETY: the part of one row's scores that belongs to this task alone.
            let sums =
                unsafe { std::slice::from_raw_parts_mut(out.pointer().wrapping_add(index * width + first), count) };
            for (products, weight) in products.chunks_exact(count).zip(&asked.weights[row * heads..]) {
                for (sum, product) in sums.iter_mut().zip(products) {
                    *sum += product.max(0.0) * weight;
                }
            }
        });
        scores
    }
}

/// The places of the `top_k` highest scores, ascending; of equal ones the earlier counts more.
fn best(scores: &[f32], top_k: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..scores.len()).collect();
    places.select_nth_unstable_by(top_k - 1, |a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    places.truncate(top_k);
    places.sort_unstable();
    places
}

#[cfg(test)]
mod tests {
    use super::best;

    #[test]
    fn the_highest_scores_are_chosen_and_of_equal_ones_the_earlier() {
        assert_eq!(best(&[0.5, 2.0, -1.0, 0.5, 3.0, 0.5], 4), [0, 1, 3, 4]);
        assert_eq!(best(&[0.0; 5], 2), [0, 1]);
        assert_eq!(best(&[1.0, 2.0], 2), [0, 1]);
    }
}
