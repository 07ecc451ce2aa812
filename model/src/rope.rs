//! Rotary frequencies and their scalings, as transformers' `modeling_rope_utils.py` defines them.

use std::f64::consts::TAU;

use candle_core::{Device, Result, Tensor};

use crate::spec::{RopeScaling, RopeSpec};

/// Angles per position, for one head size.
#[derive(Debug)]
pub(crate) struct Rope {
    /// `[head_dim / 2]`
    frequencies: Vec<f32>,
    /// Multiplies cos and sin.
    attention_factor: f32,
}

impl Rope {
    pub(crate) fn new(spec: &RopeSpec, head_dim: usize) -> Self {
        let half = head_dim / 2;
        // The reference computes powers in f32 and everything after them too.
        let power = |i: usize| spec.theta.powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32;
        let plain = |i: usize| 1.0 / power(i);
        let mut attention_factor = 1.0;
        let frequencies = match spec.scaling {
            RopeScaling::None => (0..half).map(plain).collect(),
            RopeScaling::Linear { factor } => (0..half).map(|i| plain(i) / factor as f32).collect(),
            RopeScaling::Yarn {
                factor,
                attention_factor: given,
                beta_fast,
                beta_slow,
                original_max_positions,
                truncate,
            } => {
                attention_factor = given as f32;
                let dimension = |rotations: f64| {
                    head_dim as f64 * (original_max_positions / (rotations * TAU)).ln() / (2.0 * spec.theta.ln())
                };
                let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let ramp = |i: usize| ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let blend = |i: usize| {
                    let keep = 1.0 - ramp(i);
                    1.0 / (factor as f32 * power(i)) * (1.0 - keep) + plain(i) * keep
                };
                (0..half).map(blend).collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                let scale = |i: usize| {
                    let plain = plain(i);
                    let wavelength = (TAU as f32) / plain;
                    if wavelength > (original_max_positions / low_freq_factor) as f32 {
                        plain / factor as f32
                    } else if wavelength < (original_max_positions / high_freq_factor) as f32 {
                        plain
                    } else {
                        let smooth = (original_max_positions as f32 / wavelength - low_freq_factor as f32)
                            / (high_freq_factor - low_freq_factor) as f32;
                        (1.0 - smooth) * plain / factor as f32 + smooth * plain
                    }
                };
                (0..half).map(scale).collect()
            }
        };
        Self { frequencies, attention_factor }
    }

    /// cos and sin for the positions of some rows: `[rows, head_dim / 2]` each.
    pub(crate) fn angles(&self, positions: &[usize]) -> Result<(Tensor, Tensor)> {
        let shape = (positions.len(), self.frequencies.len());
        let (mut cos, mut sin) = (Vec::with_capacity(shape.0 * shape.1), Vec::with_capacity(shape.0 * shape.1));
        for position in positions {
            for frequency in &self.frequencies {
                let (s, c) = f64::from(*position as f32 * frequency).sin_cos();
                cos.push(c as f32 * self.attention_factor);
                sin.push(s as f32 * self.attention_factor);
            }
        }
        Ok((Tensor::from_vec(cos, shape, &Device::Cpu)?, Tensor::from_vec(sin, shape, &Device::Cpu)?))
    }
}
