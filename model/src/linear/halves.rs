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

/// A range of columns, a multiple of three, on machines with sixteen registers of eight lanes: the sums of four rows and three columns
/// take twelve, first of eight lanes and then of the other eight. Tiles of sixteen lanes would read more than they multiply.
#[inline(always)]
pub(super) unsafe fn by_halves<L: Lanes, W: Stored>(x: *const f32, w: *const W, y: *mut f32, shape: Shape) {
    let Shape { rows, inputs, outputs, columns: (begin, end) } = shape;
    let full = inputs / LANES * LANES;
    let mut sums = vec![[0.0f32; LANES]; HALVES_COLUMNS * HALVES_ROWS.min(rows)];
    let mut wide = Vec::<f32>::with_capacity(HALVES_COLUMNS * inputs);
    let mut column = begin;
    while column < end {
        let columns = HALVES_COLUMNS.min(end - column);
        let weights = wide.as_mut_ptr();
        unsafe {
            widen_to::<L, W>(w.wrapping_add(column.wrapping_mul(inputs)), columns * inputs, weights);
            let mut first = 0usize;
            while first < rows {
                let count = HALVES_ROWS.min(rows - first);
                let x = x.wrapping_add(first.wrapping_mul(inputs));
                sums[..count * columns].fill([0.0; LANES]);
                let mut at = 0usize;
                while at < inputs {
                    let len = if at < full { HALVES_INPUTS.min(full - at) } else { inputs - at };
                    add_products::<L>(
                        (x.wrapping_add(at), count),
                        (weights.wrapping_add(at), columns),
                        inputs,
                        len,
                        sums.as_mut_ptr(),
                    );
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

/// Adds the products of `len` inputs of some rows and columns, `stride` apart, to `sums`, which are `[rows, columns]`. If `len` is not a
/// multiple of [`LANES`] the rest is padded.
#[inline(always)]
unsafe fn add_products<L: Lanes>(
    (x, rows): (*const f32, usize),
    (w, columns): (*const f32, usize),
    stride: usize,
    len: usize,
    sums: *mut [f32; LANES],
) {
    let mut row = 0usize;
    unsafe {
        while row < rows {
            let x = x.wrapping_add(row.wrapping_mul(stride));
            let four = rows - row >= 4;
            let mut column = 0usize;
            while column < columns {
                let w = w.wrapping_add(column.wrapping_mul(stride));
                let sums = sums.wrapping_add(row.wrapping_mul(columns).wrapping_add(column));
                if four {
                    halves_tile::<L, 4>(x, w, stride, len, sums, columns);
                } else {
                    halves_tile::<L, 1>(x, w, stride, len, sums, columns);
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
    x: *const f32,
    w: *const f32,
    stride: usize,
    len: usize,
    sums: *mut [f32; LANES],
    columns: usize,
) {
    if len.is_multiple_of(LANES) {
        return unsafe { halves_of::<L, R>(x, w, stride, len, sums, columns) };
    }
    let (mut xs, mut ws) = ([[0.0; LANES]; R], [[0.0; LANES]; 3]);
    unsafe {
        for r in 0..R {
            xs[r] = padded(x.wrapping_add(r.wrapping_mul(stride)), len);
        }
        for c in 0..3 {
            ws[c] = padded(w.wrapping_add(c.wrapping_mul(stride)), len);
        }
        halves_of::<L, R>(xs.as_ptr().cast(), ws.as_ptr().cast(), LANES, LANES, sums, columns);
    }
}

#[inline(always)]
unsafe fn halves_of<L: Lanes, const R: usize>(
    x: *const f32,
    w: *const f32,
    stride: usize,
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
                    weights[c] = L::load_half(w.wrapping_add(c.wrapping_mul(stride)).wrapping_add(at));
                }
                for r in 0..R {
                    let values = L::load_half(x.wrapping_add(r.wrapping_mul(stride)).wrapping_add(at));
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
