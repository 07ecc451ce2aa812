//! Number formats on the wire, and who adds the experts' rows up.

mod int8;
mod plain;

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

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
    /// Blocks of 32 values of a row: a bfloat16 scale, and whole numbers from -127 to 127 that are multiplied by it. 0.266 of the
    /// bytes of `F32`.
    Int8,
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
#[error("unknown wire dtype {0:?}, known are f32, f16, bf16, int8")]
pub struct UnknownDtype(String);

impl WireDtype {
    /// All formats, in the order of their wire codes.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Int8];

    /// Bytes that a row of `width` values takes; `usize::MAX` where that would be more.
    pub fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::F32 => width.saturating_mul(4),
            Self::F16 | Self::Bf16 => width.saturating_mul(2),
            Self::Int8 => width.saturating_add(width.div_ceil(int8::BLOCK).saturating_mul(2)),
        }
    }

    /// Who adds up when nothing else is asked for: the client for `f32`, which is there for exactness; the peer otherwise.
    pub fn default_combine(self) -> Combine {
        match self {
            Self::F32 => Combine::Client,
            Self::F16 | Self::Bf16 | Self::Int8 => Combine::Peer,
        }
    }

    /// The number that stands for this format on the wire.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 2,
            Self::Int8 => 3,
        }
    }

    /// The format a wire number stands for.
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.code() == code)
    }

    /// Appends `values`, rows of `width`, to `out` in this format. A row's bytes do not depend on the other rows.
    ///
    /// # Errors
    /// [`EncodeError`] names the first value that is not finite or that would round to infinity; `out` is then as it was.
    pub fn encode_into(self, values: &[f32], width: usize, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let start = out.len();
        let width = width.max(1);
        let bytes = self.row_bytes(width).saturating_mul(values.len() / width) + self.row_bytes(values.len() % width);
        out.resize(start + bytes, 0);
        let to = &mut out[start..];
        let fits = match self {
            Self::F32 => plain::encode_f32(values, to),
            Self::F16 => plain::encode_f16(values, to),
            Self::Bf16 => plain::encode_bf16(values, to),
            Self::Int8 => int8::encode(values, width, to),
        };
        if !fits {
            out.truncate(start);
            // The position is looked for only when there is something to report.
            let index = values.iter().position(|value| !self.can_carry(*value)).unwrap_or(0);
            return Err(EncodeError { index, value: values.get(index).copied().unwrap_or(f32::NAN), dtype: self });
        }
        Ok(())
    }

    /// Reads exactly `rows` rows of `width` numbers of this format.
    ///
    /// # Errors
    /// [`DecodeError::Length`] unless `bytes` holds exactly that many; [`DecodeError::NotFinite`] for a NaN or an infinity.
    pub fn decode(self, bytes: &[u8], rows: usize, width: usize) -> Result<Vec<f32>, DecodeError> {
        let values = rows.saturating_mul(width);
        if self.row_bytes(width).checked_mul(rows) != Some(bytes.len()) {
            return Err(DecodeError::Length { bytes: bytes.len(), values, dtype: self });
        }
        let mut out = vec![0.0f32; values];
        match self {
            Self::F32 => plain::decode_f32(bytes, &mut out),
            Self::F16 => plain::decode_f16(bytes, &mut out),
            Self::Bf16 => plain::decode_bf16(bytes, &mut out),
            Self::Int8 => int8::decode(bytes, width, &mut out),
        }
        // One pass without branches; the position is looked for only when there is something to report.
        if !plain::all_finite(&out) {
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
            Self::Int8 => int8::scale(value.abs()).is_some(),
        }
    }
}

impl fmt::Display for WireDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
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
