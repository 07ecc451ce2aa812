//! Formats in which each value stands for itself. Loops that the compiler turns into vectors; lengths are the caller's to get right.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

/// Values converted at a time, on the stack.
const BLOCK: usize = 256;

/// The bits of a float that are all set where it is not finite.
const EXPONENT: u32 = 0x7f80_0000;

pub(super) fn all_finite(values: &[f32]) -> bool {
    values.iter().fold(true, |finite, value| finite & (value.to_bits() & EXPONENT != EXPONENT))
}

/// Whether all values are finite; so for the other formats, once rounded.
pub(super) fn encode_f32(values: &[f32], out: &mut [u8]) -> bool {
    for (to, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *to = value.to_le_bytes();
    }
    all_finite(values)
}

pub(super) fn encode_f16(values: &[f32], out: &mut [u8]) -> bool {
    let mut converted = [f16::ZERO; BLOCK];
    let mut finite = true;
    for (values, out) in values.chunks(BLOCK).zip(out.chunks_mut(BLOCK * 2)) {
        let converted = &mut converted[..values.len()];
        converted.convert_from_f32_slice(values);
        for (to, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(converted) {
            finite &= value.to_bits() & 0x7c00 != 0x7c00;
            *to = value.to_bits().to_le_bytes();
        }
    }
    finite
}

pub(super) fn encode_bf16(values: &[f32], out: &mut [u8]) -> bool {
    let mut finite = true;
    for (to, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
        // To nearest, ties to even. A NaN may wrap around to a number, so the value is looked at as well as the result.
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        finite &= (bits & EXPONENT != EXPONENT) & (rounded & EXPONENT != EXPONENT);
        *to = ((rounded >> 16) as u16).to_le_bytes();
    }
    finite
}

pub(super) fn decode_f32(bytes: &[u8], out: &mut [f32]) {
    for (from, to) in bytes.as_chunks::<4>().0.iter().zip(out) {
        *to = f32::from_le_bytes(*from);
    }
}

pub(super) fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    let mut bits = [0u16; BLOCK];
    for (from, to) in bytes.chunks(BLOCK * 2).zip(out.chunks_mut(BLOCK)) {
        for (from, bits) in from.as_chunks::<2>().0.iter().zip(&mut bits) {
            *bits = u16::from_le_bytes(*from);
        }
        bits[..to.len()].reinterpret_cast::<f16>().convert_to_f32_slice(to);
    }
}

pub(super) fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    for (from, to) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *to = f32::from_bits(u32::from(u16::from_le_bytes(*from)) << 16);
    }
}
