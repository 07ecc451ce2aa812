//! What experts compute between their matrices, beside silu: biases and the clamped SwiGLU.

use crate::lanes::{LANES, Lanes, exp, instantiate, padded};

/// Adds a bias to `to`, value by value.
pub(crate) fn add_bias(to: &mut [f32], bias: &[f32]) {
    to.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
}

instantiate! {
    /// `gate[i] = g * sigmoid(alpha * g) * (u + 1)` for `len` values, with g the smaller of `gate[i]` and `limit`, and u `up[i]` clamped
    /// to ± `limit`.
    ///
    /// # Safety
    /// The machine must have `isa`; both pointers are valid for `len` values.
    pub(crate) fn clamped_swiglu(gate: *mut f32, up: *const f32, len: usize, limit: f32, alpha: f32) = clamped_with
}

#[inline(always)]
unsafe fn clamped_with<L: Lanes>(gate: *mut f32, up: *const f32, len: usize, limit: f32, alpha: f32) {
    let mut at = 0;
    unsafe {
        while at < len {
            let left = LANES.min(len - at);
            let g = L::load(padded(gate.add(at), left).as_ptr());
            let u = L::load(padded(up.add(at), left).as_ptr());
            // In this order what is not a number stays so.
            let g = L::min(L::splat(limit), g);
            let u = L::max(L::splat(-limit), L::min(L::splat(limit), u));
            let denominator = L::add(L::splat(1.0), exp::<L>(L::mul(g, L::splat(-alpha))));
            let mut buffer = [0.0; LANES];
            L::store(L::mul(L::div(g, denominator), L::add(u, L::splat(1.0))), buffer.as_mut_ptr());
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), gate.add(at), left);
            at += left;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lanes::Isa;

    proptest! {
        #[test]
        fn the_clamped_swiglu_agrees_bit_for_bit_and_with_f64(
            gate in proptest::collection::vec(-40.0f32..40.0, 1..40),
            limit in 0.5f32..10.0,
            alpha in 0.5f32..2.0,
        ) {
            let up: Vec<f32> = gate.iter().rev().map(|v| v * 0.5 + 1.0).collect();
            let run = |isa| {
                let mut out = gate.clone();
                // SAFETY: both are of the same length, and `isa` comes from `Isa::available`.
                unsafe { clamped_swiglu(isa, out.as_mut_ptr(), up.as_ptr(), out.len(), limit, alpha) };
                out.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
            };
            let expected = run(Isa::Portable);
            for isa in Isa::available() {
                prop_assert_eq!(&run(isa), &expected, "{:?}", isa);
            }
            for ((gate, up), found) in gate.iter().zip(&up).zip(expected) {
                let (limit, alpha) = (f64::from(limit), f64::from(alpha));
                let gate = f64::from(*gate).min(limit);
                let exact = (f64::from(*up).clamp(-limit, limit) + 1.0) * gate / (1.0 + (-alpha * gate).exp());
                let found = f64::from(f32::from_bits(found));
                prop_assert!((found - exact).abs() <= exact.abs() * 2e-6 + 1e-9, "{gate}: {found} {exact}");
            }
        }
    }
}
