//! Whole numbers with a scale for each block.
//!
//! A row is cut into blocks of 32 values, the last one shorter where the row is. A block is its scale, a bfloat16, and a signed byte
//! for each value. The scale is the largest magnitude divided by 127, rounded up to a bfloat16, and so 0 only for zeros; a byte is the
//! value divided by the scale, rounded to nearest even. Scale times byte needs 15 bits of mantissa: reading is exact in `f32`.

/// Values that share a scale.
pub(super) const BLOCK: usize = 32;
const SCALE_BYTES: usize = 2;
const ENCODED: usize = SCALE_BYTES + BLOCK;
/// The largest byte.
const MOST: f32 = 127.0;
/// Added to a number below 2^22 this leaves it rounded to nearest even in the lowest bits, in two's complement.
const ROUND: f32 = 12_582_912.0;

/// The scale of a block whose largest magnitude is `top`; `None` where `top` is not finite or what is read would not be.
#[inline(always)]
pub(super) fn scale(top: f32) -> Option<f32> {
    if !top.is_finite() {
        return None;
    }
    // The magnitude is far below the largest float, so that rounding up cannot carry into infinity.
    let scale = f32::from_bits(((top / MOST).to_bits() + 0xffff) & 0xffff_0000);
    (scale * MOST).is_finite().then_some(scale)
}

/// Whether every value can be carried.
pub(super) fn encode(values: &[f32], width: usize, out: &mut [u8]) -> bool {
    let mut fits = true;
    let row_bytes = super::WireDtype::Int8.row_bytes(width);
    for (row, out) in values.chunks(width).zip(out.chunks_mut(row_bytes)) {
        let ((whole, rest), (out_whole, out_rest)) = (row.as_chunks::<BLOCK>(), out.as_chunks_mut::<ENCODED>());
        for (block, out) in whole.iter().zip(out_whole) {
            fits &= encode_block(block, out);
        }
        if !rest.is_empty() {
            fits &= encode_block(rest, out_rest);
        }
    }
    fits
}

#[inline(always)]
fn encode_block(values: &[f32], out: &mut [u8]) -> bool {
    // Magnitudes are ordered as their bits are; signed numbers, as they are quicker to compare.
    let top = values.iter().fold(0i32, |top, value| top.max((value.to_bits() & 0x7fff_ffff) as i32));
    let Some(scale) = scale(f32::from_bits(top as u32)) else { return false };
    let (scale_bytes, bytes) = out.split_at_mut(SCALE_BYTES);
    scale_bytes.copy_from_slice(&((scale.to_bits() >> 16) as u16).to_le_bytes());
    let divisor = if scale == 0.0 { 1.0 } else { scale };
    for (value, byte) in values.iter().zip(bytes) {
        *byte = (value / divisor + ROUND).to_bits() as u8;
    }
    true
}

pub(super) fn decode(bytes: &[u8], width: usize, out: &mut [f32]) {
    let row_bytes = super::WireDtype::Int8.row_bytes(width).max(1);
    for (row, out) in bytes.chunks(row_bytes).zip(out.chunks_mut(width.max(1))) {
        let ((whole, rest), (out_whole, out_rest)) = (row.as_chunks::<ENCODED>(), out.as_chunks_mut::<BLOCK>());
        for (block, out) in whole.iter().zip(out_whole) {
            decode_block(block, out);
        }
        if !out_rest.is_empty() {
            decode_block(rest, out_rest);
        }
    }
}

#[inline(always)]
fn decode_block(block: &[u8], out: &mut [f32]) {
    let Some((scale, bytes)) = block.split_first_chunk::<SCALE_BYTES>() else { return };
    let scale = f32::from_bits(u32::from(u16::from_le_bytes(*scale)) << 16);
    for (byte, to) in bytes.iter().zip(out) {
        *to = f32::from(*byte as i8) * scale;
    }
}
