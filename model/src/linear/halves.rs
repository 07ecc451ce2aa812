//! Products of many rows on machines with sixteen registers of eight lanes, such as those with AVX2: the same additions as in
//! [`super::kernel`], in an order of tiles that reads less than it multiplies.

#![expect(clippy::needless_range_loop, reason = "a tile is read best by the numbers of its rows and columns")]

use super::kernel::Shape;
use crate::lanes::{LANES, Lanes, Stored, padded};

/// Lanes of a register.
const HALF: usize = LANES / 2;
/// What is multiplied together stays in the first cache: one half of so many inputs of so many columns, and of a tile's rows.
const BLOCK_INPUTS: usize = 768;
const BLOCK_COLUMNS: usize = 12;
const TILE_ROWS: usize = 4;
const TILE_COLUMNS: usize = 3;
/// Sums of so many rows stay in the second cache.
const SUM_ROWS: usize = 64;
/// Rows that are packed at a time.
const PACKED_ROWS: usize = 128;

/// As long as a cache line, and lying as one.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([f32; LANES]);

/// Rows in the order in which a tile reads them: first the lower halves of all lanes and then the upper ones, and the same half of one row
/// after the other. As they come, rows whose length is a power of two fall on the same places and banks of a cache. Each is filled up
/// with zeros to whole lanes.
struct Panels {
    /// Room without values: what is read has been filled in before.
    first: *mut f32,
    _lines: Vec<Line>,
    /// Of a row, filled up.
    inputs: usize,
}

impl Panels {
    fn new(rows: usize, inputs: usize) -> Self {
        let inputs = inputs.next_multiple_of(LANES);
        let mut lines = Vec::<Line>::with_capacity(rows * inputs / LANES);
        Self { first: lines.as_mut_ptr().cast(), _lines: lines, inputs }
    }

    /// One half of the inputs from `at` on of the `count` rows of a tile from `row` on.
    #[inline(always)]
    fn block(&self, half: usize, (row, count): (usize, usize), at: usize) -> *mut f32 {
        let before = row.wrapping_mul(self.inputs);
        let halves = half.wrapping_mul(self.inputs).wrapping_add(at) / 2;
        self.first.wrapping_add(before.wrapping_add(halves.wrapping_mul(count)))
    }

    /// Takes `rows` rows of `inputs` values that lie behind each other, widened to f32; `group` of them will be in a tile, or one where there
    /// are fewer.
    #[inline(always)]
    unsafe fn fill<L: Lanes, W: Stored>(&mut self, from: *const W, rows: usize, group: usize, inputs: usize) {
        for (first, count) in groups(rows, group) {
            for r in 0..count {
                let from = from.wrapping_add((first.wrapping_add(r)).wrapping_mul(inputs));
                let [lower, upper] =
                    [0, 1].map(|half| self.block(half, (first, count), 0).wrapping_add(r.wrapping_mul(HALF)));
                unsafe { split::<L, W>(from, inputs, lower, upper, count.wrapping_mul(HALF)) };
            }
        }
    }
}

/// Widens `len` values and writes the lower and the upper halves of their lanes, `step` values apart.
#[inline(always)]
unsafe fn split<L: Lanes, W: Stored>(
    from: *const W,
    len: usize,
    mut lower: *mut f32,
    mut upper: *mut f32,
    step: usize,
) {
    let mut at = 0usize;
    while at < len {
        let (from, left) = (from.wrapping_add(at), len - at);
        let mut values = [0.0; LANES];
        unsafe {
            let wide = if left >= LANES { W::load::<L>(from) } else { W::load::<L>(padded(from, left).as_ptr()) };
            L::store(wide, values.as_mut_ptr());
            L::store_half(L::load_half(values.as_ptr()), lower);
            L::store_half(L::load_half(values.as_ptr().wrapping_add(HALF)), upper);
        }
        (lower, upper) = (lower.wrapping_add(step), upper.wrapping_add(step));
        at = at.wrapping_add(LANES);
    }
}

/// Where blocks of inputs begin and how long they are.
#[inline(always)]
fn blocks(inputs: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..inputs).step_by(BLOCK_INPUTS).map(move |at| (at, BLOCK_INPUTS.min(inputs - at)))
}

/// Rows that are read together: by `group`, and one by one where there are fewer.
#[inline(always)]
fn groups(rows: usize, group: usize) -> impl Iterator<Item = (usize, usize)> {
    let full = rows / group * group;
    (0..full).step_by(group).map(move |row| (row, group)).chain((full..rows).map(|row| (row, 1)))
}

/// A range of columns, a multiple of three, on machines with sixteen registers of eight lanes: the sums of four rows and three columns
/// take twelve, first of eight lanes and then of the other eight. Tiles of sixteen lanes would read more than they multiply.
#[inline(always)]
pub(super) unsafe fn by_halves<L: Lanes, W: Stored>(x: *const f32, w: *const W, y: *mut f32, shape: Shape) {
    let Shape { rows, inputs, outputs, columns: (begin, end) } = shape;
    let mut sums = vec![Line([0.0; LANES]); BLOCK_COLUMNS * SUM_ROWS.min(rows)];
    let mut values = Panels::new(PACKED_ROWS.min(rows), inputs);
    let mut weights = Panels::new(BLOCK_COLUMNS, inputs);
    for first in (0..rows).step_by(PACKED_ROWS) {
        let count = PACKED_ROWS.min(rows - first);
        unsafe { values.fill::<L, f32>(x.wrapping_add(first.wrapping_mul(inputs)), count, TILE_ROWS, inputs) };
        for column in (begin..end).step_by(BLOCK_COLUMNS) {
            let columns = BLOCK_COLUMNS.min(end - column);
            let y = y.wrapping_add(first.wrapping_mul(outputs).wrapping_add(column));
            unsafe {
                weights.fill::<L, W>(w.wrapping_add(column.wrapping_mul(inputs)), columns, TILE_COLUMNS, inputs);
                some_columns::<L>((&values, count), (&weights, columns), &mut sums, y, outputs);
            }
        }
    }
}

/// At most [`BLOCK_COLUMNS`] columns of all rows; the first of them is where `y` points.
#[inline(always)]
unsafe fn some_columns<L: Lanes>(
    (x, rows): (&Panels, usize),
    (w, columns): (&Panels, usize),
    sums: &mut [Line],
    y: *mut f32,
    outputs: usize,
) {
    for first in (0..rows).step_by(SUM_ROWS) {
        let count = SUM_ROWS.min(rows - first);
        sums[..count * columns].fill(Line([0.0; LANES]));
        for half in 0..2 {
            for (at, len) in blocks(x.inputs) {
                for (row, tile) in groups(count, TILE_ROWS) {
                    let x = x.block(half, (first.wrapping_add(row), tile), at);
                    for column in (0..columns).step_by(TILE_COLUMNS) {
                        let w = w.block(half, (column, TILE_COLUMNS), at);
                        let sums = sums.as_mut_ptr().wrapping_add(row.wrapping_mul(columns).wrapping_add(column));
                        let sums = sums.cast::<f32>().wrapping_add(half.wrapping_mul(HALF));
                        unsafe {
                            if tile == TILE_ROWS {
                                add_products::<L, TILE_ROWS>(x, w, len / LANES, sums, columns);
                            } else {
                                add_products::<L, 1>(x, w, len / LANES, sums, columns);
                            }
                        }
                    }
                }
            }
        }
        for row in 0..count {
            let y = y.wrapping_add((first.wrapping_add(row)).wrapping_mul(outputs));
            let (fours, rest) = sums[row * columns..][..columns].as_chunks::<4>();
            for (four, sums) in fours.iter().enumerate() {
                let y = y.wrapping_add(4 * four).cast::<[f32; 4]>();
                unsafe { y.write_unaligned(L::sum4(sums.map(|sum| L::load(sum.0.as_ptr())))) };
            }
            for (c, sum) in rest.iter().enumerate() {
                unsafe { y.wrapping_add(4 * fours.len() + c).write(L::sum(L::load(sum.0.as_ptr()))) };
            }
        }
    }
}

/// Adds the products of `R` rows and three columns to one half of their sums, of which rows are `columns` lines apart.
#[inline(always)]
unsafe fn add_products<L: Lanes, const R: usize>(
    mut x: *const f32,
    mut w: *const f32,
    halves: usize,
    sums: *mut f32,
    columns: usize,
) {
    let of = |r: usize, c: usize| sums.wrapping_add((r.wrapping_mul(columns).wrapping_add(c)).wrapping_mul(LANES));
    unsafe {
        let mut own = [[L::load_half(of(0, 0)); TILE_COLUMNS]; R];
        for r in 0..R {
            for c in 0..TILE_COLUMNS {
                own[r][c] = L::load_half(of(r, c));
            }
        }
        for _ in 0..halves {
            let mut weights = [own[0][0]; TILE_COLUMNS];
            for c in 0..TILE_COLUMNS {
                weights[c] = L::load_half(w.wrapping_add(c.wrapping_mul(HALF)));
            }
            for r in 0..R {
                let values = L::load_half(x.wrapping_add(r.wrapping_mul(HALF)));
                for c in 0..TILE_COLUMNS {
                    own[r][c] = L::mul_add_half(values, weights[c], own[r][c]);
                }
            }
            (x, w) = (x.wrapping_add(R * HALF), w.wrapping_add(TILE_COLUMNS * HALF));
        }
        for r in 0..R {
            for c in 0..TILE_COLUMNS {
                L::store_half(own[r][c], of(r, c));
            }
        }
    }
}
