//! Products of many rows on machines with sixteen registers of eight lanes, such as those with AVX2: the same additions as in
//! [`super::kernel`], in an order of tiles that reads less than it multiplies.
//!
//! A tile's sums are in registers: of twelve outputs, first the lower eight lanes and then the upper ones. So a tile reads seven vectors for twelve
//! multiplications, of which a core does two at a time, as it reads two.

#![expect(clippy::needless_range_loop, reason = "a tile is read best by the numbers of its rows and columns")]

use super::kernel::Shape;
use crate::lanes::{LANES, Lanes, Stored, padded};

/// From so many rows on.
pub(super) const FROM_ROWS: usize = 5;

/// Lanes of a register.
const HALF: usize = LANES / 2;
pub(super) const TILE_ROWS: usize = 4;
const TILE_COLUMNS: usize = 3;
/// What is multiplied together stays in the first cache: one half of so many inputs of so many columns, and of a tile's rows.
const NEAR_INPUTS: usize = 768;
const NEAR_COLUMNS: usize = 12;
/// Columns whose weights are put in order at a time: for all of them but the first [`NEAR_COLUMNS`], rows come from the second cache.
const COLUMNS: usize = 24;
/// Rows for which weights stay in order. They come from the third cache, from which a core reads as fast as it needs.
const ROWS: usize = 256;
/// Sums of so many rows, and what is multiplied meanwhile, stay in the second cache.
const SUM_ROWS: usize = 64;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Rows of a matrix, however they are stored.
pub(super) trait Source: Copy {
    type Value: Stored;
    /// The rows as they lie, if tiles can read eight values of them at a time.
    fn plain(self) -> Option<Plain<Self::Value>>;
    /// Where a row lies. Any number will do: nothing is read.
    fn place(self, row: usize) -> *const u8;
    /// Hands over the values of a row, widened, and filled up with zeros to whole lanes.
    ///
    /// # Safety
    /// The row is there and has so many inputs; there is room for them.
    unsafe fn split<L: Lanes>(self, row: usize, inputs: usize, to: Halves);
}

/// Rows that lie behind each other.
#[derive(Clone, Copy)]
pub(super) struct Plain<W> {
    pub(super) first: *const W,
    /// Values of a row.
    pub(super) inputs: usize,
}

impl<W> Plain<W> {
    #[inline(always)]
    fn row(self, row: usize) -> *const W {
        self.first.wrapping_add(row.wrapping_mul(self.inputs))
    }
}

impl<W: Stored> Source for Plain<W> {
    type Value = W;

    #[inline(always)]
    fn plain(self) -> Option<Self> {
        self.inputs.is_multiple_of(LANES).then_some(self)
    }

    #[inline(always)]
    fn place(self, row: usize) -> *const u8 {
        self.row(row).cast()
    }

    #[inline(always)]
    unsafe fn split<L: Lanes>(self, row: usize, inputs: usize, mut to: Halves) {
        let from = self.row(row);
        let full = inputs / LANES * LANES;
        unsafe {
            let mut at = 0usize;
            while at < full {
                to.put::<L>(W::load::<L>(from.wrapping_add(at)));
                at = at.wrapping_add(LANES);
            }
            if full < inputs {
                to.put::<L>(W::load::<L>(padded(from.wrapping_add(full), inputs - full).as_ptr()));
            }
        }
    }
}

/// Where the halves of a row's lanes go.
#[derive(Clone, Copy)]
pub(super) struct Halves {
    lower: *mut f32,
    upper: *mut f32,
    /// Values from one to the next.
    step: usize,
}

impl Halves {
    /// Writes the next sixteen values.
    #[inline(always)]
    pub(super) unsafe fn put<L: Lanes>(&mut self, values: L::V) {
        let [lower, upper] = unsafe { L::halves(values) };
        unsafe {
            L::store_half(lower, self.lower);
            L::store_half(upper, self.upper);
        }
        (self.lower, self.upper) = (self.lower.wrapping_add(self.step), self.upper.wrapping_add(self.step));
    }
}

/// As long as a cache line, and lying as one.
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "read by pointers")] [f32; LANES]);

/// Room for so many values, which have none before they are written.
fn room(values: usize) -> Vec<Line> {
    Vec::with_capacity(values.div_ceil(LANES))
}

/// Rows in the order in which tiles read them: `GROUP` of them together, first the lower halves of all lanes and then the upper ones, and the same
/// half of one row after the other. As they come, rows whose length is a power of two fall on the same places and banks of a cache. Each is filled
/// up with zeros to whole lanes.
pub(super) struct Panels<const GROUP: usize> {
    first: *mut f32,
    _lines: Vec<Line>,
    /// Of a row, filled up.
    inputs: usize,
}

impl<const GROUP: usize> Panels<GROUP> {
    /// Room for so many rows.
    pub(super) fn new(rows: usize, inputs: usize) -> Self {
        let inputs = inputs.next_multiple_of(LANES);
        let mut lines = room(rows.next_multiple_of(GROUP) * inputs);
        Self { first: lines.as_mut_ptr().cast(), _lines: lines, inputs }
    }

    /// One half of the inputs from `at` on of the group that begins with row `row`.
    #[inline(always)]
    fn block(&self, half: usize, row: usize, at: usize) -> *mut f32 {
        let halves = half.wrapping_mul(self.inputs).wrapping_add(at) / 2;
        let before = row.wrapping_mul(self.inputs).wrapping_add(halves.wrapping_mul(GROUP));
        self.first.wrapping_add(before)
    }

    /// Fills the groups from row `row` on with `rows` rows of `from`, whose first is number `first`. Where the last group has fewer, the last row
    /// stands for those that are missing.
    ///
    /// # Safety
    /// There is room for them, which nobody else uses meanwhile; `from` has the rows, of so many inputs as there is room for.
    #[inline(always)]
    pub(super) unsafe fn fill<L: Lanes, S: Source>(
        &self,
        row: usize,
        (from, first): (S, usize),
        rows: usize,
        inputs: usize,
    ) {
        for number in 0..rows.next_multiple_of(GROUP) {
            let (begin, r) = (row.wrapping_add(number / GROUP * GROUP), number % GROUP);
            let [lower, upper] = [0, 1].map(|half| self.block(half, begin, 0).wrapping_add(r.wrapping_mul(HALF)));
            let to = Halves { lower, upper, step: GROUP * HALF };
            unsafe { from.split::<L>(first.wrapping_add(number.min(rows - 1)), inputs, to) };
        }
    }
}

/// Computes `shape` as [`super::kernel::multiply`] does, in tiles of four rows and three columns.
///
/// # Safety
/// As there; `x` has the rows, and `w` the columns.
#[inline(always)]
pub(super) unsafe fn by_halves<L: Lanes, S: Source>(x: &Panels<TILE_ROWS>, w: S, y: *mut f32, shape: Shape) {
    let Shape { rows, inputs, outputs, columns: (begin, end) } = shape;
    let weights = Panels::new(COLUMNS.min(end - begin), inputs);
    let mut sums = room(2 * (SUM_ROWS * COLUMNS) * HALF);
    let sums = [0, SUM_ROWS * COLUMNS * HALF].map(|at| sums.as_mut_ptr().cast::<f32>().wrapping_add(at));
    let blocks = 2 * x.inputs.div_ceil(NEAR_INPUTS);
    for row in (0..rows).step_by(ROWS) {
        let count = ROWS.min(rows - row);
        for column in (begin..end).step_by(COLUMNS) {
            let columns = COLUMNS.min(end - column);
            if w.plain().is_none() {
                unsafe { weights.fill::<L, _>(0, (w, column), columns, inputs) };
            }
            let part = Part {
                x,
                weights: &weights,
                w: w.plain(),
                first: (row, column),
                size: (count, columns),
                sums,
                y: y.wrapping_add(row.wrapping_mul(outputs).wrapping_add(column)),
                outputs,
            };
            let [next, after] = [1, 2].map(|parts| w.place(column.wrapping_add(columns.wrapping_mul(parts))));
            let tiles = blocks * count.div_ceil(TILE_ROWS) * columns.div_ceil(TILE_COLUMNS);
            let share = after.addr().wrapping_sub(next.addr()).div_ceil(tiles);
            let mut ahead = Ahead { at: next, until: next, share };
            for first in (0..count).step_by(SUM_ROWS) {
                unsafe { part.rows::<L>(first, SUM_ROWS.min(count - first), &mut ahead) };
            }
        }
    }
}

/// Weights that are asked for while others are multiplied, as many bytes with each tile.
struct Ahead {
    at: *const u8,
    until: *const u8,
    share: usize,
}

impl Ahead {
    #[inline(always)]
    unsafe fn ask<L: Lanes>(&mut self) {
        self.until = self.until.wrapping_add(self.share);
        while self.at.addr() < self.until.addr() {
            unsafe { L::prefetch_near(self.at) };
            self.at = self.at.wrapping_add(LINE);
        }
    }
}

/// At most [`COLUMNS`] columns of at most [`ROWS`] rows.
#[derive(Clone, Copy)]
struct Part<'a, W> {
    x: &'a Panels<TILE_ROWS>,
    weights: &'a Panels<TILE_COLUMNS>,
    /// Where weights are that are not in order yet. Tiles of the first rows put them there, since a core can write while it multiplies.
    w: Option<Plain<W>>,
    /// The first row of `x` and column of `w`.
    first: (usize, usize),
    /// Rows and columns.
    size: (usize, usize),
    /// Of the lower and of the upper lanes, one tile after another.
    sums: [*mut f32; 2],
    /// Where the first output is.
    y: *mut f32,
    /// Distance between rows of `y`.
    outputs: usize,
}

impl<W: Stored> Part<'_, W> {
    /// At most [`SUM_ROWS`] rows from `first` on.
    #[inline(always)]
    unsafe fn rows<L: Lanes>(self, first: usize, rows: usize, ahead: &mut Ahead) {
        let inputs = self.x.inputs;
        let columns = self.size.1;
        for half in 0..2 {
            for at in (0..inputs).step_by(NEAR_INPUTS) {
                let len = NEAR_INPUTS.min(inputs - at);
                let (halves, begins, ends) = (len / LANES, at == 0, half == 1 && at + len == inputs);
                for begin in (0..columns).step_by(NEAR_COLUMNS) {
                    for row in (first..first + rows).step_by(TILE_ROWS) {
                        let x = self.x.block(half, self.first.0.wrapping_add(row), at);
                        let mut w = self.weights.block(half, begin, at);
                        let before = (row - first).wrapping_mul(COLUMNS).wrapping_add(begin.wrapping_mul(TILE_ROWS));
                        let mut tile = before.wrapping_mul(HALF);
                        for column in (begin..columns.min(begin + NEAR_COLUMNS)).step_by(TILE_COLUMNS) {
                            let sums = self.sums[half].wrapping_add(tile);
                            unsafe {
                                ahead.ask::<L>();
                                if let (Some(plain), 0) = (self.w, row) {
                                    // The last column stands for those that are missing.
                                    let from = [0, 1, 2].map(|c| {
                                        let column = column.wrapping_add(c).min(columns - 1);
                                        let value = at.wrapping_add(half.wrapping_mul(HALF));
                                        plain.row(self.first.1.wrapping_add(column)).wrapping_add(value)
                                    });
                                    let w = AsTheyLie { from, to: InOrder::<TILE_COLUMNS>(w) };
                                    add_products::<L>(x, w, halves, sums, begins);
                                } else {
                                    add_products::<L>(x, InOrder::<TILE_COLUMNS>(w), halves, sums, begins);
                                }
                                if ends {
                                    self.add_up::<L>(tile, (row, column));
                                }
                            }
                            w = w.wrapping_add(inputs.wrapping_mul(TILE_COLUMNS));
                            tile = tile.wrapping_add(TILE_ROWS * TILE_COLUMNS * HALF);
                        }
                    }
                }
            }
        }
    }

    /// Adds up the lanes of a tile.
    #[inline(always)]
    unsafe fn add_up<L: Lanes>(self, tile: usize, (row, column): (usize, usize)) {
        let [lower, upper] = self.sums.map(|sums| sums.wrapping_add(tile).cast_const());
        let mut outputs = [[0.0; TILE_ROWS]; TILE_COLUMNS];
        let y = self.y.wrapping_add(row.wrapping_mul(self.outputs).wrapping_add(column));
        unsafe {
            for c in 0..TILE_COLUMNS {
                let mut four = [L::splat(0.0); TILE_ROWS];
                for r in 0..TILE_ROWS {
                    let at = (r * TILE_COLUMNS + c) * HALF;
                    four[r] = L::join([L::load_half(lower.wrapping_add(at)), L::load_half(upper.wrapping_add(at))]);
                }
                outputs[c] = L::sum4(four);
            }
            let (rows, columns) = (TILE_ROWS.min(self.size.0 - row), TILE_COLUMNS.min(self.size.1 - column));
            if (rows, columns) == (TILE_ROWS, TILE_COLUMNS) {
                for r in 0..TILE_ROWS {
                    let y = y.wrapping_add(r.wrapping_mul(self.outputs));
                    y.cast::<[f32; TILE_COLUMNS]>().write_unaligned([outputs[0][r], outputs[1][r], outputs[2][r]]);
                }
            } else {
                for r in 0..rows {
                    for c in 0..columns {
                        y.wrapping_add(r.wrapping_mul(self.outputs).wrapping_add(c)).write(outputs[c][r]);
                    }
                }
            }
        }
    }
}

/// Where a tile reads one half of the lanes of its columns.
///
/// # Safety
/// As for [`Lanes`].
trait Operand {
    /// The present eight lanes of one column.
    unsafe fn half<L: Lanes>(&self, number: usize) -> L::Half;
    /// Goes on to the next lanes.
    fn advance(&mut self);
}

/// As [`Panels`] have them.
#[derive(Clone, Copy)]
struct InOrder<const GROUP: usize>(*mut f32);

impl<const GROUP: usize> Operand for InOrder<GROUP> {
    #[inline(always)]
    unsafe fn half<L: Lanes>(&self, number: usize) -> L::Half {
        unsafe { L::load_half(self.0.wrapping_add(number.wrapping_mul(HALF))) }
    }

    #[inline(always)]
    fn advance(&mut self) {
        self.0 = self.0.wrapping_add(GROUP * HALF);
    }
}

/// As they lie in memory. Puts in order what it reads.
struct AsTheyLie<W, const GROUP: usize> {
    from: [*const W; GROUP],
    to: InOrder<GROUP>,
}

impl<W: Stored, const GROUP: usize> Operand for AsTheyLie<W, GROUP> {
    #[inline(always)]
    unsafe fn half<L: Lanes>(&self, number: usize) -> L::Half {
        unsafe {
            let values = W::load_half::<L>(self.from[number]);
            L::store_half(values, self.to.0.wrapping_add(number.wrapping_mul(HALF)));
            values
        }
    }

    #[inline(always)]
    fn advance(&mut self) {
        self.from = self.from.map(|from| from.wrapping_add(LANES));
        self.to.advance();
    }
}

/// Adds the products of the next so many halves of a tile's rows and columns to sums, which begin with zeros or with what they are.
#[inline(always)]
unsafe fn add_products<L: Lanes>(mut x: *const f32, mut w: impl Operand, halves: usize, sums: *mut f32, begins: bool) {
    let of = |r: usize, c: usize| sums.wrapping_add((r * TILE_COLUMNS + c) * HALF);
    unsafe {
        let mut own = [[L::halves(L::splat(0.0))[0]; TILE_COLUMNS]; TILE_ROWS];
        if !begins {
            for r in 0..TILE_ROWS {
                for c in 0..TILE_COLUMNS {
                    own[r][c] = L::load_half(of(r, c));
                }
            }
        }
        for _ in 0..halves {
            let mut weights = [own[0][0]; TILE_COLUMNS];
            for c in 0..TILE_COLUMNS {
                weights[c] = w.half::<L>(c);
            }
            for r in 0..TILE_ROWS {
                let values = L::load_half(x.wrapping_add(r * HALF));
                for c in 0..TILE_COLUMNS {
                    own[r][c] = L::mul_add_half(values, weights[c], own[r][c]);
                }
            }
            x = x.wrapping_add(TILE_ROWS * HALF);
            w.advance();
        }
        for r in 0..TILE_ROWS {
            for c in 0..TILE_COLUMNS {
                L::store_half(own[r][c], of(r, c));
            }
        }
    }
}
