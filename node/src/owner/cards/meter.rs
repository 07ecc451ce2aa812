//! What tells how cards are used, by all programs.

use std::fmt;

use hanse_model::OpenError;

/// A program that has something of a card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CardProcess {
    /// Its number, as the driver gives it: in a container that may be the host's.
    pub pid: u32,
    /// What it is called, where that is told.
    pub name: Option<String>,
    /// Bytes of the card's memory, where that is told.
    pub bytes: Option<u64>,
}

/// Tells how cards, named by their UUIDs, are used. Calls may block.
pub trait Meter: fmt::Debug + Send + Sync {
    /// Bytes of its memory that all programs have.
    ///
    /// # Errors
    /// The driver does not tell.
    fn used_bytes(&self, card: &[u8; 16]) -> Result<u64, MeterError>;

    /// The programs that have something of it; in a container some may be missing, or all.
    ///
    /// # Errors
    /// The driver does not tell.
    fn processes(&self, card: &[u8; 16]) -> Result<Vec<CardProcess>, MeterError>;

    /// The share of the last second in which each program computed on it, by number; `None` if the card cannot tell.
    ///
    /// # Errors
    /// The driver does not tell.
    fn busy(&self, card: &[u8; 16]) -> Result<Option<Vec<(u32, f64)>>, MeterError>;

    /// The share of time in which any program computed on it; `None` if the card cannot tell.
    ///
    /// # Errors
    /// The driver does not tell.
    fn busy_in_all(&self, card: &[u8; 16]) -> Result<Option<f64>, MeterError>;
}

/// Why it is not told how cards are used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeterError {
    /// There are no cards to ask about.
    #[error(transparent)]
    Cards(#[from] OpenError),
    /// The driver's library for it is missing, or does not start.
    #[error(
        "NVML, which tells what other programs do on a card, does not start: {0} (libnvidia-ml.so.1 comes with the driver)"
    )]
    NoNvml(String),
    /// Metal has nothing of the kind.
    #[error("Metal does not tell what other programs do with a GPU; --yield-above is for the processor")]
    Metal,
    /// A card that the driver shows is unknown to the library, or tells nothing.
    #[error("NVML tells nothing of a card: {0}")]
    Card(String),
    /// The thread that watches does not start.
    #[error("cards cannot be watched: {0}")]
    Thread(#[from] std::io::Error),
}

/// What this machine has to tell how its cards are used.
///
/// # Errors
/// [`MeterError::NoNvml`], [`MeterError::Metal`], or [`MeterError::Cards`] in a build without cards.
pub fn meter() -> Result<Box<dyn Meter>, MeterError> {
    if cfg!(all(feature = "metal", target_vendor = "apple")) {
        return Err(MeterError::Metal);
    }
    #[cfg(feature = "cuda")]
    return super::nvml::NvmlMeter::new().map(|meter| Box::new(meter) as Box<dyn Meter>);
    #[cfg(not(feature = "cuda"))]
    Err(OpenError::NotBuilt.into())
}
