//! The formats that [`super::packed`] reads: blocks as in GGML (`ggml-common.h`), floats of eight bits as DeepSeek V3 has them
//! (arXiv:2412.19437, section 3.3), and MXFP4 (OCP Microscaling Formats, version 1.0).

use super::packed::{GROUP, Packed, Row};
use crate::lanes::{LANES, Lanes};

/// Blocks of 32: an f16 scale, then as many signed bytes. A value is their product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Q8_0;

impl Q8_0 {
    pub(crate) const BYTES: usize = 2 + GROUP;
}

impl Packed for Q8_0 {
    const BLOCK: usize = GROUP;
    type Block<L: Lanes> = *const u8;

    #[inline(always)]
    unsafe fn block<L: Lanes>(row: Row, number: usize) -> *const u8 {
        row.values.wrapping_add(number.wrapping_mul(Self::BYTES))
    }

    #[inline(always)]
    unsafe fn group<L: Lanes>(block: &*const u8, _number: usize) -> [L::V; 2] {
        unsafe {
            let scale = L::splat(L::half_to_f32(block.cast::<u16>().read_unaligned()));
            let (first, second) = (block.wrapping_add(2), block.wrapping_add(2 + LANES));
            [L::mul(L::from_i8(L::load_bytes(first)), scale), L::mul(L::from_i8(L::load_bytes(second)), scale)]
        }
    }
}

/// Blocks of 256: an f16 scale and an f16 minimum, 12 bytes with a scale and a minimum of six bits for each group of 32, and 128 bytes
/// of four bits a value: the lower halves of 32 bytes are a group, the upper ones the next. A value is scale times scale times bits,
/// less minimum times minimum.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Q4K;

impl Q4K {
    pub(crate) const BYTES: usize = 4 + Self::SCALES + Self::BLOCK / 2;
    pub(crate) const SCALES: usize = 12;
    const GROUPS: usize = Self::BLOCK / GROUP;

    /// The groups' scales, then their minima.
    #[inline(always)]
    pub(crate) fn six_bits(packed: [u8; Self::SCALES]) -> [u8; 2 * Self::GROUPS] {
        let word = |at: usize| u32::from_le_bytes([packed[at], packed[at + 1], packed[at + 2], packed[at + 3]]);
        let (a, b, c) = (word(0), word(4), word(8));
        let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x0303_0303);
        let words =
            [a & six, (c & four) | (((a >> 6) & two) << 4), b & six, ((c >> 4) & four) | (((b >> 6) & two) << 4)];
        let words = words.map(u32::to_le_bytes);
        std::array::from_fn(|i| words[i / 4][i % 4])
    }
}

/// What a block of [`Q4K`] has in common.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Q4KBlock {
    bits: *const u8,
    /// Of the groups, in the first half.
    scales: [f32; LANES],
    /// Of the groups, in the second half, negative.
    minima: [f32; LANES],
}

impl Packed for Q4K {
    const BLOCK: usize = 256;
    type Block<L: Lanes> = Q4KBlock;

    #[inline(always)]
    unsafe fn block<L: Lanes>(row: Row, number: usize) -> Q4KBlock {
        unsafe {
            let from = row.values.wrapping_add(number.wrapping_mul(Self::BYTES));
            let [scale, minimum] = from.cast::<[u16; 2]>().read_unaligned();
            let packed = from.wrapping_add(4).cast::<[u8; Self::SCALES]>().read_unaligned();
            let six_bits = L::from_i8(L::load_bytes(Self::six_bits(packed).as_ptr()));
            let mut block =
                Q4KBlock { bits: from.wrapping_add(4 + Self::SCALES), scales: [0.0; LANES], minima: [0.0; LANES] };
            L::store(L::mul(six_bits, L::splat(L::half_to_f32(scale))), block.scales.as_mut_ptr());
            L::store(L::mul(six_bits, L::splat(-L::half_to_f32(minimum))), block.minima.as_mut_ptr());
            block
        }
    }

    #[inline(always)]
    unsafe fn group<L: Lanes>(block: &Q4KBlock, number: usize) -> [L::V; 2] {
        unsafe {
            let scale = L::splat(*block.scales.get_unchecked(number));
            let minimum = L::splat(*block.minima.get_unchecked(Self::GROUPS.wrapping_add(number)));
            let from = block.bits.wrapping_add((number / 2).wrapping_mul(GROUP));
            let (first, second) = (L::load_bytes(from), L::load_bytes(from.wrapping_add(LANES)));
            let (first, second) = if number.is_multiple_of(2) {
                (L::low_nibbles(first), L::low_nibbles(second))
            } else {
                (L::high_nibbles(first), L::high_nibbles(second))
            };
            // The product has few enough bits to be exact: one rounding, as where it is rounded by itself.
            [L::mul_add(L::from_i8(first), scale, minimum), L::mul_add(L::from_i8(second), scale, minimum)]
        }
    }
}

/// Values and rows that one scale of [`Fp8`] is for.
pub(crate) const FP8_TILE: usize = 128;

/// Floats of eight bits (e4m3); their scales, f32, lie by themselves, each for 128 rows and 128 values. A value is their product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fp8;

impl Packed for Fp8 {
    const BLOCK: usize = FP8_TILE;
    /// The values, and their scale times 256, by which the lanes' are too small.
    type Block<L: Lanes> = (*const u8, L::V);

    #[inline(always)]
    unsafe fn block<L: Lanes>(row: Row, number: usize) -> (*const u8, L::V) {
        unsafe {
            let scale = row.scales.cast::<f32>().wrapping_add(number).read_unaligned();
            (row.values.wrapping_add(number.wrapping_mul(Self::BLOCK)), L::splat(scale * 256.0))
        }
    }

    #[inline(always)]
    unsafe fn group<L: Lanes>((values, scale): &(*const u8, L::V), number: usize) -> [L::V; 2] {
        let from = values.wrapping_add(number.wrapping_mul(GROUP));
        unsafe {
            let (first, second) = (L::load_bytes(from), L::load_bytes(from.wrapping_add(LANES)));
            [L::mul(L::from_e4m3(first), *scale), L::mul(L::from_e4m3(second), *scale)]
        }
    }

    #[inline(always)]
    unsafe fn part<L: Lanes>((values, scale): &(*const u8, L::V), number: usize, len: usize) -> [L::V; 2] {
        let mut bytes = [0; GROUP];
        unsafe {
            let from = values.wrapping_add(number.wrapping_mul(GROUP));
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len);
            Self::group::<L>(&(bytes.as_ptr(), *scale), 0)
        }
    }
}

/// What the codes of [`Mxfp4`] stand for.
pub(crate) const FP4: [f32; LANES] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Blocks of 32 in 16 bytes, two floats of four bits (e2m1) in each, the lower half first; their scales, powers of two (e8m0), a byte for
/// each block, lie by themselves. A value is their product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mxfp4;

impl Mxfp4 {
    pub(crate) const BYTES: usize = GROUP / 2;
    /// The highest scale whose products are all finite.
    pub(crate) const LARGEST_SCALE: u8 = 252;
}

impl Packed for Mxfp4 {
    const BLOCK: usize = GROUP;
    /// The codes, and what they stand for in this block.
    type Block<L: Lanes> = (*const u8, L::V);

    #[inline(always)]
    unsafe fn block<L: Lanes>(row: Row, number: usize) -> (*const u8, L::V) {
        unsafe {
            let exponent = u32::from(row.scales.wrapping_add(number).read());
            // Two to the power of the exponent less 127; the lowest is subnormal.
            let scale = f32::from_bits(if exponent == 0 { 1 << 22 } else { exponent << 23 });
            let table = L::mul(L::load(FP4.as_ptr()), L::splat(scale));
            (row.values.wrapping_add(number.wrapping_mul(Self::BYTES)), table)
        }
    }

    #[inline(always)]
    unsafe fn group<L: Lanes>((codes, table): &(*const u8, L::V), _number: usize) -> [L::V; 2] {
        unsafe {
            let bytes = L::load_bytes(*codes);
            let [first, second] = L::in_turns(L::low_nibbles(bytes), L::high_nibbles(bytes));
            [L::look_up(*table, first), L::look_up(*table, second)]
        }
    }
}
