//! What a core does at best, in the lanes of the kernels: the limits beside which kernels are measured.

use std::hint::black_box;

use crate::lanes::{Isa, LANES, Lanes, instantiate};

/// Adds all values up, some of them in each lane, as fast as they come from memory; a rest shorter than a few vectors is left out.
#[must_use]
pub fn read_through(values: &[f32]) -> f32 {
    let mut sum = 0.0;
    // SAFETY: the instructions are there, and only whole vectors of the slice are read.
    unsafe { read_all(Isa::detect(), values.as_ptr(), values.len(), &raw mut sum) };
    sum
}

instantiate! { fn read_all(from: *const f32, len: usize, sum: *mut f32) = read_all_body }

#[inline(always)]
unsafe fn read_all_body<L: Lanes>(from: *const f32, len: usize, sum: *mut f32) {
    const TOGETHER: usize = 4;
    unsafe {
        let mut sums = [L::splat(0.0); TOGETHER];
        for start in (0..len - len % (TOGETHER * LANES)).step_by(TOGETHER * LANES) {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = L::add(*sum, L::load(from.add(start + i * LANES)));
            }
        }
        *sum = sums.into_iter().map(|v| L::sum(v)).sum();
    }
}

/// Multiplies and adds in registers only, `rounds` times over as many as keep a core busy. Returns how many operations that was: a
/// multiplication and an addition are two.
#[must_use]
pub fn multiply_add(rounds: usize) -> u64 {
    let (mut sum, mut vectors) = (0.0, 0);
    // SAFETY: the instructions are there; both pointers are good.
    unsafe { multiply_all(Isa::detect(), black_box(rounds), black_box(0.5), &raw mut sum, &raw mut vectors) };
    black_box(sum);
    (rounds * vectors * LANES * 2) as u64
}

instantiate! {
    fn multiply_all(rounds: usize, factor: f32, sum: *mut f32, vectors: *mut usize) = multiply_all_body
}

#[inline(always)]
unsafe fn multiply_all_body<L: Lanes>(rounds: usize, factor: f32, sum: *mut f32, vectors: *mut usize) {
    unsafe {
        // More than the products that are under way at a time, and no more than there are registers.
        *vectors = if L::WIDE { 12 } else { 6 };
        *sum = if L::WIDE { multiply::<L, 12>(rounds, factor) } else { multiply::<L, 6>(rounds, factor) };
    }
}

#[inline(always)]
unsafe fn multiply<L: Lanes, const N: usize>(rounds: usize, factor: f32) -> f32 {
    unsafe {
        let (factor, one) = (L::splat(factor), L::splat(1.0));
        let mut sums = [one; N];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = L::mul_add(*sum, factor, one);
            }
        }
        sums.into_iter().map(|v| L::sum(v)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_whole_vector_is_read() {
        let values: Vec<f32> = (0..64 * 3 + 5).map(|i| (i % 8) as f32).collect();
        assert_eq!(read_through(&values), (64 * 3 / 8 * 28) as f32);
        assert_eq!(read_through(&[]), 0.0);
    }

    #[test]
    fn operations_are_counted_per_round() {
        let per_round = multiply_add(1);
        assert!(per_round >= 2 * 6 * LANES as u64);
        assert_eq!(multiply_add(10), 10 * per_round);
    }
}
