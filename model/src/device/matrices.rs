//! A card that holds a trunk's matrices.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{CardReport, Device, DeviceError, HeldExpert, HeldJob, OpenError, Weights, run_held};
use crate::checkpoint::Swiglu;
use crate::device::DeviceChoice;
use crate::linear::Matrix;

/// A device that computes products with matrices by themselves, too.
pub(crate) trait MatrixDevice: Device {
    /// Takes a matrix in, as [`Device::hold`] an expert.
    fn hold_matrix(&self, matrix: &Matrix) -> Result<Weights, DeviceError>;

    /// Takes a SwiGLU in, which is then computed as an expert.
    fn hold_swiglu(&self, swiglu: &Swiglu) -> Result<Weights, DeviceError>;

    /// `x W^T` of up to four held matrices with as many inputs, as one piece of work. `x` is `[rows, inputs]`, a result `[rows, outputs]`.
    /// After an error no result may be used.
    fn multiply(&self, x: &[f32], held: &[&Weights], results: &mut [&mut [f32]]) -> Result<(), DeviceError>;
}

/// A card that trunks may lie on ([`Trunk::place`](crate::Trunk::place)). When it has failed once it is not asked again, by any of them.
#[derive(Debug, Clone)]
pub struct TrunkCard {
    device: Arc<dyn MatrixDevice>,
    has_failed: Arc<AtomicBool>,
}

impl TrunkCard {
    #[cfg(any(cards, test))]
    pub(crate) fn new(device: Arc<dyn MatrixDevice>) -> Self {
        Self { device, has_failed: Arc::default() }
    }

    /// As `--device` has it: `cuda:0`, `metal`.
    #[must_use]
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// Whether it has failed, since when all is computed by the processor.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed)
    }

    pub(crate) fn hold_matrix(&self, matrix: &Matrix) -> Result<Weights, DeviceError> {
        self.device.hold_matrix(matrix)
    }

    pub(crate) fn hold_swiglu(&self, swiglu: &Swiglu) -> Result<HeldExpert, DeviceError> {
        let Swiglu { gate_proj, up_proj, down_proj, .. } = swiglu;
        Ok(HeldExpert {
            weights: self.device.hold_swiglu(swiglu)?,
            device: Arc::clone(&self.device) as Arc<dyn Device>,
            bytes: [gate_proj, up_proj, down_proj].map(Matrix::bytes).iter().sum(),
            hidden_size: gate_proj.inputs(),
        })
    }

    /// See [`MatrixDevice::multiply`]. Whether it did: if not, somebody else has to.
    pub(crate) fn multiply(&self, x: &[f32], held: &[&Weights], results: &mut [&mut [f32]]) -> bool {
        !self.has_failed() && self.did(self.device.multiply(x, held, results))
    }

    /// A SwiGLU on rows `hidden`. Whether it did: if not, somebody else has to.
    pub(crate) fn run_swiglu(&self, expert: &HeldExpert, hidden: &[f32], output: &mut [f32]) -> bool {
        if self.has_failed() {
            return false;
        }
        let failed = run_held(&mut [HeldJob { expert, hidden, output }]).pop();
        self.did(failed.map_or(Ok(()), |(_, error)| Err(error)))
    }

    /// Has nothing be asked of it any more.
    pub(crate) fn give_up(&self) {
        self.has_failed.store(true, Ordering::Relaxed);
    }

    fn did(&self, done: Result<(), DeviceError>) -> bool {
        let Err(error) = done else { return true };
        // Once: the threads of a pass may find out side by side.
        if !self.has_failed.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "the trunk is computed on the processor from now on; no token is lost or changed");
        }
        false
    }
}

impl DeviceChoice {
    /// Whether a trunk may be there: on the processor, or on one card.
    #[must_use]
    pub fn is_for_a_trunk(&self) -> bool {
        !matches!(self, Self::Cuda(cards) if cards.len() != 1)
    }

    /// Opens the card for a trunk; `None` means the processor. `auto` takes the card with most free memory, if there is one that can be used.
    ///
    /// # Errors
    /// [`OpenError::SeveralCards`], or why the card that was named cannot be used.
    pub fn open_for_trunk(&self) -> Result<Option<TrunkCard>, OpenError> {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda(_) | Self::Metal => match self.card_numbers()[..] {
                [card] => self.check_system().and_then(|()| open_card(card)).map(Some),
                _ => Err(OpenError::SeveralCards),
            },
            Self::Auto => {
                let mut reports: Vec<_> = (0..).zip(super::choice::usable()).collect();
                let free = |report: &CardReport| report.memory.as_ref().map_or(0, |(free, _)| *free);
                reports.sort_by_key(|(_, report)| std::cmp::Reverse(free(report)));
                let opened = reports.into_iter().find_map(|(card, _)| {
                    let opened = open_card(card);
                    opened.inspect_err(|error| tracing::warn!(%error, "a card is left out")).ok()
                });
                Ok(opened)
            }
        }
    }
}

#[cfg(cards)]
fn open_card(card: u32) -> Result<TrunkCard, OpenError> {
    let opened = crate::cards::open(&[card])?.pop();
    opened.map(|card| TrunkCard::new(Arc::new(card))).ok_or(OpenError::NoSuchCard { card, cards: 0 })
}

#[cfg(not(cards))]
fn open_card(_card: u32) -> Result<TrunkCard, OpenError> {
    Err(OpenError::NotBuilt)
}
