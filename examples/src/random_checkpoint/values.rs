//! Where the weights come from: one stream of random numbers for each tensor, so that the order of writing is free.

use half::{bf16, f16};
use safetensors::Dtype;

/// What a tensor is filled with.
#[derive(Debug)]
pub(super) enum Fill {
    /// Ones, for norms.
    Ones,
    /// Bell-shaped around 0 with this standard deviation.
    Random(f32),
}

impl Fill {
    /// Keeps the size of activations as it is from layer to layer: `1/sqrt(fan_in)`, the fan-in being the last dimension.
    pub(super) fn of(name: &str, shape: &[usize], tied: bool) -> Self {
        match shape {
            [_] if name.ends_with("norm.weight") => Self::Ones,
            // Biases: small beside the values they are added to.
            [_] => Self::Random(0.02),
            // A look-up has a fan-in of 1, but as an LM head the same matrix has that of the hidden size.
            _ if name.ends_with("embed_tokens.weight") && !tied => Self::Random(1.0),
            _ => Self::Random((shape.last().copied().unwrap_or(1).max(1) as f32).powf(-0.5)),
        }
    }
}

/// Random numbers of one tensor. SplitMix64: Steele, Lea and Flood, doi:10.1145/2660193.2660195.
#[derive(Debug)]
pub(super) struct Stream {
    state: u64,
}

impl Stream {
    pub(super) fn new(seed: u64, tensor: &str) -> Self {
        let hash = blake3::hash(format!("{seed}/{tensor}").as_bytes());
        let first = hash.as_bytes().first_chunk::<8>().copied().unwrap_or_default();
        Self { state: u64::from_le_bytes(first) }
    }

    fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// The sum of four uniform numbers, shifted and scaled to mean 0 and standard deviation 1: close enough to normal for
    /// weights, and cheap.
    fn next_bell(&mut self) -> f32 {
        let bits = self.next_u64();
        let sum: u32 = (0..4).map(|quarter| (bits >> (16 * quarter)) as u32 & 0xffff).sum();
        // A uniform number below 65536 has variance 65536^2 / 12; four of them have a third of 65536^2.
        const MEAN: f32 = 2.0 * 65_535.0;
        const STD: f32 = 65_536.0 * 0.577_350_26;
        (sum as f32 - MEAN) / STD
    }

    /// Appends the bytes of the next `count` values.
    pub(super) fn write(&mut self, fill: &Fill, dtype: Dtype, count: usize, bytes: &mut Vec<u8>) {
        for _ in 0..count {
            let value = match fill {
                Fill::Ones => 1.0,
                Fill::Random(std) => self.next_bell() * std,
            };
            match dtype {
                Dtype::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                Dtype::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                // `config_json` has let no other dtype than f32 through.
                _ => bytes.extend(value.to_le_bytes()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_values_have_the_mean_and_deviation_asked_for() {
        const COUNT: usize = 100_000;
        let mut bytes = Vec::new();
        Stream::new(1, "tensor").write(&Fill::Random(0.25), Dtype::F32, COUNT, &mut bytes);
        let values: Vec<f64> =
            bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect();
        let mean = values.iter().sum::<f64>() / COUNT as f64;
        let std = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / COUNT as f64).sqrt();
        assert!(mean.abs() < 0.003, "mean {mean}");
        assert!((std - 0.25).abs() < 0.003, "standard deviation {std}");
    }
}
