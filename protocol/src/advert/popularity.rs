//! How wanted an expert is, in sixteen steps.

use super::AdvertError;

/// The highest step.
pub const MAX_POPULARITY: u8 = 15;

/// The step of an expert that computes so many rows a minute: 0 for less than one, and one more for each doubling up to
/// [`MAX_POPULARITY`].
#[must_use]
pub fn popularity(rows_per_minute: f64) -> u8 {
    if rows_per_minute < 1.0 || rows_per_minute.is_nan() {
        return 0;
    }
    let steps = 1.0 + rows_per_minute.log2().floor();
    if steps >= f64::from(MAX_POPULARITY) { MAX_POPULARITY } else { steps as u8 }
}

/// Rows a minute in the middle of a step: 0 for step 0, otherwise 1.5 times the step's lower end.
#[must_use]
pub fn rows_per_minute(popularity: u8) -> f64 {
    match popularity {
        0 => 0.0,
        step => 1.5 * f64::from(step.min(MAX_POPULARITY) - 1).exp2(),
    }
}

/// Two steps in a byte, the first in the lower half; the upper half of an odd last byte is 0.
pub(super) fn pack(steps: &[u8]) -> Vec<u8> {
    steps.chunks(2).map(|pair| pair[0] | pair.get(1).copied().unwrap_or(0) << 4).collect()
}

/// `count` steps out of `packed`.
pub(super) fn unpack(packed: &[u8], count: usize) -> Result<Vec<u8>, AdvertError> {
    let mut steps: Vec<u8> = packed.iter().flat_map(|byte| [byte & 15, byte >> 4]).collect();
    if steps.len() > count && steps.pop() != Some(0) {
        return Err(AdvertError::OutOfRange("list of popularities"));
    }
    Ok(steps)
}
