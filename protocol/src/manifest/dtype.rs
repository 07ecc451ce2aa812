//! How tensors are stored.

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorDtype {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
    /// GGML's blocks of 32 values in 34 bytes.
    Q8_0,
    /// GGML's blocks of 256 values in 144 bytes.
    Q4K,
    /// Floats of eight bits, whose scales are values of their own.
    F8E4m3,
    /// Floats of four bits, two to a byte, whose scales are values of their own.
    F4E2m1,
    /// Powers of two: such scales.
    F8E8m0,
}

impl TensorDtype {
    pub(super) const ALL: [Self; 8] =
        [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4K, Self::F8E4m3, Self::F4E2m1, Self::F8E8m0];

    /// Values of a block, and its bytes.
    fn block(self) -> (u64, u64) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::F8E4m3 | Self::F8E8m0 => (1, 1),
            Self::F4E2m1 => (2, 1),
        }
    }

    /// Bytes of so many values, which are whole blocks; saturates.
    pub(super) fn bytes(self, values: u64) -> u64 {
        let (block, bytes) = self.block();
        (values / block).saturating_mul(bytes)
    }

    /// Whether so many values are whole blocks.
    pub(super) fn fits(self, values: u64) -> bool {
        values.is_multiple_of(self.block().0)
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

    pub(super) fn code(self) -> u8 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 2,
            Self::Q8_0 => 3,
            Self::Q4K => 4,
            Self::F8E4m3 => 5,
            Self::F4E2m1 => 6,
            Self::F8E8m0 => 7,
        }
    }
}
