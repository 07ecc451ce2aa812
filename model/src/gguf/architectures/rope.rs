//! How a file says that rope is scaled, as `rope_scaling` of a `config.json`.

use serde_json::{Value, json};

use super::Keys;
use crate::gguf::error::GgufError;

/// What llama.cpp's converter takes for Llama 3's rope where the file has no more than the factors.
const LLAMA3: (f64, f64, u64) = (1.0, 4.0, 8192);

/// Reads it for heads of which `rotated` values rotate; `None` if rope is plain.
pub(super) fn scaling(keys: &Keys<'_, '_>, rotated: u64) -> Result<Option<Value>, GgufError> {
    let kind = keys.gguf.metadata.text(&keys.name("rope.scaling.type"))?;
    let factor = keys.float("rope.scaling.factor")?;
    let original = keys.whole("rope.scaling.original_context_length")?;
    let missing = |key: &str| GgufError::MissingKey { key: keys.name(key) };
    let of_file = match kind {
        None | Some("none") => None,
        Some("linear") => {
            let factor = factor.ok_or_else(|| missing("rope.scaling.factor"))?;
            Some(json!({ "rope_type": "linear", "factor": factor }))
        }
        Some("yarn") => {
            let mut scaling = json!({
                "rope_type": "yarn",
                "factor": factor.ok_or_else(|| missing("rope.scaling.factor"))?,
                "original_max_position_embeddings":
                    original.ok_or_else(|| missing("rope.scaling.original_context_length"))?,
            });
            for (key, name) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                if let Some(value) = keys.float(&format!("rope.scaling.{key}"))? {
                    scaling[name] = value.into();
                }
            }
            Some(scaling)
        }
        Some(_) => return Err(keys.invalid("rope.scaling.type", "known are none, linear and yarn")),
    };
    let Some(factors) = keys.gguf.tensors.get("rope_freqs.weight") else { return Ok(of_file) };
    let unknown =
        |reason: &str| GgufError::Tensor { tensor: "rope_freqs.weight".to_owned(), reason: reason.to_owned() };
    if of_file.is_some() {
        return Err(unknown("the file scales its frequencies twice"));
    }
    let factors = factors.kind.widen(factors.data)?;
    let theta = keys.float("rope.freq_base")?.unwrap_or(10_000.0);
    llama3(&factors, theta, rotated).map(Some).ok_or_else(|| unknown("it holds no factors of Llama 3's kind"))
}

/// Llama 3's scaling, if `factors` divide the frequencies as it does.
fn llama3(factors: &[f32], theta: f64, rotated: u64) -> Option<Value> {
    let (low, high, original) = LLAMA3;
    let factor = f64::from(factors.iter().copied().fold(0.0, f32::max));
    let expected = |pair: usize| {
        let frequency = theta.powf(-(2.0 * pair as f64) / rotated as f64);
        let waves = original as f64 * frequency / std::f64::consts::TAU;
        if waves > high {
            1.0
        } else if waves < low {
            factor
        } else {
            let smooth = (waves - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    // The writer computes them in f32.
    let close = |(pair, found): (usize, &f32)| (f64::from(*found) / expected(pair) - 1.0).abs() < 1e-4;
    let fits = factors.len() as u64 * 2 == rotated && factor > 1.0 && factors.iter().enumerate().all(close);
    fits.then(|| {
        json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_of_llama_3_are_known_and_others_are_not() {
        // Llama 3.2's, as the converter computes them: the first pairs keep their frequency, the last are slowed 32 times.
        let factors: Vec<f32> = (0..32)
            .map(|pair| {
                let wavelength = std::f32::consts::TAU * 500_000f32.powf(2.0 * pair as f32 / 64.0);
                if wavelength < 2048.0 {
                    1.0
                } else if wavelength > 8192.0 {
                    32.0
                } else {
                    let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                    1.0 / ((1.0 - smooth) / 32.0 + smooth)
                }
            })
            .collect();
        assert_eq!(llama3(&factors, 500_000.0, 64).unwrap()["factor"], 32.0);
        assert_eq!(llama3(&factors, 10_000.0, 64), None);
        assert_eq!(llama3(&factors[1..], 500_000.0, 64), None);
        let mut other = factors;
        other[3] = 1.01;
        assert_eq!(llama3(&other, 500_000.0, 64), None);
    }
}
