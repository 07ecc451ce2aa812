//! The inner loops. An output is one dot product: sixteen lanes, each a chain of fused multiply-adds in ascending
//! order, the end of a row padded with zeros, then one fixed tree of additions. Tiles only decide how many outputs
//! are computed side by side.
//!
//! At few rows the limit is reading weights from memory, which takes asking for them ahead; at many it is the rate of
//! multiplications, which takes sums that stay in registers.

#![expect(clippy::needless_range_loop, reason = "a tile is read best by the numbers of its rows and columns")]

use super::halves::{Plain, by_halves};
use super::inputs::Inputs;
use crate::lanes::{LANES, Lanes, Stored, instantiate, padded};

/// What to compute: `y[row][column]` for all rows and a range of columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) rows: usize,
    pub(crate) inputs: usize,
    /// Distance between rows of `y`.
    pub(crate) outputs: usize,
    pub(crate) columns: (usize, usize),
}

instantiate! {
    /// Computes columns of `y = x W^T`.
    ///
    /// # Safety
    /// The machine must have `isa`, for which `x` is, `[rows, inputs]`; `w` is `[outputs, inputs]`, `y` `[rows, outputs]`.
    pub(crate) fn multiply<W: Stored>(x: &Inputs, w: *const W, y: *mut f32, shape: Shape) = multiply_with
}

#[inline(always)]
pub(super) unsafe fn multiply_with<L: Lanes, W: Stored>(x: &Inputs, w: *const W, y: *mut f32, shape: Shape) {
    if !L::WIDE
        && let Some(x) = unsafe { x.in_order::<L>() }
    {
        unsafe { by_halves::<L, _>(x, Plain { first: w, inputs: shape.inputs }, y, shape) };
        return;
    }
    let most = if L::WIDE { rows_at_a_time(shape.inputs) } else { shape.rows };
    let mut first = 0usize;
    while first < shape.rows {
        let rows = most.min(shape.rows.wrapping_sub(first));
        let (x, y) =
            (x.first.wrapping_add(first.wrapping_mul(shape.inputs)), y.wrapping_add(first.wrapping_mul(shape.outputs)));
        unsafe { some_rows::<L, W>(x, w, y, Shape { rows, ..shape }) };
        first = first.wrapping_add(rows);
    }
}

/// Bytes of rows that stay in the second cache while all columns go through.
const ROW_BYTES: usize = 512 << 10;

/// Rows, a multiple of what a tile has, that fit into [`ROW_BYTES`]; so many at least that reading the weights again for the next ones
/// takes no time beside computing.
#[inline(always)]
fn rows_at_a_time(inputs: usize) -> usize {
    let fitting = ROW_BYTES / (inputs * size_of::<f32>());
    (fitting / 4 * 4).max(32)
}

/// [`multiply`] of rows that stay in the second cache.
#[inline(always)]
unsafe fn some_rows<L: Lanes, W: Stored>(x: *const f32, w: *const W, y: *mut f32, shape: Shape) {
    let (mut column, end) = shape.columns;
    unsafe {
        // What a tile reads, each value once, comes from the second cache: with four columns of weights in f32 that and not multiplying would be the limit.
        while L::WIDE && size_of::<W>() == 4 && shape.rows >= 4 && end - column >= 6 && end - column != 8 {
            rows::<L, W, 6>(x, w, y, shape, column);
            column += 6;
        }
        while L::WIDE && end - column >= 4 {
            rows::<L, W, 4>(x, w, y, shape, column);
            column += 4;
        }
        while !L::WIDE && end - column >= 3 {
            rows::<L, W, 3>(x, w, y, shape, column);
            column += 3;
        }
        while column < end {
            rows::<L, W, 1>(x, w, y, shape, column);
            column += 1;
        }
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// Bytes of weights that are asked for ahead of their use. Columns of a tile follow each other in memory, but a machine
/// guesses at most to the end of a page, which often is the end of a column.
const AHEAD: usize = 16 << 10;

/// All rows of `C` columns. The weights of the columns after them are asked for meanwhile: by the first tile, which itself reads its weights from memory; or, where
/// there are so many rows that computing takes longer than reading, by the first tiles in equal shares, so that memory is read while all of them compute.
#[inline(always)]
unsafe fn rows<L: Lanes, W: Stored, const C: usize>(
    x: *const f32,
    w: *const W,
    y: *mut f32,
    shape: Shape,
    column: usize,
) {
    let mut row = 0;
    let next = w.wrapping_add(column.wrapping_add(C).wrapping_mul(shape.inputs)).cast::<u8>();
    let share = |part: usize| next.wrapping_add(part.wrapping_mul(C * size_of::<W>()).wrapping_mul(shape.inputs) / 4);
    unsafe {
        if L::WIDE && shape.rows >= 16 {
            for part in 0..4 {
                tile::<L, W, 4, C, 4>(x, w, y, shape, (row, column), share(part));
                row += 4;
            }
        } else if L::WIDE && shape.rows >= 8 {
            for part in 0..2 {
                tile::<L, W, 4, C, 2>(x, w, y, shape, (row, column), share(2 * part));
                row += 4;
            }
        } else {
            let ahead = w.wrapping_add(column.wrapping_mul(shape.inputs)).cast::<u8>().wrapping_add(AHEAD);
            if L::WIDE && shape.rows >= 4 {
                tile::<L, W, 4, C, 1>(x, w, y, shape, (row, column), ahead);
                row = 4;
            } else if shape.rows >= 2 {
                tile::<L, W, 2, C, 1>(x, w, y, shape, (row, column), ahead);
                row = 2;
            } else if shape.rows == 1 {
                tile::<L, W, 1, C, 1>(x, w, y, shape, (row, column), ahead);
                row = 1;
            }
        }
        while L::WIDE && shape.rows - row >= 4 {
            tile::<L, W, 4, C, 0>(x, w, y, shape, (row, column), next);
            row += 4;
        }
        while shape.rows - row >= 2 {
            tile::<L, W, 2, C, 0>(x, w, y, shape, (row, column), next);
            row += 2;
        }
        if row < shape.rows {
            tile::<L, W, 1, C, 0>(x, w, y, shape, (row, column), next);
        }
    }
}

/// `R` rows and `C` columns. Asks for as many weights from `ahead` on as it reads, or one in `SHARE` of them; for none where that is 0.
#[inline(always)]
unsafe fn tile<L: Lanes, W: Stored, const R: usize, const C: usize, const SHARE: usize>(
    x: *const f32,
    w: *const W,
    y: *mut f32,
    shape: Shape,
    (row, column): (usize, usize),
    mut ahead: *const u8,
) {
    let inputs = shape.inputs;
    let tail = inputs % LANES;
    let full = inputs - tail;
    // Wrapping additions, so that builds with overflow checks are fast too; all pointers stay inside the matrices.
    let (mut xs, mut ws) = ([x; R], [w; C]);
    for r in 0..R {
        xs[r] = x.wrapping_add(row.wrapping_add(r).wrapping_mul(inputs));
    }
    for c in 0..C {
        ws[c] = w.wrapping_add(column.wrapping_add(c).wrapping_mul(inputs));
    }
    unsafe {
        let mut sums = [[L::splat(0.0); C]; R];
        let mut at = 0usize;
        while at != full {
            let mut weights = [L::splat(0.0); C];
            for c in 0..C {
                weights[c] = W::load::<L>(ws[c].wrapping_add(at));
            }
            if let Some(bytes) = (C * LANES * size_of::<W>()).checked_div(SHARE) {
                for line in 0..bytes.div_ceil(LINE) {
                    L::prefetch(ahead.wrapping_add(line * LINE));
                }
                ahead = ahead.wrapping_add(bytes);
            }
            for r in 0..R {
                let values = L::load(xs[r].wrapping_add(at));
                for c in 0..C {
                    sums[r][c] = L::mul_add(values, weights[c], sums[r][c]);
                }
            }
            at = at.wrapping_add(LANES);
        }
        if tail > 0 {
            let mut weights = [L::splat(0.0); C];
            for c in 0..C {
                weights[c] = W::load::<L>(padded(ws[c].wrapping_add(full), tail).as_ptr());
            }
            for r in 0..R {
                let values = L::load(padded(xs[r].wrapping_add(full), tail).as_ptr());
                for c in 0..C {
                    sums[r][c] = L::mul_add(values, weights[c], sums[r][c]);
                }
            }
        }
        for r in 0..R {
            let y = y.wrapping_add(row.wrapping_add(r).wrapping_mul(shape.outputs).wrapping_add(column));
            if let (Some(first), Some(last)) = (sums[r].first_chunk::<4>(), sums[r].last_chunk::<4>()) {
                y.cast::<[f32; 4]>().write_unaligned(L::sum4(*first));
                if C > 4 {
                    y.wrapping_add(C - 4).cast::<[f32; 4]>().write_unaligned(L::sum4(*last));
                }
            } else {
                for c in 0..C {
                    y.wrapping_add(c).write(L::sum(sums[r][c]));
                }
            }
        }
    }
}

instantiate! {
    /// `gate[i] = silu(gate[i]) * up[i]` for `len` values.
    ///
    /// # Safety
    /// The machine must have `isa`; both pointers are valid for `len` values.
    pub(crate) fn silu_mul(gate: *mut f32, up: *const f32, len: usize) = silu_mul_with
}

#[inline(always)]
unsafe fn silu_mul_with<L: Lanes>(gate: *mut f32, up: *const f32, len: usize) {
    unsafe {
        let mut at = 0;
        while len - at >= LANES {
            let value = silu_mul_lanes::<L>(L::load(gate.add(at)), L::load(up.add(at)));
            L::store(value, gate.add(at));
            at += LANES;
        }
        if at < len {
            let left = len - at;
            let value = silu_mul_lanes::<L>(
                L::load(padded(gate.add(at), left).as_ptr()),
                L::load(padded(up.add(at), left).as_ptr()),
            );
            let mut buffer = [0.0; LANES];
            L::store(value, buffer.as_mut_ptr());
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), gate.add(at), left);
        }
    }
}

#[inline(always)]
unsafe fn silu_mul_lanes<L: Lanes>(gate: L::V, up: L::V) -> L::V {
    unsafe {
        let minus = L::mul(gate, L::splat(-1.0));
        let denominator = L::add(L::splat(1.0), crate::lanes::exp::<L>(minus));
        L::mul(L::div(gate, denominator), up)
    }
}
