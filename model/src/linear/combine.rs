//! `y = x W` for some rows of a matrix: they are added up, each times a value of `x`, in ascending order. What is one dot product per
//! output in [`super::kernel`] goes the other way here, for a matrix that is used from both sides.

#![expect(clippy::needless_range_loop, reason = "a tile is read best by the numbers of its rows and vectors")]

use crate::lanes::{LANES, Lanes, Stored, instantiate, padded};

/// What to compute: `y[row] = sum over i of x[row][i] * w[i]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Combination {
    /// Rows of `x` and of `y`.
    pub(crate) rows: usize,
    /// Values of a row of `x` that count, and rows of `w`.
    pub(crate) inputs: usize,
    /// Values of a row of `w` and of `y`.
    pub(crate) outputs: usize,
    /// Distance between rows of `x`.
    pub(crate) x_stride: usize,
    /// Distance between rows of `y`.
    pub(crate) y_stride: usize,
}

instantiate! {
    /// Computes a [`Combination`].
    ///
    /// # Safety
    /// The machine must have `isa`; `x`, `w` (`[inputs, outputs]`) and `y` are valid for what the shape says.
    pub(crate) fn combine<W: Stored>(x: *const f32, w: *const W, y: *mut f32, shape: Combination) = combine_with
}

#[inline(always)]
unsafe fn combine_with<L: Lanes, W: Stored>(x: *const f32, w: *const W, y: *mut f32, shape: Combination) {
    unsafe {
        if L::WIDE {
            by_tiles::<L, W, 4, 4>(x, w, y, shape);
        } else {
            by_tiles::<L, W, 2, 3>(x, w, y, shape);
        }
    }
}

/// By tiles of `R` rows and `V` vectors.
#[inline(always)]
unsafe fn by_tiles<L: Lanes, W: Stored, const R: usize, const V: usize>(
    x: *const f32,
    w: *const W,
    y: *mut f32,
    shape: Combination,
) {
    let mut at = 0;
    unsafe {
        while shape.outputs - at >= V * LANES {
            rows::<L, W, R, V>(x, w, y, shape, at);
            at += V * LANES;
        }
        while at < shape.outputs {
            rows::<L, W, R, 1>(x, w, y, shape, at);
            at += LANES;
        }
    }
}

#[inline(always)]
unsafe fn rows<L: Lanes, W: Stored, const R: usize, const V: usize>(
    x: *const f32,
    w: *const W,
    y: *mut f32,
    shape: Combination,
    at: usize,
) {
    let mut row = 0;
    unsafe {
        while shape.rows - row >= R {
            tile::<L, W, R, V>(x, w, y, shape, row, at);
            row += R;
        }
        while row < shape.rows {
            tile::<L, W, 1, V>(x, w, y, shape, row, at);
            row += 1;
        }
    }
}

/// `R` rows, and `V` vectors of them from output `at` on.
#[inline(always)]
unsafe fn tile<L: Lanes, W: Stored, const R: usize, const V: usize>(
    x: *const f32,
    w: *const W,
    y: *mut f32,
    shape: Combination,
    row: usize,
    at: usize,
) {
    // Wrapping additions, so that builds with overflow checks are fast too; all pointers stay inside the matrices.
    let whole = V > 1 || shape.outputs - at >= LANES;
    let left = shape.outputs.wrapping_sub(at);
    let mut xs = [x; R];
    for r in 0..R {
        xs[r] = x.wrapping_add(row.wrapping_add(r).wrapping_mul(shape.x_stride));
    }
    let mut w = w.wrapping_add(at);
    unsafe {
        let mut sums = [[L::splat(0.0); V]; R];
        for input in 0..shape.inputs {
            let mut vectors = [L::splat(0.0); V];
            for v in 0..V {
                let from = w.wrapping_add(v.wrapping_mul(LANES));
                vectors[v] = if whole { W::load::<L>(from) } else { W::load::<L>(padded(from, left).as_ptr()) };
            }
            for r in 0..R {
                let value = L::splat(*xs[r].wrapping_add(input));
                for v in 0..V {
                    sums[r][v] = L::mul_add(value, vectors[v], sums[r][v]);
                }
            }
            w = w.wrapping_add(shape.outputs);
        }
        for r in 0..R {
            let to = y.wrapping_add(row.wrapping_add(r).wrapping_mul(shape.y_stride).wrapping_add(at));
            for v in 0..V {
                if whole {
                    L::store(sums[r][v], to.wrapping_add(v.wrapping_mul(LANES)));
                } else {
                    let mut buffer = [0.0; LANES];
                    L::store(sums[r][v], buffer.as_mut_ptr());
                    std::ptr::copy_nonoverlapping(buffer.as_ptr(), to, left);
                }
            }
        }
    }
}
