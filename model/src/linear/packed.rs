//! Weights in few bits, which are widened to f32 in registers: an output is the same chain of additions as in [`super::kernel`], so that
//! its bits are those of the same matrix widened in memory.
//!
//! Of more than a few rows, some columns are widened into a buffer that stays in a near cache, and multiplied as f32.

#![expect(clippy::needless_range_loop, reason = "a tile is read best by the numbers of its rows and columns")]

use std::marker::PhantomData;

use super::halves::{Halves, Plain, Source, by_halves};
use super::inputs::Inputs;
use super::kernel::{self, Shape};
use crate::lanes::{LANES, Lanes, instantiate, padded};

/// Values that are widened together.
pub(crate) const GROUP: usize = 2 * LANES;

/// Where a row of weights lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    pub(crate) values: *const u8,
    /// Scales that lie by themselves.
    pub(crate) scales: *const u8,
}

/// Where the rows of a matrix lie.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) first: Row,
    /// Bytes from the values of a row to those of the next.
    pub(crate) stride: usize,
    /// Bytes from the scales of a row to those of the next that has others.
    pub(crate) scale_stride: usize,
    /// So many rows have the same scales.
    pub(crate) rows_per_scale: usize,
}

impl Rows {
    #[inline(always)]
    pub(crate) fn row(self, row: usize) -> Row {
        let scales = (row / self.rows_per_scale).wrapping_mul(self.scale_stride);
        Row {
            values: self.first.values.wrapping_add(row.wrapping_mul(self.stride)),
            scales: self.first.scales.wrapping_add(scales),
        }
    }
}

/// A way to store weights in few bits.
///
/// # Safety
/// As for [`Lanes`]; rows must be valid for as many values as are asked for.
pub(crate) trait Packed: Copy + 'static {
    /// Values of a block; a multiple of [`GROUP`].
    const BLOCK: usize;
    /// What the values of a block have in common.
    type Block<L: Lanes>: Copy;

    unsafe fn block<L: Lanes>(row: Row, number: usize) -> Self::Block<L>;
    /// The values of one group of a block.
    unsafe fn group<L: Lanes>(block: &Self::Block<L>, number: usize) -> [L::V; 2];
    /// The first `len` values of a group, then anything. Only for formats that let rows end within a block.
    #[inline(always)]
    unsafe fn part<L: Lanes>(block: &Self::Block<L>, number: usize, _len: usize) -> [L::V; 2] {
        unsafe { Self::group::<L>(block, number) }
    }
}

instantiate! {
    /// Computes columns of `y = x W^T`.
    ///
    /// # Safety
    /// The machine must have `isa`, for which `x` is, `[rows, inputs]`; `w` has as many rows as there are columns, of `inputs` values, `y` is
    /// `[rows, outputs]`.
    pub(crate) fn multiply<P: Packed>(x: &Inputs, w: Rows, y: *mut f32, shape: Shape) = multiply_with
}

instantiate! {
    /// Widens the first `len` values of a row.
    ///
    /// # Safety
    /// The machine must have `isa`; `row` and `to` are valid for so many values.
    pub(crate) fn widen<P: Packed>(row: Row, len: usize, to: *mut f32) = widen_with
}

/// Columns that are widened together for many rows: what the kernels for f32 take at a time on machines with many registers.
const COLUMNS: usize = 4;

#[inline(always)]
unsafe fn multiply_with<L: Lanes, P: Packed>(x: &Inputs, w: Rows, y: *mut f32, shape: Shape) {
    unsafe {
        if !L::WIDE
            && let Some(x) = x.in_order::<L>()
        {
            by_halves::<L, _>(x, PackedRows::<P>(w, PhantomData), y, shape);
            return;
        }
        match shape.rows {
            0 => {}
            1 if L::WIDE => by_tiles::<L, P, 1, 4>(x.first, w, y, shape),
            2 if L::WIDE => by_tiles::<L, P, 2, 4>(x.first, w, y, shape),
            3 if L::WIDE => by_tiles::<L, P, 3, 4>(x.first, w, y, shape),
            4 if L::WIDE => by_tiles::<L, P, 4, 4>(x.first, w, y, shape),
            1 => by_tiles::<L, P, 1, 2>(x.first, w, y, shape),
            2 => by_tiles::<L, P, 2, 1>(x.first, w, y, shape),
            3 => by_tiles::<L, P, 3, 1>(x.first, w, y, shape),
            4 => by_tiles::<L, P, 4, 1>(x.first, w, y, shape),
            _ => by_widening::<L, P>(x, w, y, shape),
        }
    }
}

/// See [`multiply`]: all rows, which are `R`, with `C` columns at a time.
#[inline(always)]
unsafe fn by_tiles<L: Lanes, P: Packed, const R: usize, const C: usize>(
    x: *const f32,
    w: Rows,
    y: *mut f32,
    shape: Shape,
) {
    let (mut column, end) = shape.columns;
    unsafe {
        while end - column >= C {
            tile::<L, P, R, C>(x, w, y, shape, column);
            column += C;
        }
        while column < end {
            tile::<L, P, R, 1>(x, w, y, shape, column);
            column += 1;
        }
    }
}

/// See [`multiply`]: the columns one after another, a few at a time, as f32.
#[inline(always)]
unsafe fn by_widening<L: Lanes, P: Packed>(x: &Inputs, w: Rows, y: *mut f32, shape: Shape) {
    let inputs = shape.inputs;
    let (mut column, end) = shape.columns;
    let mut wide = Vec::<f32>::with_capacity(COLUMNS.min(end - column) * inputs);
    let to = wide.as_mut_ptr();
    while column < end {
        let columns = COLUMNS.min(end - column);
        unsafe {
            for c in 0..columns {
                widen_with::<L, P>(w.row(column + c), inputs, to.wrapping_add(c.wrapping_mul(inputs)));
            }
            // Column `column` of the matrix is the first of the buffer.
            let from = to.wrapping_sub(column.wrapping_mul(inputs)).cast_const();
            kernel::multiply_with::<L, f32>(x, from, y, Shape { columns: (column, column + columns), ..shape });
        }
        column += columns;
    }
}

#[inline(always)]
unsafe fn widen_with<L: Lanes, P: Packed>(row: Row, len: usize, to: *mut f32) {
    let mut at = 0usize;
    unsafe {
        while at < len {
            let block = P::block::<L>(row, at / P::BLOCK);
            let end = len.min(at.wrapping_add(P::BLOCK));
            let mut group = 0;
            while end.wrapping_sub(at) >= GROUP {
                let [first, second] = P::group::<L>(&block, group);
                L::store(first, to.wrapping_add(at));
                L::store(second, to.wrapping_add(at).wrapping_add(LANES));
                group += 1;
                at = at.wrapping_add(GROUP);
            }
            let left = end.wrapping_sub(at);
            if left > 0 {
                let values = stored::<L>(P::part::<L>(&block, group, left));
                std::ptr::copy_nonoverlapping(values.as_ptr(), to.wrapping_add(at), left);
                at = end;
            }
        }
    }
}

#[inline(always)]
unsafe fn stored<L: Lanes>([first, second]: [L::V; 2]) -> [f32; GROUP] {
    let mut values = [0.0; GROUP];
    unsafe {
        L::store(first, values.as_mut_ptr());
        L::store(second, values.as_mut_ptr().add(LANES));
    }
    values
}

/// For [`by_halves`], which widens rows as it puts them in order.
#[derive(Clone, Copy)]
struct PackedRows<P>(Rows, PhantomData<P>);

impl<P: Packed> Source for PackedRows<P> {
    type Value = f32;

    #[inline(always)]
    fn plain(self) -> Option<Plain<f32>> {
        None
    }

    #[inline(always)]
    fn place(self, row: usize) -> *const u8 {
        self.0.row(row).values
    }

    #[inline(always)]
    unsafe fn split<L: Lanes>(self, row: usize, inputs: usize, mut to: Halves) {
        let row = self.0.row(row);
        let mut at = 0usize;
        unsafe {
            while at < inputs {
                let block = P::block::<L>(row, at / P::BLOCK);
                let end = inputs.min(at.wrapping_add(P::BLOCK));
                let mut group = 0;
                while end.wrapping_sub(at) >= GROUP {
                    let [first, second] = P::group::<L>(&block, group);
                    to.put::<L>(first);
                    to.put::<L>(second);
                    group += 1;
                    at = at.wrapping_add(GROUP);
                }
                let left = end.wrapping_sub(at);
                if left > 0 {
                    let values = stored::<L>(P::part::<L>(&block, group, left));
                    for first in (0..left).step_by(LANES) {
                        let values = padded(values.as_ptr().wrapping_add(first), LANES.min(left - first));
                        to.put::<L>(L::load(values.as_ptr()));
                    }
                    at = end;
                }
            }
        }
    }
}

/// Bytes of weights that are asked for ahead of their use.
const AHEAD: usize = 4 << 10;
/// Bytes of a cache line.
const LINE: usize = 64;

/// `R` rows, which are all, and `C` columns.
#[inline(always)]
unsafe fn tile<L: Lanes, P: Packed, const R: usize, const C: usize>(
    x: *const f32,
    w: Rows,
    y: *mut f32,
    shape: Shape,
    column: usize,
) {
    let inputs = shape.inputs;
    let full = inputs / P::BLOCK * P::BLOCK;
    // Wrapping additions, so that builds with overflow checks are fast too; all pointers stay inside the matrices.
    let mut xs = [x; R];
    for r in 0..R {
        xs[r] = x.wrapping_add(r.wrapping_mul(inputs));
    }
    let mut ws = [w.first; C];
    for c in 0..C {
        ws[c] = w.row(column.wrapping_add(c));
    }
    // Columns of a tile follow each other in memory: the same distance through all of them.
    let (mut ahead, bytes) = (ws[0].values.wrapping_add(AHEAD), w.stride.wrapping_mul(C) / inputs.div_ceil(P::BLOCK));
    unsafe {
        let mut sums = [[L::splat(0.0); C]; R];
        let mut at = 0usize;
        while at != full {
            let mut line = 0;
            while line < bytes {
                L::prefetch(ahead.wrapping_add(line));
                line = line.wrapping_add(LINE);
            }
            ahead = ahead.wrapping_add(bytes);
            let mut blocks = [P::block::<L>(ws[0], at / P::BLOCK); C];
            for c in 1..C {
                blocks[c] = P::block::<L>(ws[c], at / P::BLOCK);
            }
            for group in 0..P::BLOCK / GROUP {
                let mut weights = [[L::splat(0.0); 2]; C];
                for c in 0..C {
                    weights[c] = P::group::<L>(&blocks[c], group);
                }
                add::<L, R, C>(&xs, at, &weights, &mut sums);
                at = at.wrapping_add(GROUP);
            }
        }
        if full < inputs {
            // Padded with zeros, and no vector more than the row has.
            let mut blocks = [P::block::<L>(ws[0], full / P::BLOCK); C];
            for c in 1..C {
                blocks[c] = P::block::<L>(ws[c], full / P::BLOCK);
            }
            let mut group = 0;
            while at < inputs {
                let left = GROUP.min(inputs.wrapping_sub(at));
                let mut weights = [[0.0; GROUP]; C];
                for c in 0..C {
                    let values = stored::<L>(P::part::<L>(&blocks[c], group, left));
                    weights[c][..left].copy_from_slice(&values[..left]);
                }
                for first in (0..left).step_by(LANES) {
                    for r in 0..R {
                        let values = padded(xs[r].wrapping_add(at + first), LANES.min(left - first));
                        for c in 0..C {
                            let weights = L::load(weights[c].as_ptr().add(first));
                            sums[r][c] = L::mul_add(L::load(values.as_ptr()), weights, sums[r][c]);
                        }
                    }
                }
                group += 1;
                at = at.wrapping_add(left);
            }
        }
        for r in 0..R {
            let y = y.wrapping_add(r.wrapping_mul(shape.outputs).wrapping_add(column));
            if let Some(four) = sums[r].first_chunk::<4>() {
                y.cast::<[f32; 4]>().write_unaligned(L::sum4(*four));
            } else {
                for c in 0..C {
                    y.wrapping_add(c).write(L::sum(sums[r][c]));
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn add<L: Lanes, const R: usize, const C: usize>(
    xs: &[*const f32; R],
    at: usize,
    weights: &[[L::V; 2]; C],
    sums: &mut [[L::V; C]; R],
) {
    for half in 0..2 {
        for r in 0..R {
            unsafe {
                let values = L::load(xs[r].wrapping_add(at.wrapping_add(half * LANES)));
                for c in 0..C {
                    sums[r][c] = L::mul_add(values, weights[c][half], sums[r][c]);
                }
            }
        }
    }
}
