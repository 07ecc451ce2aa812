//! Rotary frequencies and their scalings, as transformers' `modeling_rope_utils.py` defines them.

use std::f64::consts::TAU;

use crate::spec::{RopePairs, RopeScaling, RopeSpec};

/// Angles per position.
#[derive(Debug)]
pub(crate) struct Rope {
    /// `[dims / 2]`
    frequencies: Vec<f32>,
    /// Multiplies cos and sin.
    attention_factor: f32,
    pairs: RopePairs,
}

/// The angles of some rows.
#[derive(Debug)]
pub(crate) struct Angles {
    /// `[rows, dims / 2]`
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    pairs: RopePairs,
}

impl Rope {
    pub(crate) fn new(spec: &RopeSpec) -> Self {
        let (dims, half) = (spec.dims, spec.dims / 2);
        // The reference computes powers in f32 and everything after them too.
        let power = |i: usize| spec.theta.powf(f64::from((2 * i) as f32 / dims as f32)) as f32;
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
                    dims as f64 * (original_max_positions / (rotations * TAU)).ln() / (2.0 * spec.theta.ln())
                };
                let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dims as f64 - 1.0));
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
        Self { frequencies, attention_factor, pairs: spec.pairs }
    }

    /// The angles of rows at these positions.
    pub(crate) fn angles(&self, positions: &[usize]) -> Angles {
        let half = self.frequencies.len();
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        for position in positions {
            for frequency in &self.frequencies {
                let (s, c) = f64::from(*position as f32 * frequency).sin_cos();
                cos.push(c as f32 * self.attention_factor);
                sin.push(s as f32 * self.attention_factor);
            }
        }
        Angles { cos, sin, half, pairs: self.pairs }
    }
}

impl Angles {
    /// Rotates values of each head, from `first` on; `x` is `[rows, heads, head_dim]`.
    pub(crate) fn rotate(&self, x: &mut [f32], heads: usize, head_dim: usize, first: usize) {
        self.rotate_pairs(x, (heads, head_dim), first, self.pairs);
    }

    /// The same with values that are paired so.
    pub(crate) fn rotate_pairs(
        &self,
        x: &mut [f32],
        (heads, head_dim): (usize, usize),
        first: usize,
        pairs: RopePairs,
    ) {
        let rows = x.chunks_exact_mut(heads * head_dim);
        for ((row, cos), sin) in rows.zip(self.cos.chunks_exact(self.half)).zip(self.sin.chunks_exact(self.half)) {
            for head in row.chunks_exact_mut(head_dim) {
                let head = &mut head[first..first + 2 * self.half];
                match pairs {
                    RopePairs::Halves => {
                        let (left, right) = head.split_at_mut(self.half);
                        for (((a, b), cos), sin) in left.iter_mut().zip(right).zip(cos).zip(sin) {
                            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                        }
                    }
                    RopePairs::Neighbours => {
                        for ((pair, cos), sin) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                            (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
                        }
                    }
                }
            }
        }
    }
}
