//! Products of many rows on machines with sixteen registers of eight lanes, such as those with AVX2: the same additions as in
//! [`super::kernel`], in an order of tiles that reads less than it multiplies.

#![expect(clippy::needless_range_loop, reason = "a tile is read best by the numbers of its rows and columns")]

use super::kernel::Shape;
use crate::lanes::{LANES, Lanes, Stored, padded};

/// What is multiplied together stays in the first cache: so many inputs of so many columns, and of four rows.
const HALVES_INPUTS: usize = 512;
const HALVES_COLUMNS: usize = 12;
/// Sums of so many rows stay in the second cache.
const HALVES_ROWS: usize = 64;

/// Rows of values that lie `stride` values apart.
#[derive(Clone, Copy)]
struct Strided {
    first: *const f32,
    stride: usize,
}

impl Strided {
    #[inline(always)]
    fn row(self, row: usize) -> *const f32 {
        self.first.wrapping_add(row.wrapping_mul(self.stride))
    }

    /// From a row and a value of each row on.
    #[inline(always)]
    fn from(self, row: usize, value: usize) -> Self {
        Self { first: self.row(row).wrapping_add(value), ..self }
    }
}

/// A range of columns, a multiple of three, on machines with sixteen registers of eight lanes: the sums of four rows and three columns
/// take twelve, first of eight lanes and then of the other eight. Tiles of sixteen lanes would read more than they multiply.
#[inline(always)]
pub(super) unsafe fn by_halves<L: Lanes, W: Stored>(x: *const f32, w: *const W, y: *mut f32, shape: Shape) {
    let Shape { rows, inputs, outputs, columns: (begin, end) } = shape;
    let full = inputs / LANES * LANES;
    let mut sums = vec![[0.0f32; LANES]; HALVES_COLUMNS * HALVES_ROWS.min(rows)];
    // So that columns whose length is a power of two do not fall on the same places of a cache.
    let stride = inputs.next_multiple_of(LANES) + LANES;
    let mut wide = Vec::<f32>::with_capacity(HALVES_COLUMNS * stride);
    let mut column = begin;
    while column < end {
        let columns = HALVES_COLUMNS.min(end - column);
        let weights = wide.as_mut_ptr();
        unsafe {
            for c in 0..columns {
                let from = w.wrapping_add(column.wrapping_add(c).wrapping_mul(inputs));
                widen_to::<L, W>(from, inputs, weights.wrapping_add(c.wrapping_mul(stride)));
            }
            let mut first = 0usize;
            while first < rows {
                let count = HALVES_ROWS.min(rows - first);
                let x = Strided { first: x, stride: inputs }.from(first, 0);
                sums[..count * columns].fill([0.0; LANES]);
                let mut at = 0usize;
                while at < inputs {
                    let len = if at < full { HALVES_INPUTS.min(full - at) } else { inputs - at };
                    let weights = Strided { first: weights, stride };
                    add_products::<L>((x.from(0, at), count), (weights.from(0, at), columns), len, sums.as_mut_ptr());
                    at = at.wrapping_add(len);
                }
                for row in 0..count {
                    let y = y.wrapping_add((first.wrapping_add(row)).wrapping_mul(outputs).wrapping_add(column));
                    for c in 0..columns {
                        y.wrapping_add(c).write(L::sum(L::load(sums[row * columns + c].as_ptr())));
                    }
                }
                first = first.wrapping_add(count);
            }
        }
        column += columns;
    }
}

/// Adds the products of `len` inputs of some rows and columns to `sums`, which are `[rows, columns]`. If `len` is not a multiple of [`LANES`]
/// the rest is padded.
#[inline(always)]
unsafe fn add_products<L: Lanes>(
    (x, rows): (Strided, usize),
    (w, columns): (Strided, usize),
    len: usize,
    sums: *mut [f32; LANES],
) {
    let mut row = 0usize;
    unsafe {
        while row < rows {
            let x = x.from(row, 0);
            let four = rows - row >= 4;
            let mut column = 0usize;
            while column < columns {
                let w = w.from(column, 0);
                let sums = sums.wrapping_add(row.wrapping_mul(columns).wrapping_add(column));
                if four {
                    halves_tile::<L, 4>(x, w, len, sums, columns);
                } else {
                    halves_tile::<L, 1>(x, w, len, sums, columns);
                }
                column += 3;
            }
            row += if four { 4 } else { 1 };
        }
    }
}

/// `R` rows and three columns of [`add_products`].
#[inline(always)]
unsafe fn halves_tile<L: Lanes, const R: usize>(
    x: Strided,
    w: Strided,
    len: usize,
    sums: *mut [f32; LANES],
    columns: usize,
) {
    if len.is_multiple_of(LANES) {
        return unsafe { halves_of::<L, R>(x, w, len, sums, columns) };
    }
    let (mut xs, mut ws) = ([[0.0; LANES]; R], [[0.0; LANES]; 3]);
    unsafe {
        for r in 0..R {
            xs[r] = padded(x.row(r), len);
        }
        for c in 0..3 {
            ws[c] = padded(w.row(c), len);
        }
        let of = |values: &[[f32; LANES]]| Strided { first: values.as_ptr().cast(), stride: LANES };
        halves_of::<L, R>(of(&xs), of(&ws), LANES, sums, columns);
    }
}

/// [`halves_tile`] where `len` is a multiple of [`LANES`].
#[inline(always)]
unsafe fn halves_of<L: Lanes, const R: usize>(
    x: Strided,
    w: Strided,
    len: usize,
    sums: *mut [f32; LANES],
    columns: usize,
) {
    for half in [0, LANES / 2] {
        let of = |r: usize, c: usize| {
            sums.wrapping_add(r.wrapping_mul(columns).wrapping_add(c)).cast::<f32>().wrapping_add(half)
        };
        unsafe {
            let mut own = [[L::load_half(of(0, 0)); 3]; R];
            for r in 0..R {
                for c in 0..3 {
                    own[r][c] = L::load_half(of(r, c));
                }
            }
            let mut at = half;
            while at < len {
                let mut weights = [own[0][0]; 3];
                for c in 0..3 {
                    weights[c] = L::load_half(w.row(c).wrapping_add(at));
                }
                for r in 0..R {
                    let values = L::load_half(x.row(r).wrapping_add(at));
                    for c in 0..3 {
                        own[r][c] = L::mul_add_half(values, weights[c], own[r][c]);
                    }
                }
                at = at.wrapping_add(LANES);
            }
            for r in 0..R {
                for c in 0..3 {
                    L::store_half(own[r][c], of(r, c));
                }
            }
        }
    }
}

/// Widens `len` values.
#[inline(always)]
unsafe fn widen_to<L: Lanes, W: Stored>(from: *const W, len: usize, to: *mut f32) {
    unsafe {
        let mut at = 0usize;
        while len.wrapping_sub(at) >= LANES {
            L::store(W::load::<L>(from.wrapping_add(at)), to.wrapping_add(at));
            at = at.wrapping_add(LANES);
        }
        let left = len.wrapping_sub(at);
        if left > 0 {
            let mut buffer = [0.0; LANES];
            L::store(W::load::<L>(padded(from.wrapping_add(at), left).as_ptr()), buffer.as_mut_ptr());
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), to.wrapping_add(at), left);
        }
    }
}
