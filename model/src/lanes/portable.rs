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
    type Bytes = [u8; LANES];
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
    unsafe fn halves(v: Array) -> [Half; 2] {
        [std::array::from_fn(|i| v[i]), std::array::from_fn(|i| v[i + LANES / 2])]
    }
    #[inline(always)]
    unsafe fn join([lower, upper]: [Half; 2]) -> Array {
        std::array::from_fn(|i| if i < LANES / 2 { lower[i] } else { upper[i - LANES / 2] })
    }
    #[inline(always)]
    unsafe fn load_half(from: *const f32) -> Half {
        unsafe { from.cast::<Half>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_half_f16(from: *const f16) -> Half {
        unsafe { from.cast::<[f16; LANES / 2]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_half_bf16(from: *const bf16) -> Half {
        unsafe { from.cast::<[u16; LANES / 2]>().read_unaligned() }.map(|bits| f32::from_bits(u32::from(bits) << 16))
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
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> [u8; LANES] {
        unsafe { from.cast::<[u8; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn low_nibbles(bytes: [u8; LANES]) -> [u8; LANES] {
        bytes.map(|byte| byte & 15)
    }
    #[inline(always)]
    unsafe fn high_nibbles(bytes: [u8; LANES]) -> [u8; LANES] {
        bytes.map(|byte| byte >> 4)
    }
    #[inline(always)]
    unsafe fn in_turns(a: [u8; LANES], b: [u8; LANES]) -> [[u8; LANES]; 2] {
        let of = |first: usize| std::array::from_fn(|i| if i % 2 == 0 { a[first + i / 2] } else { b[first + i / 2] });
        [of(0), of(LANES / 2)]
    }
    #[inline(always)]
    unsafe fn from_i8(bytes: [u8; LANES]) -> Array {
        bytes.map(|byte| f32::from(byte as i8))
    }
    #[inline(always)]
    unsafe fn look_up(table: Array, codes: [u8; LANES]) -> Array {
        codes.map(|code| table[usize::from(code & 15)])
    }
    #[inline(always)]
    unsafe fn from_e4m3(bytes: [u8; LANES]) -> Array {
        // An f16 has one more bit of exponent, and another bias.
        bytes.map(|byte| f16::from_bits((u16::from(byte & 0x80) << 8) | (u16::from(byte & 0x7f) << 7)).to_f32())
    }
    #[inline(always)]
    unsafe fn half_to_f32(bits: u16) -> f32 {
        f16::from_bits(bits).to_f32()
    }
}
