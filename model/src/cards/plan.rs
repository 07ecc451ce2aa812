//! What a pass asks of a card: its rows in pieces, and each piece in few launches. Pure.
//!
//! A piece has the rows of several experts. While one piece is computed, the next is copied. The experts of a piece are divided into
//! classes, by dtype and by whether they have few rows or many; a class takes two launches.

use std::ops::Range;

use super::dtype::Dtype;
use super::panels::{CHUNK, GATES, Layout, PANEL};
use crate::spec::Activation;

/// Rows of a piece at most.
pub(super) const PIECE_ROWS: usize = 256;
/// Rows up to which an expert counts as one with few: what a warp of the kernels for few computes at a time.
pub(super) const FEW: usize = 2;

/// The rows of one expert, as the kernels read it. `Group` in their sources is the same.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Group {
    /// Addresses of its panels.
    pub(super) gate_up: u64,
    pub(super) down: u64,
    /// Address of its biases; 0 if it has none.
    pub(super) biases: u64,
    /// Where its first row begins, in floats.
    pub(super) x: u64,
    pub(super) inner: u64,
    pub(super) y: u64,
    pub(super) rows: u32,
    pub(super) hidden_size: u32,
    pub(super) inner_size: u32,
    /// Blocks of the groups before it, in either launch.
    pub(super) blocks_before_up: u32,
    pub(super) blocks_before_down: u32,
    /// Two to this power: tiles of rows that a block computes side by side.
    pub(super) side: u32,
    /// Of its activation; the limit is no number where there is none.
    pub(super) limit: f32,
    pub(super) alpha: f32,
}

/// One job as the plan sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) layout: Layout,
    pub(super) activation: Activation,
    /// The address of its weights.
    pub(super) weights: u64,
    pub(super) rows: usize,
}

/// Rows of a job in a piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) job: usize,
    pub(super) rows: Range<usize>,
    /// Where they begin in the piece's input and output, in floats.
    pub(super) x: usize,
    pub(super) y: usize,
}

/// What can be launched together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Class {
    pub(super) many: bool,
    pub(super) up: Dtype,
    pub(super) down: Dtype,
}

impl Class {
    /// Rows that a warp computes at a time.
    pub(super) fn tile(self) -> usize {
        tile(self.many)
    }

    /// Warps of a block.
    fn warps(self) -> usize {
        if self.many { 8 } else { 2 }
    }

    /// Threads of a block.
    pub(super) fn threads(self) -> u32 {
        self.warps() as u32 * 32
    }
}

fn tile(many: bool) -> usize {
    if many { 8 } else { FEW }
}

/// The name of a kernel.
pub(super) fn kernel_name(many: bool, dtype: Dtype) -> String {
    format!("expert_{}_{}", dtype.name(), tile(many))
}

/// Two launches: gate and up, then down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Launch {
    pub(super) class: Class,
    /// Of the piece's groups.
    pub(super) groups: Range<usize>,
    pub(super) up_blocks: u32,
    pub(super) down_blocks: u32,
}

/// What is copied, computed and copied back at a time.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Piece {
    pub(super) parts: Vec<Part>,
    pub(super) groups: Vec<Group>,
    pub(super) launches: Vec<Launch>,
    /// Floats of the input, of what lies between, and of the output.
    pub(super) x: usize,
    pub(super) inner: usize,
    pub(super) y: usize,
}

/// Divides jobs into pieces. An expert is cut only where it has more rows than a piece may have.
pub(super) fn plan(jobs: &[Wanted]) -> Vec<Piece> {
    let mut pieces: Vec<Vec<(usize, Range<usize>)>> = Vec::new();
    let mut room = 0;
    for (job, wanted) in jobs.iter().enumerate() {
        let mut first = 0;
        while first < wanted.rows {
            let rows = (wanted.rows - first).min(PIECE_ROWS);
            if rows > room {
                pieces.push(Vec::new());
                room = PIECE_ROWS;
            }
            if let Some(piece) = pieces.last_mut() {
                piece.push((job, first..first + rows));
            }
            room -= rows;
            first += rows;
        }
    }
    pieces.into_iter().map(|parts| piece(jobs, parts)).collect()
}

fn piece(jobs: &[Wanted], parts: Vec<(usize, Range<usize>)>) -> Piece {
    let mut piece = Piece::default();
    let mut classed = Vec::with_capacity(parts.len());
    for (job, rows) in parts {
        let Wanted { layout, activation, weights, .. } = jobs[job];
        let count = rows.len();
        let class = Class { many: count > FEW, up: layout.up_dtype, down: layout.down_dtype };
        let (limit, alpha) = match activation {
            Activation::Swiglu => (f32::NAN, 1.0),
            Activation::ClampedSwiglu { limit, alpha } => (limit, alpha),
        };
        let group = Group {
            gate_up: weights,
            down: weights + layout.down_at() as u64,
            biases: layout.biases_at().map_or(0, |at| weights + at as u64),
            x: piece.x as u64,
            inner: piece.inner as u64,
            y: piece.y as u64,
            rows: count as u32,
            hidden_size: layout.hidden_size as u32,
            inner_size: layout.inner_size as u32,
            blocks_before_up: 0,
            blocks_before_down: 0,
            side: 0,
            limit,
            alpha,
        };
        classed.push((class, group));
        piece.parts.push(Part { job, rows, x: piece.x, y: piece.y });
        piece.x += count * layout.x_size();
        piece.inner += count * layout.inner_size;
        piece.y += count * layout.hidden_size;
    }
    classed.sort_by_key(|(class, _)| *class);
    for (class, group) in classed {
        piece.add(class, group);
    }
    piece
}

impl Piece {
    /// Adds a group, to the last launch if that is of its class.
    pub(super) fn add(&mut self, class: Class, group: Group) {
        let number = self.groups.len();
        if self.launches.last().is_none_or(|launch| launch.class != class) {
            self.launches.push(Launch { class, groups: number..number, up_blocks: 0, down_blocks: 0 });
        }
        if let Some(launch) = self.launches.last_mut() {
            self.groups.push(place(group, launch));
            launch.groups.end = number + 1;
        }
    }
}

/// Adds a group's blocks to a launch.
fn place(group: Group, launch: &mut Launch) -> Group {
    let class = launch.class;
    let tiles = (group.rows as usize).div_ceil(class.tile());
    // At most half of the warps side by side in rows: tiles of both kinds are read by several warps.
    let side = tiles.next_power_of_two().min((class.warps() / 2).max(1));
    let blocks = |panels: usize| (tiles.div_ceil(side) * panels.div_ceil(class.warps() / side)) as u32;
    let placed = Group {
        blocks_before_up: launch.up_blocks,
        blocks_before_down: launch.down_blocks,
        side: side.trailing_zeros(),
        ..group
    };
    launch.up_blocks += blocks(group.inner_size as usize / GATES);
    launch.down_blocks += blocks((group.hidden_size as usize).div_ceil(PANEL));
    placed
}

/// Floats that a piece of such experts takes at most: input, between, output.
pub(super) fn room(hidden_size: usize, inner_size: usize) -> (usize, usize, usize) {
    let padded = |size: usize| PIECE_ROWS * size.next_multiple_of(CHUNK);
    (padded(hidden_size), padded(inner_size), PIECE_ROWS * hidden_size)
}

const _: () = assert!(size_of::<Group>() == 80 && GATES * 2 == PANEL && CHUNK == PANEL);
