//! How values are stored: plain ones, blocks of GGML, and what quantised checkpoints are published in.

use half::{bf16, f16};
use safetensors::Dtype;

use super::error::CheckpointError;
use crate::linear::{Mxfp4, Packed, Q4K, Q8_0};

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoredDtype {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
    /// GGML's blocks of 32 values: a scale and as many signed bytes.
    Q8_0,
    /// GGML's blocks of 256 values of four bits, with a scale and a minimum for each 32.
    Q4K,
    /// Floats of eight bits, whose scales are a tensor of their own: one for each 128 rows and 128 columns.
    F8E4m3,
    /// Floats of four bits, two to a byte, whose scales are a tensor of their own: one for each 32.
    F4E2m1,
    /// Powers of two: such scales.
    F8E8m0,
}

/// Tensors of bytes whose names end so hold blocks; the rest of the name is the tensor's own.
const SUFFIXES: [(&str, StoredDtype); 2] = [(".q8_0", StoredDtype::Q8_0), (".q4_k", StoredDtype::Q4K)];

/// Tensors of bytes as gpt-oss has them.
const MXFP4: [(&str, StoredDtype); 2] = [("_blocks", StoredDtype::F4E2m1), ("_scales", StoredDtype::F8E8m0)];

impl StoredDtype {
    /// Values of a block, and its bytes.
    #[must_use]
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (Q8_0::BLOCK, Q8_0::BYTES),
            Self::Q4K => (Q4K::BLOCK, Q4K::BYTES),
            Self::F8E4m3 | Self::F8E8m0 => (1, 1),
            Self::F4E2m1 => (2, 1),
        }
    }

    /// Bytes of so many values; `None` if they are no whole blocks, or too many.
    #[must_use]
    pub fn bytes(self, values: usize) -> Option<usize> {
        let (block, bytes) = self.block();
        (values / block).checked_mul(bytes).filter(|_| values.is_multiple_of(block))
    }

    /// As safetensors files write it, or as GGML does.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::F8E4m3 => "F8_E4M3",
            Self::F4E2m1 => "F4",
            Self::F8E8m0 => "F8_E8M0",
        }
    }

    /// What the names of quantised tensors end in; `None` for dtypes that safetensors files have themselves.
    #[must_use]
    pub fn suffix(self) -> Option<&'static str> {
        SUFFIXES.iter().find(|(_, dtype)| *dtype == self).map(|(suffix, _)| *suffix)
    }

    /// A tensor's own name, without what says that it holds blocks.
    pub(super) fn without_suffix(name: &str) -> &str {
        SUFFIXES.iter().find_map(|(suffix, _)| name.strip_suffix(suffix)).unwrap_or(name)
    }

    /// The same among those that safetensors files have for plain values; `None` for quantised ones.
    pub(crate) fn plain(self) -> Option<Dtype> {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16).then(|| self.in_file())
    }

    /// The dtype of a tensor of a safetensors file that holds such values: bytes for blocks.
    pub(crate) fn in_file(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
            Self::F8E4m3 => Dtype::F8_E4M3,
            Self::Q8_0 | Self::Q4K | Self::F4E2m1 | Self::F8E8m0 => Dtype::U8,
        }
    }

    /// Whether values lie in blocks or have scales elsewhere.
    #[must_use]
    pub fn is_quantised(self) -> bool {
        self.plain().is_none()
    }

    /// The first value that is infinite or no number, of whole blocks that lie one after another in `bytes`: which one, and the value. Of
    /// a block whose scale is not finite it is the first.
    #[must_use]
    pub fn not_finite(self, bytes: &[u8]) -> Option<(usize, f32)> {
        // Exponents of nothing but ones.
        let (two, _) = bytes.as_chunks::<2>();
        let all_ones = |two: &[u8; 2], mask: u16| u16::from_le_bytes(*two) & mask == mask;
        let half = |two: [u8; 2]| f16::from_le_bytes(two).to_f32();
        match self {
            Self::F32 => {
                let (four, _) = bytes.as_chunks::<4>();
                let at = four.iter().position(|four| !f32::from_le_bytes(*four).is_finite())?;
                Some((at, f32::from_le_bytes(*four.get(at)?)))
            }
            Self::F16 => {
                let at = two.iter().position(|two| all_ones(two, 0x7c00))?;
                Some((at, half(*two.get(at)?)))
            }
            Self::Bf16 => {
                let at = two.iter().position(|two| all_ones(two, 0x7f80))?;
                Some((at, bf16::from_le_bytes(*two.get(at)?).to_f32()))
            }
            Self::Q8_0 => {
                let (blocks, _) = bytes.as_chunks::<{ Q8_0::BYTES }>();
                let at = blocks.iter().position(|block| all_ones(&[block[0], block[1]], 0x7c00))?;
                let block = blocks.get(at)?;
                Some((at * Q8_0::BLOCK, half([block[0], block[1]])))
            }
            Self::Q4K => {
                let (blocks, _) = bytes.as_chunks::<{ Q4K::BYTES }>();
                let scales = |block: &[u8; Q4K::BYTES]| [[block[0], block[1]], [block[2], block[3]]];
                let wrong = |two: &[u8; 2]| all_ones(two, 0x7c00);
                let at = blocks.iter().position(|block| scales(block).iter().any(wrong))?;
                let scale = scales(blocks.get(at)?).into_iter().find(wrong)?;
                Some((at * Q4K::BLOCK, half(scale)))
            }
            Self::F8E4m3 => bytes.iter().position(|byte| byte & 0x7f == 0x7f).map(|at| (at, f32::NAN)),
            Self::F4E2m1 => None,
            // Where the product of a scale and a float of four bits may be infinite, or the scale is no number.
            Self::F8E8m0 => {
                let at = bytes.iter().position(|byte| *byte > Mxfp4::LARGEST_SCALE)?;
                Some((at, if bytes.get(at) == Some(&0xff) { f32::NAN } else { f32::INFINITY }))
            }
        }
    }

    /// What a tensor of a file holds: its own name, how its values are stored, and its shape. `None` for a dtype that is not read.
    ///
    /// # Errors
    /// `Blocks` if its rows are no whole blocks.
    pub(crate) fn of_tensor<'a>(
        name: &'a str,
        dtype: Dtype,
        shape: &[usize],
    ) -> Result<(&'a str, Option<Self>, Vec<usize>), CheckpointError> {
        let plain = match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::F16 => Some(Self::F16),
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F8_E4M3 => Some(Self::F8E4m3),
            _ => None,
        };
        let suffixed = SUFFIXES.iter().find_map(|(suffix, stored)| Some((name.strip_suffix(suffix)?, *stored)));
        let microscaled = || MXFP4.iter().find(|(suffix, _)| name.ends_with(suffix)).map(|(_, stored)| (name, *stored));
        let Some((base, stored)) = suffixed.or_else(microscaled).filter(|_| dtype == Dtype::U8) else {
            return Ok((name, plain, shape.to_vec()));
        };
        let (values, bytes) = stored.block();
        let mut shape = shape.to_vec();
        let row = shape.last().copied().unwrap_or(0);
        match shape.last_mut().zip(row.checked_div(bytes).and_then(|blocks| blocks.checked_mul(values))) {
            Some((last, found)) if row.is_multiple_of(bytes) => *last = found,
            _ => return Err(CheckpointError::Blocks { tensor: name.to_owned(), row_bytes: row, block_bytes: bytes }),
        }
        Ok((base, Some(stored), shape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_bytes_hold() {
        let of = |name, dtype, shape: &[usize]| StoredDtype::of_tensor(name, dtype, shape);
        let (name, dtype, shape) = of("a.weight.q8_0", Dtype::U8, &[3, 68]).unwrap();
        assert_eq!((name, dtype, shape), ("a.weight", Some(StoredDtype::Q8_0), vec![3, 64]));
        let (name, dtype, shape) = of("a.weight.q4_k", Dtype::U8, &[2, 3, 288]).unwrap();
        assert_eq!((name, dtype, shape), ("a.weight", Some(StoredDtype::Q4K), vec![2, 3, 512]));
        let (name, dtype, shape) = of("a_blocks", Dtype::U8, &[2, 3, 5, 16]).unwrap();
        assert_eq!((name, dtype, shape), ("a_blocks", Some(StoredDtype::F4E2m1), vec![2, 3, 5, 32]));
        let (name, dtype, shape) = of("a_scales", Dtype::U8, &[2, 3, 5]).unwrap();
        assert_eq!((name, dtype, shape), ("a_scales", Some(StoredDtype::F8E8m0), vec![2, 3, 5]));
        assert_eq!(of("a.weight", Dtype::U8, &[4]).unwrap().1, None);
        assert_eq!(of("a.q8_0", Dtype::F32, &[4]).unwrap(), ("a.q8_0", Some(StoredDtype::F32), vec![4]));
        for (name, shape) in [("a.q8_0", &[3, 67][..]), ("a.q4_k", &[143]), ("a.q8_0", &[])] {
            assert!(matches!(of(name, Dtype::U8, shape), Err(CheckpointError::Blocks { .. })), "{name}");
        }
    }

    #[test]
    fn scales_and_codes_that_are_no_finite_numbers_are_found() {
        let infinite = f16::INFINITY.to_le_bytes();
        let mut blocks = vec![0; 3 * Q8_0::BYTES];
        assert_eq!(StoredDtype::Q8_0.not_finite(&blocks), None);
        blocks[Q8_0::BYTES..Q8_0::BYTES + 2].copy_from_slice(&infinite);
        assert_eq!(StoredDtype::Q8_0.not_finite(&blocks), Some((32, f32::INFINITY)));
        for at in [0, 2] {
            let mut blocks = vec![0; 2 * Q4K::BYTES];
            blocks[Q4K::BYTES + at..Q4K::BYTES + at + 2].copy_from_slice(&f16::NAN.to_le_bytes());
            let (place, value) = StoredDtype::Q4K.not_finite(&blocks).unwrap();
            assert!(place == 256 && value.is_nan());
        }
        assert_eq!(StoredDtype::F8E4m3.not_finite(&[0x7e, 0xfe]), None);
        assert_eq!(StoredDtype::F8E4m3.not_finite(&[0x7e, 0xff]).unwrap().0, 1);
        assert_eq!(StoredDtype::F8E8m0.not_finite(&[0, 252]), None);
        assert_eq!(StoredDtype::F8E8m0.not_finite(&[253]), Some((0, f32::INFINITY)));
        assert!(StoredDtype::F8E8m0.not_finite(&[255]).unwrap().1.is_nan());
    }
}
