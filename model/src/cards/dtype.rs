//! What the kernels read, and how much of it there is in a panel.

use super::panels::{OCTET, PANEL};
use crate::checkpoint::StoredDtype;

/// What there are kernels for, in the order of the kernels' sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Dtype {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4K,
    Fp8,
    Mxfp4,
}

impl From<StoredDtype> for Dtype {
    fn from(dtype: StoredDtype) -> Self {
        match dtype {
            // No matrix has the latter.
            StoredDtype::F32 | StoredDtype::F8E8m0 => Self::F32,
            StoredDtype::F16 => Self::F16,
            StoredDtype::Bf16 => Self::Bf16,
            StoredDtype::Q8_0 => Self::Q8_0,
            StoredDtype::Q4K => Self::Q4K,
            StoredDtype::F8E4m3 => Self::Fp8,
            StoredDtype::F4E2m1 => Self::Mxfp4,
        }
    }
}

impl Dtype {
    pub(super) const ALL: [Self; 7] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4K, Self::Fp8, Self::Mxfp4];

    /// As the kernels' names have it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
            Self::Fp8 => "fp8",
            Self::Mxfp4 => "mxfp4",
        }
    }

    /// Bytes of a panel's values of one octet, without their scales.
    pub(super) fn value_bytes(self) -> usize {
        let bits = match self {
            Self::F32 => 32,
            Self::F16 | Self::Bf16 => 16,
            Self::Q8_0 | Self::Fp8 => 8,
            Self::Q4K | Self::Mxfp4 => 4,
        };
        PANEL * OCTET * bits / 8
    }

    /// Bytes of a panel's scales of one octet.
    pub(super) fn scale_bytes(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 0,
            // An f16 for each 32 values of a column.
            Self::Q8_0 => PANEL * (OCTET / 32) * 2,
            // Half of the sixteen bytes of a block of 256 values of a column.
            Self::Q4K => PANEL * 16 / 2,
            // An f32 for each half of a half's columns, which are gate's and up's, in both halves the same.
            Self::Fp8 => 2 * 4,
            // A byte for each 32 values of a column.
            Self::Mxfp4 => PANEL * (OCTET / 32),
        }
    }
}
