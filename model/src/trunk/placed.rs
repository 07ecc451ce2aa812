//! A trunk's matrices: in the checkpoint's mapping, and besides on a card that was given and has room.
//!
//! Whoever multiplies cannot tell the difference, for a card gives the same bits. A card that fails is not asked again; the processor computes
//! what it was asked for, and everything after that.

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::OnceLock;

use rayon::ThreadPool;

use crate::checkpoint::Swiglu;
use crate::device::{DeviceError, HeldExpert, TrunkCard, Weights};
use crate::expert::{SwigluJob, run_swiglus};
use crate::linear::{self, Matrix};

/// What lies on which card.
struct OnCard<T> {
    card: TrunkCard,
    held: T,
}

impl<T> fmt::Debug for OnCard<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OnCard").field(&self.card.name()).finish()
    }
}

/// A matrix that may lie on a card as well.
#[derive(Debug)]
pub(super) struct TrunkMatrix {
    matrix: Matrix,
    on_card: OnceLock<OnCard<Weights>>,
}

impl From<Matrix> for TrunkMatrix {
    fn from(matrix: Matrix) -> Self {
        Self { matrix, on_card: OnceLock::new() }
    }
}

impl TrunkMatrix {
    /// In the mapping.
    pub(super) fn here(&self) -> &Matrix {
        &self.matrix
    }
}

/// A SwiGLU that may lie on a card as well.
#[derive(Debug)]
pub(super) struct TrunkSwiglu {
    swiglu: Swiglu,
    on_card: OnceLock<OnCard<HeldExpert>>,
}

impl From<Swiglu> for TrunkSwiglu {
    fn from(swiglu: Swiglu) -> Self {
        Self { swiglu, on_card: OnceLock::new() }
    }
}

impl TrunkSwiglu {
    /// `x` is `[rows, hidden]`, and so is the result.
    pub(super) fn forward(&self, x: &[f32], pool: &ThreadPool) -> Vec<f32> {
        let mut output = vec![0.0; x.len()];
        let done = self.on_card.get().is_some_and(|OnCard { card, held }| card.run_swiglu(held, x, &mut output));
        if !done {
            run_swiglus(&mut [SwigluJob { swiglu: &self.swiglu, hidden: x, output: &mut output }], pool);
        }
        output
    }
}

/// `y = x W^T` for several matrices of the same input, as one piece of work where all lie on a card or none does. `x` is `[rows, inputs]`;
/// each result is `[rows, outputs]`.
pub(super) fn linears<const N: usize>(x: &[f32], matrices: [&TrunkMatrix; N], pool: &ThreadPool) -> [Vec<f32>; N] {
    if matrices.iter().all(|matrix| matrix.on_card.get().is_none()) {
        return linear::linears(x, matrices.map(TrunkMatrix::here), pool);
    }
    let rows = x.len() / matrices[0].matrix.inputs();
    let mut results = matrices.map(|matrix| vec![0.0; rows * matrix.matrix.outputs()]);
    let on_card =
        matrices.iter().zip(&mut results).filter_map(|(matrix, result)| Some((matrix.on_card.get()?, result)));
    let (held, mut to): (Vec<&OnCard<Weights>>, Vec<&mut [f32]>) =
        on_card.map(|(on_card, result)| (on_card, result.as_mut_slice())).unzip();
    let weights: Vec<&Weights> = held.iter().map(|on_card| &on_card.held).collect();
    // A trunk lies on one card.
    let done = held.first().is_some_and(|on_card| on_card.card.multiply(x, &weights, &mut to));
    if !done {
        return linear::linears(x, matrices.map(TrunkMatrix::here), pool);
    }
    for (matrix, result) in matrices.iter().zip(&mut results) {
        if matrix.on_card.get().is_none() {
            *result = linear::linear(x, &matrix.matrix, pool);
        }
    }
    results
}

/// `y = x W^T`; see [`linears`].
pub(super) fn linear(x: &[f32], matrix: &TrunkMatrix, pool: &ThreadPool) -> Vec<f32> {
    let [y] = linears(x, [matrix], pool);
    y
}

/// How much of a trunk lies on a card. Bytes are those of the weights as stored, without embeddings that are only looked up, vectors, and
/// what is never put on a card.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Placement {
    /// The card's name.
    pub device: String,
    /// On the card.
    pub bytes: u64,
    /// For which the card has no room.
    pub no_room_bytes: u64,
}

/// Puts a trunk on a card, matrix by matrix.
pub(super) struct Placing<'a> {
    card: &'a TrunkCard,
    placement: Placement,
}

impl<'a> Placing<'a> {
    pub(super) fn new(card: &'a TrunkCard) -> Self {
        let device = card.name().to_owned();
        Self { card, placement: Placement { device, bytes: 0, no_room_bytes: 0 } }
    }

    pub(super) fn matrix(&mut self, matrix: &TrunkMatrix) -> Result<(), DeviceError> {
        let bytes = matrix.matrix.bytes();
        self.place(&matrix.on_card, bytes, |card| card.hold_matrix(&matrix.matrix))
    }

    pub(super) fn swiglu(&mut self, swiglu: &TrunkSwiglu) -> Result<(), DeviceError> {
        let Swiglu { gate_proj, up_proj, down_proj, .. } = &swiglu.swiglu;
        let bytes = [gate_proj, up_proj, down_proj].map(Matrix::bytes).iter().sum();
        self.place(&swiglu.on_card, bytes, |card| card.hold_swiglu(&swiglu.swiglu))
    }

    fn place<T>(
        &mut self,
        place: &OnceLock<OnCard<T>>,
        bytes: u64,
        hold: impl FnOnce(&TrunkCard) -> Result<T, DeviceError>,
    ) -> Result<(), DeviceError> {
        if place.get().is_some() {
            self.placement.bytes += bytes;
            return Ok(());
        }
        match hold(self.card) {
            Ok(held) => {
                self.placement.bytes += bytes;
                // If another thread was faster, what it placed stays.
                let _ = place.set(OnCard { card: self.card.clone(), held });
            }
            Err(DeviceError::NoRoom { .. }) => self.placement.no_room_bytes += bytes,
            Err(error @ DeviceError::Failed { .. }) => {
                self.card.give_up();
                return Err(error);
            }
        }
        Ok(())
    }

    pub(super) fn end(self) -> Placement {
        let Placement { device, bytes, no_room_bytes } = &self.placement;
        tracing::info!(device, bytes, "the trunk lies on a card");
        if *no_room_bytes > 0 {
            tracing::warn!(device, bytes = no_room_bytes, "not all of the trunk fits: the processor computes the rest");
        }
        self.placement
    }
}
