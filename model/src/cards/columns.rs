//! Where the values of one column lie in a panel, and their scales.

use super::dtype::Dtype;
use super::panels::{CHUNK, CHUNKS, HALF, OCTET};
use crate::linear::{GROUP, Matrix, Mxfp4, Packed, Q4K, Q8_0};

/// Writes a row of a matrix as number `column` of a panel of zeros, whose width is so many octets. A matrix in another dtype is widened,
/// which is for panels in f32.
pub(super) fn write(matrix: &Matrix, row: usize, dtype: Dtype, column: usize, octets: usize, panel: &mut [u8]) {
    let place = Place { half: column / HALF, column: column % HALF };
    let (values, scales) = panel.split_at_mut(octets * dtype.value_bytes());
    match dtype {
        Dtype::F32 => {
            let mut wide = vec![0.0; matrix.inputs()];
            matrix.widen_row(row, &mut wide);
            place.scatter::<4>(wide.iter().map(|value| value.to_le_bytes()), values);
        }
        Dtype::F16 | Dtype::Bf16 => {
            let halves = matrix.half_row(row).unwrap_or_default();
            place.scatter::<2>(halves.iter().map(|value| value.to_le_bytes()), values);
        }
        Dtype::Q8_0 | Dtype::Q4K | Dtype::Fp8 | Dtype::Mxfp4 => {
            let (stored, stored_scales) = matrix.stored_row(row).unwrap_or_default();
            match dtype {
                Dtype::Q8_0 => place.q8_0(stored.as_chunks().0, values, scales),
                Dtype::Q4K => place.q4_k(stored.as_chunks().0, values, scales),
                Dtype::Fp8 => place.fp8(stored, stored_scales.as_chunks().0, values, scales),
                _ => place.mxfp4(stored, stored_scales, values, scales),
            }
        }
    }
}

/// Which column of which half.
#[derive(Clone, Copy)]
struct Place {
    half: usize,
    column: usize,
}

impl Place {
    /// Puts the values of a column, of `SIZE` bytes each. A thread has whole vectors of sixteen bytes of it.
    fn scatter<const SIZE: usize>(self, values: impl Iterator<Item = [u8; SIZE]>, panel: &mut [u8]) {
        // Values of a thread that lie side by side, and how many such vectors it reads of an octet.
        let (vector, vectors) = (16 / SIZE, CHUNKS * SIZE / 16);
        for (number, value) in values.enumerate() {
            let (octet, chunk, lane) = (number / OCTET, number % OCTET / CHUNK, number % CHUNK);
            let row = (octet * HALF + self.column) * vectors + chunk / vector;
            let at = (self.thread(row, lane) + chunk % vector * SIZE)..;
            panel[at][..SIZE].copy_from_slice(&value);
        }
    }

    /// Where the bytes of a thread begin in a row of vectors of all threads.
    fn thread(self, row: usize, lane: usize) -> usize {
        ((row * 2 + self.half) * CHUNK + lane) * 16
    }

    /// Puts values of a byte each; a thread's vector has those of two columns.
    fn bytes(self, values: impl Iterator<Item = u8>, panel: &mut [u8]) {
        for (number, value) in values.enumerate() {
            let (octet, chunk, lane) = (number / OCTET, number % OCTET / CHUNK, number % CHUNK);
            let row = octet * (HALF / 2) + self.column / 2;
            panel[self.thread(row, lane) + self.column % 2 * CHUNKS + chunk] = value;
        }
    }

    /// Puts values of four bits each; a thread's vector has those of four columns.
    fn nibbles(self, values: impl Iterator<Item = u8>, panel: &mut [u8]) {
        for (number, value) in values.enumerate() {
            let (octet, chunk, lane) = (number / OCTET, number % OCTET / CHUNK, number % CHUNK);
            let row = octet * (HALF / 4) + self.column / 4;
            let at = self.thread(row, lane) + self.column % 4 * (CHUNKS / 2) + chunk / 2;
            panel[at] |= value << (chunk % 2 * 4);
        }
    }

    /// Number `at` of the scales of `SIZE` bytes of this column, of which an octet has `COUNT`.
    fn scale<const SIZE: usize, const COUNT: usize>(self, at: usize, scale: [u8; SIZE], scales: &mut [u8]) {
        let column = (at / COUNT * 2 + self.half) * HALF + self.column;
        scales[(column * COUNT + at % COUNT) * SIZE..][..SIZE].copy_from_slice(&scale);
    }

    /// Bytes have 128 added to them.
    fn q8_0(self, blocks: &[[u8; Q8_0::BYTES]], values: &mut [u8], scales: &mut [u8]) {
        self.bytes(blocks.iter().flat_map(|block| &block[2..]).map(|byte| byte ^ 0x80), values);
        for (number, block) in blocks.iter().enumerate() {
            self.scale::<2, { OCTET / GROUP }>(number, [block[0], block[1]], scales);
        }
    }

    /// Blocks keep their first sixteen bytes.
    fn q4_k(self, blocks: &[[u8; Q4K::BYTES]], values: &mut [u8], scales: &mut [u8]) {
        let code = |block: &[u8; Q4K::BYTES], at: usize| {
            let byte = block[HEAD + at / (2 * GROUP) * GROUP + at % GROUP];
            byte >> (at / GROUP % 2 * 4) & 15
        };
        self.nibbles(blocks.iter().flat_map(|block| (0..Q4K::BLOCK).map(|at| code(block, at))), values);
        for (number, block) in blocks.iter().enumerate() {
            if let Some(head) = block.first_chunk::<HEAD>() {
                self.scale::<HEAD, 1>(number, *head, scales);
            }
        }
    }

    /// Gate and up have scales of their own, the columns of either have the same.
    fn fp8(self, bytes: &[u8], stored: &[[u8; 4]], values: &mut [u8], scales: &mut [u8]) {
        self.bytes(bytes.iter().copied(), values);
        for (octet, scale) in stored.iter().enumerate() {
            scales[(octet * 2 + self.column / (HALF / 2)) * 4..][..4].copy_from_slice(scale);
        }
    }

    fn mxfp4(self, bytes: &[u8], stored: &[u8], values: &mut [u8], scales: &mut [u8]) {
        self.nibbles(bytes.iter().flat_map(|byte| [byte & 15, byte >> 4]), values);
        for (number, scale) in stored.iter().enumerate() {
            self.scale::<1, { OCTET / GROUP }>(number, [*scale], scales);
        }
    }
}

/// Bytes of a block of q4_k before its values: scales.
const HEAD: usize = Q4K::BYTES - Q4K::BLOCK / 2;

// Blocks are parts of octets or some of them.
const _: () =
    assert!(OCTET.is_multiple_of(Q8_0::BLOCK) && Q4K::BLOCK == 2 * OCTET && OCTET.is_multiple_of(Mxfp4::BLOCK));
const _: () = assert!(OCTET == crate::linear::FP8_TILE);
