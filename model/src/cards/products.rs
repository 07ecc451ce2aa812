//! A card as what holds a trunk's matrices.

use super::card::{Card, Rows, UPLOAD_BYTES, copy_padded};
use super::driver::Memory;
use super::panels;
use super::plain::{Plain, TOGETHER, plan};
use super::plan::Piece;
use crate::checkpoint::Swiglu;
use crate::device::{Device, DeviceError, MatrixDevice, Weights, not_held};
use crate::linear::Matrix;

/// A matrix in a card's memory.
struct OnCard {
    plain: Plain,
    memory: Memory,
}

/// The rows of a product, and its results by matrix.
struct ProductRows<'a> {
    x: &'a [f32],
    inputs: usize,
    /// With the outputs of a row.
    results: Vec<(usize, &'a mut [f32])>,
}

impl Rows for ProductRows<'_> {
    const HALVES: bool = false;

    fn fill(&self, piece: &Piece, x: &mut [f32]) {
        // All parts have the same rows.
        if let Some(part) = piece.parts.first() {
            copy_padded(&self.x[part.rows.start * self.inputs..part.rows.end * self.inputs], self.inputs, x);
        }
    }

    fn take(&mut self, piece: &Piece, y: &[f32]) {
        for part in &piece.parts {
            let (width, result) = &mut self.results[part.job];
            let values = part.rows.len() * *width;
            result[part.rows.start * *width..][..values].copy_from_slice(&y[part.y..part.y + values]);
        }
    }
}

impl MatrixDevice for Card {
    fn hold_matrix(&self, matrix: &Matrix) -> Result<Weights, DeviceError> {
        let plain = Plain::of(matrix);
        self.make_room(plain.room())?;
        let write = |piece: &panels::Piece, to: &mut [u8]| plain.write(matrix, piece, to);
        let memory = self.take_in(plain.bytes(), &plain.pieces(UPLOAD_BYTES), write)?;
        Ok(Box::new(OnCard { plain, memory }))
    }

    fn hold_swiglu(&self, swiglu: &Swiglu) -> Result<Weights, DeviceError> {
        self.take_in_swiglu(swiglu)
    }

    fn multiply(&self, x: &[f32], held: &[&Weights], results: &mut [&mut [f32]]) -> Result<(), DeviceError> {
        let on_card = |weights: &&Weights| {
            let OnCard { plain, memory } = weights.downcast_ref().filter(|held: &&OnCard| self.has(&held.memory))?;
            Some((*plain, memory.address()))
        };
        let matrices: Option<Vec<(Plain, u64)>> = held.iter().map(on_card).collect();
        let matrices = matrices.ok_or_else(|| not_held(self.name()))?;
        let Some(inputs) = matrices.first().map(|(plain, _)| plain.inputs) else { return Ok(()) };
        let rows = x.len() / inputs;
        assert!(matrices.len() <= TOGETHER && matrices.len() == results.len(), "a result for each matrix");
        assert!(x.len() == rows * inputs && matrices.iter().all(|(plain, _)| plain.inputs == inputs), "whole rows");
        let results = results.iter_mut().zip(&matrices).map(|(result, (plain, _))| {
            assert_eq!(result.len(), rows * plain.outputs, "a result of whole rows");
            (plain.outputs, &mut **result)
        });
        let mut rows_of = ProductRows { x, inputs, results: results.collect() };
        // Each matrix made room when it was taken in, and room never shrinks.
        // SAFETY: the pieces name weights that are borrowed.
        unsafe { self.compute(|room| plan(&matrices, rows, room), &mut rows_of) }
    }
}
