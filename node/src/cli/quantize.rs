//! `hanse quantize`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use hanse_model::StoredDtype;

use super::examples;

#[derive(Debug, Args)]
#[command(after_help = examples::QUANTIZE)]
pub(crate) struct QuantizeArgs {
    /// A Hugging Face model folder.
    #[arg(value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// How the routed experts are stored: q8_0 (34 bytes for 32 weights), q4_k (144 bytes for 256), f16 or bf16. Matrices whose rows are no
    /// multiples of 256 weights are in q8_0 instead of q4_k.
    #[arg(long, value_enum, value_name = "DTYPE")]
    pub(crate) to: QuantizedDtype,
    /// How the trunk's matrices are stored, save the routers'; as they are by default.
    #[arg(long, value_enum, value_name = "DTYPE")]
    pub(crate) trunk: Option<QuantizedDtype>,
    /// The folder to write. What an interrupted call has written there is kept.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// One JSON document on standard output and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What `hanse quantize` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum QuantizedDtype {
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_k")]
    Q4K,
    F16,
    Bf16,
}

impl From<QuantizedDtype> for StoredDtype {
    fn from(dtype: QuantizedDtype) -> Self {
        match dtype {
            QuantizedDtype::Q8_0 => Self::Q8_0,
            QuantizedDtype::Q4K => Self::Q4K,
            QuantizedDtype::F16 => Self::F16,
            QuantizedDtype::Bf16 => Self::Bf16,
        }
    }
}
