//! How a volunteer stores the experts it computes with, and what clients think of experts that are stored in fewer bits than published.

use std::fmt;

/// How experts are stored. Ordered by how near they come to the same weights in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Floats of four bits, with a power of two for each 32.
    Mxfp4,
    /// Four bits, with a scale and a minimum for each 32.
    #[serde(rename = "q4_k")]
    Q4K,
    /// Floats of eight bits, with a scale for each 128 rows and 128 columns.
    Fp8,
    /// Eight bits, with a scale for each 32.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// The upper half of an f32.
    Bf16,
    /// IEEE 754 binary16.
    F16,
    /// IEEE 754 binary32.
    F32,
}

impl Precision {
    /// Each, at the place of its code in adverts.
    pub const ALL: [Self; 7] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4K, Self::Fp8, Self::Mxfp4];

    /// Its byte in adverts.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 2,
            Self::Q8_0 => 3,
            Self::Q4K => 4,
            Self::Fp8 => 5,
            Self::Mxfp4 => 6,
        }
    }

    /// The reverse of [`Self::code`].
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// Whether a weight has eight bits or more.
    #[must_use]
    pub fn has_eight_bits(self) -> bool {
        self >= Self::Fp8
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
            Self::Fp8 => "fp8",
            Self::Mxfp4 => "mxfp4",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_told_apart_and_names_are_those_of_reports() {
        for precision in Precision::ALL {
            assert_eq!(Precision::from_code(precision.code()), Some(precision));
            assert_eq!(serde_json::to_value(precision).unwrap(), precision.to_string());
        }
        assert_eq!(Precision::from_code(7), None);
        let eight: Vec<Precision> = Precision::ALL.into_iter().filter(|precision| precision.has_eight_bits()).collect();
        assert_eq!(eight, [Precision::F32, Precision::F16, Precision::Bf16, Precision::Q8_0, Precision::Fp8]);
    }
}
