//! Matrices by themselves: how they lie in a card's memory, and what a product of several with the same rows asks of the card. Pure.
//!
//! A matrix lies as an expert's down_proj does, and is computed by the kernels for down.

use super::columns;
use super::dtype::Dtype;
use super::panels::{CHUNK, OCTET, PANEL, Piece as Bytes, panel_bytes};
use super::plan::{Class, FEW, Group, PIECE_ROWS, Part, Piece};
use crate::linear::Matrix;

/// Matrices of one product at most.
pub(super) const TOGETHER: usize = 4;
/// Floats of output that a piece has room for, unless a row of it needs more: 16 MiB.
const OUTPUT: usize = 4 << 20;

/// A matrix `[outputs, inputs]` as a card holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plain {
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    dtype: Dtype,
}

impl Plain {
    pub(super) fn of(matrix: &Matrix) -> Self {
        Self { outputs: matrix.outputs(), inputs: matrix.inputs(), dtype: matrix.dtype().into() }
    }

    fn panel_bytes(&self) -> usize {
        panel_bytes(self.inputs, self.dtype)
    }

    fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    /// Bytes in all.
    pub(super) fn bytes(&self) -> usize {
        self.panels() * self.panel_bytes()
    }

    /// Floats of input, of nothing between, and of output that products with it need.
    pub(super) fn room(&self) -> (usize, usize, usize) {
        let row = TOGETHER * self.outputs;
        (PIECE_ROWS * self.inputs.next_multiple_of(CHUNK), 0, (PIECE_ROWS * row).min(OUTPUT).max(row))
    }

    /// Ranges of whole panels, of at most `most` bytes unless a panel has more.
    pub(super) fn pieces(&self, most: usize) -> Vec<Bytes> {
        let (panels, bytes) = (self.panels(), self.panel_bytes());
        let step = (most / bytes.max(1)).max(1);
        let piece = |first: usize| {
            let parts = first..panels.min(first + step);
            Bytes { at: first * bytes, bytes: parts.len() * bytes, parts }
        };
        (0..panels).step_by(step).map(piece).collect()
    }

    /// Writes a piece of `matrix` to `to`, which is as long as it.
    pub(super) fn write(&self, matrix: &Matrix, piece: &Bytes, to: &mut [u8]) {
        for (panel, to) in piece.parts.clone().zip(to.chunks_exact_mut(self.panel_bytes())) {
            to.fill(0);
            let first = panel * PANEL;
            for row in first..self.outputs.min(first + PANEL) {
                columns::write(matrix, row, self.dtype, row - first, self.inputs.div_ceil(OCTET), to);
            }
        }
    }
}

/// Divides the product of `rows` rows with several matrices, each with the address of its weights, into pieces for which there is
/// `room`. The matrices have the same inputs. A part's job is the number of its matrix.
pub(super) fn plan(matrices: &[(Plain, u64)], rows: usize, room: (usize, usize, usize)) -> Vec<Piece> {
    let outputs: usize = matrices.iter().map(|(plain, _)| plain.outputs).sum();
    let inputs = matrices.first().map_or(0, |(plain, _)| plain.inputs.next_multiple_of(CHUNK));
    let most = PIECE_ROWS.min(room.2 / outputs.max(1)).min(room.0 / inputs.max(1)).max(1);
    let pieces = (0..rows).step_by(most).map(|first| piece(matrices, first..rows.min(first + most)));
    pieces.collect()
}

fn piece(matrices: &[(Plain, u64)], rows: std::ops::Range<usize>) -> Piece {
    let mut piece = Piece::default();
    let mut classed = Vec::with_capacity(matrices.len());
    for (job, (plain, weights)) in matrices.iter().enumerate() {
        let padded = plain.inputs.next_multiple_of(CHUNK);
        let group = Group {
            gate_up: 0,
            down: *weights,
            biases: 0,
            x: 0,
            // Where down finds its rows: all matrices have the same.
            inner: 0,
            y: piece.y as u64,
            rows: rows.len() as u32,
            hidden_size: plain.outputs as u32,
            inner_size: padded as u32,
            blocks_before_up: 0,
            blocks_before_down: 0,
            side: 0,
            limit: f32::NAN,
            alpha: 1.0,
        };
        classed.push((Class { many: rows.len() > FEW, up: plain.dtype, down: plain.dtype }, group));
        piece.parts.push(Part { job, rows: rows.clone(), x: 0, y: piece.y });
        piece.x = rows.len() * padded;
        piece.y += rows.len() * plain.outputs;
    }
    classed.sort_by_key(|(class, _)| *class);
    for (class, group) in classed {
        piece.add(class, group);
    }
    piece
}
