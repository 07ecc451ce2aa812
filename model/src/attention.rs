//! Attention of one query row and head over the cache. Keys go in ascending order and nothing is shared between rows,
//! so that prefill at once, in chunks, or token by token gives the same bits.

#![expect(clippy::needless_range_loop, reason = "a tile is read best by the numbers of its rows and columns")]

use crate::lanes::{LANES, Lanes, exp, instantiate, padded};

/// One head of one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Query<'a> {
    /// `[head_dim]`
    pub(crate) query: &'a [f32],
    /// `[positions, head_dim]`: the keys that the row sees, oldest first.
    pub(crate) keys: &'a [f32],
    /// `[positions, head_dim]`
    pub(crate) values: &'a [f32],
    /// Scores are multiplied by this.
    pub(crate) scale: f32,
}

instantiate! {
    /// `out = softmax(scale * query . keys) . values`; `scores` is scratch space that grows as needed.
    ///
    /// # Safety
    /// The machine must have `isa`. All lengths must agree: `out` and `query` of the same, keys and values of a multiple
    /// of it, at least one position.
    pub(crate) fn attend(query: Query<'_>, scores: &mut Vec<f32>, out: &mut [f32]) = attend_with
}

#[inline(always)]
unsafe fn attend_with<L: Lanes>(query: Query<'_>, scores: &mut Vec<f32>, out: &mut [f32]) {
    let head_dim = query.query.len();
    let positions = query.keys.len() / head_dim;
    scores.clear();
    scores.resize(positions, 0.0);
    let mut at = 0;
    unsafe {
        while positions - at >= 4 {
            score::<L, 4>(query, at, scores);
            at += 4;
        }
        while at < positions {
            score::<L, 1>(query, at, scores);
            at += 1;
        }
        let sum = exponentials::<L>(scores);
        let mut dim = 0;
        while head_dim - dim >= 4 * LANES {
            weigh::<L, 4>(query, scores, sum, dim, out);
            dim += 4 * LANES;
        }
        while dim < head_dim {
            weigh::<L, 1>(query, scores, sum, dim, out);
            dim += LANES;
        }
    }
}

/// Scores of `N` keys from position `at` on.
#[inline(always)]
unsafe fn score<L: Lanes, const N: usize>(query: Query<'_>, at: usize, scores: &mut [f32]) {
    let head_dim = query.query.len();
    unsafe {
        let keys = query.keys.as_ptr().wrapping_add(at * head_dim);
        let mut sums = [L::splat(0.0); N];
        let mut dim = 0;
        while head_dim - dim >= LANES {
            let values = L::load(query.query.as_ptr().wrapping_add(dim));
            for n in 0..N {
                sums[n] = L::mul_add(values, L::load(keys.wrapping_add(n * head_dim + dim)), sums[n]);
            }
            dim += LANES;
        }
        if dim < head_dim {
            let left = head_dim - dim;
            let values = L::load(padded(query.query.as_ptr().wrapping_add(dim), left).as_ptr());
            for n in 0..N {
                let key = L::load(padded(keys.wrapping_add(n * head_dim + dim), left).as_ptr());
                sums[n] = L::mul_add(values, key, sums[n]);
            }
        }
        for n in 0..N {
            scores[at + n] = L::sum(sums[n]) * query.scale;
        }
    }
}

/// Replaces scores by `exp(score - largest)` and gives their sum.
#[inline(always)]
unsafe fn exponentials<L: Lanes>(scores: &mut [f32]) -> f32 {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    unsafe {
        let shift = L::splat(-largest);
        let mut sums = L::splat(0.0);
        for part in scores.chunks_mut(LANES) {
            let mut buffer = padded(part.as_ptr(), part.len());
            L::store(exp::<L>(L::add(L::load(buffer.as_ptr()), shift)), buffer.as_mut_ptr());
            // What lies beyond the last score must not count.
            buffer[part.len()..].fill(0.0);
            part.copy_from_slice(&buffer[..part.len()]);
            sums = L::add(sums, L::load(buffer.as_ptr()));
        }
        L::sum(sums)
    }
}

/// `N` times sixteen values of the output, from `dim` on.
#[inline(always)]
unsafe fn weigh<L: Lanes, const N: usize>(query: Query<'_>, weights: &[f32], sum: f32, dim: usize, out: &mut [f32]) {
    let head_dim = query.query.len();
    let left = head_dim - dim;
    unsafe {
        let mut sums = [L::splat(0.0); N];
        for (position, weight) in weights.iter().enumerate() {
            let values = query.values.as_ptr().wrapping_add(position * head_dim + dim);
            let weight = L::splat(*weight);
            for n in 0..N {
                let values = values.wrapping_add(n * LANES);
                let value = if left >= N * LANES { L::load(values) } else { L::load(padded(values, left).as_ptr()) };
                sums[n] = L::mul_add(weight, value, sums[n]);
            }
        }
        for n in 0..N {
            let mut buffer = [0.0; LANES];
            L::store(L::div(sums[n], L::splat(sum)), buffer.as_mut_ptr());
            let to = &mut out[dim + n * LANES..];
            let len = to.len().min(LANES);
            to[..len].copy_from_slice(&buffer[..len]);
        }
    }
}
