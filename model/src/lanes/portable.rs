//! Lanes as an array, for every machine.

use half::{bf16, f16};

use super::{LANES, Lanes};

pub(crate) struct Portable;

type Array = [f32; LANES];
type Half = [f32; LANES / 2];

#[inline(always)]
fn map(a: Array, f: impl Fn(f32) -> f32) -> Array {
    let mut out = a;
    for lane in &mut out {
        *lane = f(*lane);
    }
    out
}

#[inline(always)]
fn zip(a: Array, b: Array, f: impl Fn(f32, f32) -> f32) -> Array {
    let mut out = a;
    for (lane, b) in out.iter_mut().zip(b) {
        *lane = f(*lane, b);
    }
    out
}

impl Lanes for Portable {
    type V = Array;
    type Half = Half;
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Array {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Array {
        unsafe { from.cast::<Array>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Array {
        unsafe { from.cast::<[f16; LANES]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Array {
        unsafe { from.cast::<[u16; LANES]>().read_unaligned() }.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    unsafe fn store(v: Array, to: *mut f32) {
        unsafe { to.cast::<Array>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: Array, b: Array, c: Array) -> Array {
        let mut out = c;
        for i in 0..LANES {
            out[i] = a[i].mul_add(b[i], c[i]);
        }
        out
    }
    #[inline(always)]
    unsafe fn load_half(from: *const f32) -> Half {
        unsafe { from.cast::<Half>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_half(v: Half, to: *mut f32) {
        unsafe { to.cast::<Half>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn mul_add_half(a: Half, b: Half, c: Half) -> Half {
        let mut out = c;
        for i in 0..out.len() {
            out[i] = a[i].mul_add(b[i], c[i]);
        }
        out
    }
    #[inline(always)]
    unsafe fn add(a: Array, b: Array) -> Array {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn mul(a: Array, b: Array) -> Array {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Array, b: Array) -> Array {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: Array, b: Array) -> Array {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Array, b: Array) -> Array {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn round(a: Array) -> Array {
        map(a, f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn exp2_whole(a: Array) -> Array {
        map(a, |a| f32::from_bits(((a as i32).wrapping_add(127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn sum(a: Array) -> f32 {
        let mut lanes = a;
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }
}
