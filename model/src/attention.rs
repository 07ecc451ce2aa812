//! Attention of query rows over the cache. Every query goes through its keys in ascending order and shares no sum with
//! another, so that prefill at once, in chunks, or token by token gives the same bits. Queries that see the same keys are
//! computed side by side, so that keys and values are read once for all of them.

#![expect(clippy::needless_range_loop, reason = "a tile is read best by the numbers of its rows and columns")]

#[cfg(test)]
mod tests;

use crate::lanes::{LANES, Lanes, exp, instantiate, padded};

/// Queries over the keys and values of one head of one sequence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group<'a> {
    /// `[positions, key_dim]`, oldest first.
    pub(crate) keys: &'a [f32],
    /// `[positions, value_stride]`, of which the first `value_dim` of each count.
    pub(crate) values: &'a [f32],
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) value_stride: usize,
    /// Scores are multiplied by this.
    pub(crate) scale: f32,
    pub(crate) queries: &'a [Query],
}

/// One head of one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Query {
    /// `[key_dim]`
    pub(crate) query: *const f32,
    /// `[value_dim]`: the result.
    pub(crate) out: *mut f32,
    /// One more score, not scaled, which has no value.
    pub(crate) sink: Option<f32>,
    /// The positions that it sees, from this one
    pub(crate) start: usize,
    /// to the one before this.
    pub(crate) end: usize,
}

/// Positions whose keys or values stay in the cache of a core while all queries of a group go by.
const BLOCK: usize = 64;

instantiate! {
    /// `out = softmax(scale * query . keys) . values` for each query, the softmax over its sink too.
    ///
    /// # Safety
    /// The machine must have `isa`. There is a query, and each sees a position at least; keys and values have all that are
    /// seen; the pointers are good for `key_dim` and
    /// `value_dim` values, and nobody else touches the results.
    pub(crate) fn attend(group: Group<'_>) = attend_with
}

#[inline(always)]
unsafe fn attend_with<L: Lanes>(group: Group<'_>) {
    unsafe {
        if L::WIDE {
            attend_tiles::<L, 4, 4, 4>(group);
        } else {
            attend_tiles::<L, 2, 3, 3>(group);
        }
    }
}

/// By tiles of `R` queries with `K` keys or `V` vectors of values.
#[inline(always)]
unsafe fn attend_tiles<L: Lanes, const R: usize, const K: usize, const V: usize>(group: Group<'_>) {
    let queries = group.queries;
    let first = queries.iter().map(|query| query.start).min().unwrap_or(0);
    let last = queries.iter().map(|query| query.end).max().unwrap_or(0);
    let pieces = pieces::<R>(queries, first, last);
    // `[queries, positions]`, and `[queries, value_dim]` with room for whole vectors.
    let (width, dims) = (last - first, group.value_dim.next_multiple_of(LANES));
    let mut scratch = vec![0.0f32; queries.len() * (width + dims + 1)];
    let (scores, rest) = scratch.split_at_mut(queries.len() * width);
    let (sums, totals) = rest.split_at_mut(queries.len() * dims);
    unsafe {
        for piece in &pieces {
            let scores = Rows { values: scores.as_mut_ptr().add(piece.number * width + piece.from - first), width };
            if piece.together {
                score::<L, R, K>(group, *piece, scores);
            } else {
                score::<L, 1, K>(group, *piece, scores);
            }
        }
        for (number, (query, scores)) in queries.iter().zip(scores.chunks_mut(width)).enumerate() {
            totals[number] = exponentials::<L>(&mut scores[query.start - first..query.end - first], query.sink);
        }
        for piece in &pieces {
            let weights = Rows { values: scores.as_mut_ptr().add(piece.number * width + piece.from - first), width };
            let sums = Rows { values: sums.as_mut_ptr().add(piece.number * dims), width: dims };
            if piece.together {
                weigh::<L, R, V>(group, *piece, weights, sums);
            } else {
                weigh::<L, 1, V>(group, *piece, weights, sums);
            }
        }
        for ((query, sums), total) in queries.iter().zip(sums.chunks_mut(dims)).zip(totals) {
            for part in sums.chunks_exact_mut(LANES) {
                L::store(L::div(L::load(part.as_ptr()), L::splat(*total)), part.as_mut_ptr());
            }
            std::ptr::copy_nonoverlapping(sums.as_ptr(), query.out, group.value_dim);
        }
    }
}

/// Some positions of one query, or of a tile of queries.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// The first of the queries.
    number: usize,
    together: bool,
    from: usize,
    to: usize,
}

/// Rows of some queries, `width` apart.
#[derive(Clone, Copy)]
struct Rows {
    values: *mut f32,
    width: usize,
}

/// Cuts the work such that every query meets each of its positions once, in ascending order: with tiles of `R` queries
/// where all of them see the positions, and alone elsewhere. Block by block, all queries of each.
fn pieces<const R: usize>(queries: &[Query], first: usize, last: usize) -> Vec<Piece> {
    // One tile has nobody to share with.
    let size = if queries.len() <= R { (last - first).max(1) } else { BLOCK };
    let mut pieces = Vec::with_capacity((last - first).div_ceil(size) * queries.len().div_ceil(R));
    for block in (first..last).step_by(size) {
        let block_end = last.min(block + size);
        for (tile_number, tile) in queries.chunks(R).enumerate() {
            let mut from = tile.iter().fold(block, |from, query| from.max(query.start));
            let mut to = tile.iter().fold(block_end, |to, query| to.min(query.end));
            if tile.len() < R || from >= to {
                // Nothing is seen by a whole tile: all comes before it.
                (from, to) = (block_end, block_end);
            }
            let alone = |first: usize, last: usize| {
                (tile_number * R..).zip(tile).filter_map(move |(number, query)| {
                    let (from, to) = (first.max(query.start), last.min(query.end));
                    (from < to).then_some(Piece { number, together: false, from, to })
                })
            };
            pieces.extend(alone(block, from));
            if from < to {
                pieces.push(Piece { number: tile_number * R, together: true, from, to });
            }
            pieces.extend(alone(to, block_end));
        }
    }
    pieces
}

/// Scores of the keys of a piece.
#[inline(always)]
unsafe fn score<L: Lanes, const R: usize, const K: usize>(group: Group<'_>, piece: Piece, scores: Rows) {
    let mut at = piece.from;
    unsafe {
        while piece.to - at >= K {
            score_tile::<L, R, K>(group, piece, at, scores);
            at += K;
        }
        while at < piece.to {
            score_tile::<L, R, 1>(group, piece, at, scores);
            at += 1;
        }
    }
}

/// Scores of `K` keys from position `at` on.
#[inline(always)]
unsafe fn score_tile<L: Lanes, const R: usize, const K: usize>(
    group: Group<'_>,
    piece: Piece,
    at: usize,
    scores: Rows,
) {
    let key_dim = group.key_dim;
    unsafe {
        let keys = group.keys.as_ptr().wrapping_add(at * key_dim);
        let mut queries = [keys; R];
        for r in 0..R {
            queries[r] = group.queries.get_unchecked(piece.number.wrapping_add(r)).query;
        }
        let mut sums = [[L::splat(0.0); K]; R];
        let mut dim = 0usize;
        while key_dim.wrapping_sub(dim) >= LANES {
            let mut values = [L::splat(0.0); R];
            for r in 0..R {
                values[r] = L::load(queries[r].wrapping_add(dim));
            }
            for k in 0..K {
                let key = L::load(keys.wrapping_add(k.wrapping_mul(key_dim).wrapping_add(dim)));
                for r in 0..R {
                    sums[r][k] = L::mul_add(values[r], key, sums[r][k]);
                }
            }
            dim = dim.wrapping_add(LANES);
        }
        if dim < key_dim {
            let left = key_dim - dim;
            for r in 0..R {
                let value = L::load(padded(queries[r].wrapping_add(dim), left).as_ptr());
                for k in 0..K {
                    let key = keys.wrapping_add(k.wrapping_mul(key_dim).wrapping_add(dim));
                    sums[r][k] = L::mul_add(value, L::load(padded(key, left).as_ptr()), sums[r][k]);
                }
            }
        }
        for r in 0..R {
            let to = scores.values.wrapping_add(r.wrapping_mul(scores.width).wrapping_add(at.wrapping_sub(piece.from)));
            if let Some(four) = sums[r].first_chunk::<4>() {
                let four = L::sum4(*four).map(|sum| sum * group.scale);
                to.cast::<[f32; 4]>().write_unaligned(four);
            } else {
                for k in 0..K {
                    to.wrapping_add(k).write(L::sum(sums[r][k]) * group.scale);
                }
            }
        }
    }
}

/// Replaces scores by `exp(score - largest)` and gives their sum, in which the sink counts.
#[inline(always)]
unsafe fn exponentials<L: Lanes>(scores: &mut [f32], sink: Option<f32>) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let largest = scores.iter().copied().fold(sink.unwrap_or(f32::NEG_INFINITY), larger);
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
        let total = L::sum(sums);
        let Some(sink) = sink else { return total };
        let mut own = [0.0; LANES];
        L::store(exp::<L>(L::splat(sink - largest)), own.as_mut_ptr());
        total + own[0]
    }
}

/// Adds the weighted values of a piece to the sums.
#[inline(always)]
unsafe fn weigh<L: Lanes, const R: usize, const V: usize>(group: Group<'_>, piece: Piece, weights: Rows, sums: Rows) {
    let mut dim = 0;
    unsafe {
        while group.value_dim - dim >= V * LANES {
            weigh_tile::<L, R, V>(group, piece, dim, weights, sums);
            dim += V * LANES;
        }
        while dim < group.value_dim {
            weigh_tile::<L, R, 1>(group, piece, dim, weights, sums);
            dim += LANES;
        }
    }
}

/// `V` times sixteen values of the sums, from `dim` on.
#[inline(always)]
unsafe fn weigh_tile<L: Lanes, const R: usize, const V: usize>(
    group: Group<'_>,
    piece: Piece,
    dim: usize,
    weights: Rows,
    sums: Rows,
) {
    let stride = group.value_stride;
    let left = group.value_dim - dim;
    unsafe {
        let mut chains = [[L::splat(0.0); V]; R];
        for r in 0..R {
            for v in 0..V {
                chains[r][v] = L::load(sums.values.wrapping_add(r * sums.width + dim + v * LANES));
            }
        }
        let mut values = group.values.as_ptr().wrapping_add(piece.from * stride + dim);
        for position in 0..piece.to - piece.from {
            let mut vectors = [L::splat(0.0); V];
            for v in 0..V {
                let from = values.wrapping_add(v * LANES);
                let whole = V > 1 || left >= LANES;
                vectors[v] = if whole { L::load(from) } else { L::load(padded(from, left).as_ptr()) };
            }
            for r in 0..R {
                let weight =
                    L::splat(*weights.values.wrapping_add(r.wrapping_mul(weights.width).wrapping_add(position)));
                for v in 0..V {
                    chains[r][v] = L::mul_add(weight, vectors[v], chains[r][v]);
                }
            }
            values = values.wrapping_add(stride);
        }
        for r in 0..R {
            for v in 0..V {
                L::store(chains[r][v], sums.values.wrapping_add(r * sums.width + dim + v * LANES));
            }
        }
    }
}
