//! Formats read value by value, as their specifications say: what the kernels are compared with.

use half::f16;

use crate::checkpoint::StoredDtype;

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// All values of blocks that lie one after another, in q8_0 or q4_k, or of plain values.
pub(crate) fn dequantised(dtype: StoredDtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        StoredDtype::F16 => bytes.chunks(2).map(half).collect(),
        StoredDtype::Q8_0 => bytes
            .chunks(34)
            .flat_map(|block| block[2..].iter().map(|byte| f32::from(*byte as i8) * half(block)).collect::<Vec<_>>())
            .collect(),
        StoredDtype::Q4K => bytes.chunks(144).flat_map(|block| (0..256).map(|at| q4_k(block, at))).collect(),
        other => panic!("{other:?}"),
    }
}

/// `dequantize_row_q4_K` of `ggml-quants.c`.
fn q4_k(block: &[u8], at: usize) -> f32 {
    let q = &block[4..16];
    let j = at / 32;
    let (scale, minimum) = if j < 4 {
        (q[j] & 63, q[j + 4] & 63)
    } else {
        ((q[j + 4] & 0xf) | ((q[j - 4] >> 6) << 4), (q[j + 4] >> 4) | ((q[j] >> 6) << 4))
    };
    let byte = block[16 + at / 64 * 32 + at % 32];
    let code = if at % 64 < 32 { byte & 0xf } else { byte >> 4 };
    half(block) * f32::from(scale) * f32::from(code) - half(&block[2..]) * f32::from(minimum)
}

/// A float of eight bits: sign, four bits of exponent with a bias of 7, three bits of mantissa.
pub(crate) fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size =
        if exponent == 0 { mantissa / 8.0 * 2f32.powi(-6) } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
    if byte & 0x80 == 0 { size } else { -size }
}

/// A float of four bits: sign, two bits of exponent with a bias of 1, one bit of mantissa.
pub(crate) fn e2m1(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 1 & 3), f32::from(code & 1));
    let size = if exponent == 0 { mantissa / 2.0 } else { (1.0 + mantissa / 2.0) * 2f32.powi(exponent - 1) };
    if code & 8 == 0 { size } else { -size }
}
