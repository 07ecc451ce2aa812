//! How GGUF files store values: one by one, or in blocks with scales.

use std::borrow::Cow;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use half::{bf16, f16};

use super::error::GgufError;
use crate::checkpoint::StoredDtype;

/// A way to store values.
#[derive(Debug, PartialEq)]
pub(super) struct BlockType {
    /// Its number in files.
    id: u32,
    pub(super) name: &'static str,
    /// Values of a block.
    pub(super) values: usize,
    /// Bytes of a block.
    pub(super) bytes: usize,
    pub(super) storage: Storage,
}

#[derive(Debug, PartialEq)]
pub(super) enum Storage {
    F32,
    F16,
    Bf16,
    /// Blocks that candle widens.
    Blocks(GgmlDType),
    /// 32 values of 4 bits that share a power of two. Source: OCP Microscaling Formats 1.0.
    Mxfp4,
}

const fn kind(id: u32, name: &'static str, values: usize, bytes: usize, storage: Storage) -> BlockType {
    BlockType { id, name, values, bytes, storage }
}

const TYPES: &[BlockType] = &[
    kind(0, "F32", 1, 4, Storage::F32),
    kind(1, "F16", 1, 2, Storage::F16),
    kind(2, "Q4_0", 32, 18, Storage::Blocks(GgmlDType::Q4_0)),
    kind(3, "Q4_1", 32, 20, Storage::Blocks(GgmlDType::Q4_1)),
    kind(6, "Q5_0", 32, 22, Storage::Blocks(GgmlDType::Q5_0)),
    kind(7, "Q5_1", 32, 24, Storage::Blocks(GgmlDType::Q5_1)),
    kind(8, "Q8_0", 32, 34, Storage::Blocks(GgmlDType::Q8_0)),
    kind(10, "Q2_K", 256, 84, Storage::Blocks(GgmlDType::Q2K)),
    kind(11, "Q3_K", 256, 110, Storage::Blocks(GgmlDType::Q3K)),
    kind(12, "Q4_K", 256, 144, Storage::Blocks(GgmlDType::Q4K)),
    kind(13, "Q5_K", 256, 176, Storage::Blocks(GgmlDType::Q5K)),
    kind(14, "Q6_K", 256, 210, Storage::Blocks(GgmlDType::Q6K)),
    kind(30, "BF16", 1, 2, Storage::Bf16),
    kind(39, "MXFP4", 32, 17, Storage::Mxfp4),
];

/// Types that exist and are not read here.
const OTHERS: &[(u32, &str)] = &[
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
];

/// Twice the values of 4-bit floats, by their bits.
const TWICE_MXFP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

impl BlockType {
    /// How model folders store the same blocks, which need not be widened then.
    pub(super) fn kept(&self) -> Option<StoredDtype> {
        match self.storage {
            Storage::Blocks(GgmlDType::Q8_0) => Some(StoredDtype::Q8_0),
            Storage::Blocks(GgmlDType::Q4K) => Some(StoredDtype::Q4K),
            _ => None,
        }
    }

    /// The type of this number; or why it cannot be read.
    pub(super) fn of(id: u32) -> Result<&'static Self, String> {
        TYPES.iter().find(|kind| kind.id == id).ok_or_else(|| {
            let known: Vec<&str> = TYPES.iter().map(|kind| kind.name).collect();
            let name =
                OTHERS.iter().find(|other| other.0 == id).map_or_else(|| id.to_string(), |other| other.1.to_owned());
            format!("it is stored as {name}; supported are {}", known.join(", "))
        })
    }

    /// Widens whole blocks. `bytes` is as many as a whole number of blocks has.
    pub(super) fn widen(&self, bytes: &[u8]) -> Result<Vec<f32>, GgufError> {
        Ok(match &self.storage {
            Storage::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Storage::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Storage::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Storage::Blocks(kind) => widen_blocks(*kind, bytes, bytes.len() / self.bytes * self.values)?,
            Storage::Mxfp4 => bytes.chunks_exact(self.bytes).flat_map(widen_mxfp4).collect(),
        })
    }
}

fn widen_blocks(kind: GgmlDType, bytes: &[u8], values: usize) -> Result<Vec<f32>, GgufError> {
    // Candle looks at them as numbers of 16 or 32 bits.
    const ALIGNMENT: usize = 8;
    let mut aligned = vec![0; bytes.len() + ALIGNMENT];
    let start = aligned.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
    let aligned = &mut aligned[start..start + bytes.len()];
    aligned.copy_from_slice(bytes);
    let storage = QStorage::from_data(Cow::Borrowed(&*aligned), &Device::Cpu, kind)?;
    Ok(QTensor::new(storage, values)?.dequantize(&Device::Cpu)?.to_vec1()?)
}

/// A byte e, for the factor 2^(e - 127), and 16 bytes whose lower halves are the first 16 values and whose upper halves the rest.
fn widen_mxfp4(block: &[u8]) -> Vec<f32> {
    let half_factor = f64::from(i32::from(block[0]) - 128).exp2() as f32;
    let value = |bits: u8| f32::from(TWICE_MXFP4[usize::from(bits)]) * half_factor;
    let (lower, upper) =
        (block[1..].iter().map(|byte| value(byte & 15)), block[1..].iter().map(|byte| value(byte >> 4)));
    lower.chain(upper).collect()
}
