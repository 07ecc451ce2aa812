//! Number formats on the wire, and who adds the experts' rows up.

use std::fmt;
use std::str::FromStr;

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};

/// Values converted at a time, on the stack.
const BLOCK: usize = 256;

/// How hidden states are written on the wire: always little-endian, row after row, without padding.
///
/// Every value on the wire is finite. Encoding a NaN, an infinity, or a value too large for the format is an error the sender
/// sees; a body that holds one is an error the receiver sees. Silently sending an infinity would not be exact, and one NaN from
/// a peer would spread over everything the client computes afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WireDtype {
    /// IEEE 754 binary32: the values themselves, for conformance.
    F32,
    /// IEEE 754 binary16, rounded to nearest even.
    F16,
    /// bfloat16, rounded to nearest even.
    Bf16,
}

/// Who multiplies the experts' rows by the gate weights and adds them up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Combine {
    /// The peer: one weighted sum per row. Fewest bytes, but the last bits depend on who hosts what.
    Peer,
    /// The client: the peer returns each expert's row, unweighted. The same bits whatever the placement.
    Client,
}

/// A value that the wire format cannot hold. The sender's fault: send with a wider dtype.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("value {index} is {value}, which {dtype} cannot carry")]
pub struct EncodeError {
    /// Position in the slice to be encoded.
    pub index: usize,
    /// The value.
    pub value: f32,
    /// The format asked for.
    pub dtype: WireDtype,
}

/// A body that is not what its header promised. The sender's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The length is not that of the promised number of values.
    #[error("{values} values of {dtype} do not fill {bytes} bytes")]
    Length {
        /// Bytes found.
        bytes: usize,
        /// Values promised.
        values: usize,
        /// The format.
        dtype: WireDtype,
    },
    /// A NaN or an infinity.
    #[error("value {index} is not a finite number")]
    NotFinite {
        /// Position of the first such value.
        index: usize,
    },
}

/// A name that is no wire dtype.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown wire dtype {0:?}, known are f32, f16, bf16")]
pub struct UnknownDtype(String);

impl WireDtype {
    /// All formats, in the order of their wire codes.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes one value takes.
    pub fn bytes_per_value(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Who adds up when nothing else is asked for: the client for `f32`, which is there for exactness; the peer otherwise.
    pub fn default_combine(self) -> Combine {
        match self {
            Self::F32 => Combine::Client,
            Self::F16 | Self::Bf16 => Combine::Peer,
        }
    }

    /// The number that stands for this format on the wire.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 2,
        }
    }

    /// The format a wire number stands for.
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.code() == code)
    }

    /// Appends `values` to `out` in this format.
    ///
    /// # Errors
    /// [`EncodeError`] names the first value that is not finite or that would round to infinity; `out` is then as it was.
    pub fn encode_into(self, values: &[f32], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let start = out.len();
        out.reserve(values.len() * self.bytes_per_value());
        for (block_index, block) in values.chunks(BLOCK).enumerate() {
            let finite = match self {
                Self::F32 => encode_f32(block, out),
                Self::F16 => encode_f16(block, out),
                Self::Bf16 => encode_bf16(block, out),
            };
            if !finite {
                out.truncate(start);
                let (offset, value) =
                    block.iter().enumerate().find(|(_, v)| !self.can_carry(**v)).unwrap_or((0, &f32::NAN));
                return Err(EncodeError { index: block_index * BLOCK + offset, value: *value, dtype: self });
            }
        }
        Ok(())
    }

    /// Reads exactly `values` numbers of this format.
    ///
    /// # Errors
    /// [`DecodeError::Length`] unless `bytes` holds exactly that many; [`DecodeError::NotFinite`] for a NaN or an infinity.
    pub fn decode(self, bytes: &[u8], values: usize) -> Result<Vec<f32>, DecodeError> {
        if values.checked_mul(self.bytes_per_value()) != Some(bytes.len()) {
            return Err(DecodeError::Length { bytes: bytes.len(), values, dtype: self });
        }
        let mut out = vec![0.0f32; values];
        for (from, to) in bytes.chunks(BLOCK * self.bytes_per_value()).zip(out.chunks_mut(BLOCK)) {
            match self {
                Self::F32 => decode_f32(from, to),
                Self::F16 => decode_half(from, to, |bits, to| bits.reinterpret_cast::<f16>().convert_to_f32_slice(to)),
                Self::Bf16 => {
                    decode_half(from, to, |bits, to| bits.reinterpret_cast::<bf16>().convert_to_f32_slice(to))
                }
            }
        }
        // One pass without branches; the position is looked for only when there is something to report.
        if !all_finite(&out) {
            let index = out.iter().position(|value| !value.is_finite()).unwrap_or(0);
            return Err(DecodeError::NotFinite { index });
        }
        Ok(out)
    }

    fn can_carry(self, value: f32) -> bool {
        match self {
            Self::F32 => value.is_finite(),
            Self::F16 => f16::from_f32(value).is_finite(),
            Self::Bf16 => bf16::from_f32(value).is_finite(),
        }
    }
}

fn all_finite(values: &[f32]) -> bool {
    // A float is finite unless all exponent bits are set.
    values.iter().fold(true, |finite, value| finite & (value.to_bits() & 0x7f80_0000 != 0x7f80_0000))
}

fn encode_f32(block: &[f32], out: &mut Vec<u8>) -> bool {
    let mut bytes = [0u8; BLOCK * 4];
    for (to, value) in bytes.chunks_exact_mut(4).zip(block) {
        to.copy_from_slice(&value.to_le_bytes());
    }
    out.extend_from_slice(&bytes[..block.len() * 4]);
    all_finite(block)
}

fn encode_f16(block: &[f32], out: &mut Vec<u8>) -> bool {
    let mut converted = [f16::ZERO; BLOCK];
    let converted = &mut converted[..block.len()];
    converted.convert_from_f32_slice(block);
    extend_bits(converted.reinterpret_cast(), out);
    converted.iter().fold(true, |finite, value| finite & (value.to_bits() & 0x7c00 != 0x7c00))
}

fn encode_bf16(block: &[f32], out: &mut Vec<u8>) -> bool {
    let mut converted = [bf16::ZERO; BLOCK];
    let converted = &mut converted[..block.len()];
    converted.convert_from_f32_slice(block);
    extend_bits(converted.reinterpret_cast(), out);
    converted.iter().fold(true, |finite, value| finite & (value.to_bits() & 0x7f80 != 0x7f80))
}

fn extend_bits(bits: &[u16], out: &mut Vec<u8>) {
    let mut bytes = [0u8; BLOCK * 2];
    for (to, bits) in bytes.chunks_exact_mut(2).zip(bits) {
        to.copy_from_slice(&bits.to_le_bytes());
    }
    out.extend_from_slice(&bytes[..bits.len() * 2]);
}

fn decode_f32(bytes: &[u8], out: &mut [f32]) {
    for (from, to) in bytes.as_chunks::<4>().0.iter().zip(out) {
        *to = f32::from_le_bytes(*from);
    }
}

fn decode_half(bytes: &[u8], out: &mut [f32], convert: impl Fn(&[u16], &mut [f32])) {
    let mut bits = [0u16; BLOCK];
    for (from, to) in bytes.as_chunks::<2>().0.iter().zip(&mut bits) {
        *to = u16::from_le_bytes(*from);
    }
    convert(&bits[..out.len()], out);
}

impl fmt::Display for WireDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

impl FromStr for WireDtype {
    type Err = UnknownDtype;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|dtype| dtype.to_string() == name)
            .ok_or_else(|| UnknownDtype(name.chars().take(40).collect()))
    }
}
