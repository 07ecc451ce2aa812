//! The command lines of what makes one model folder of another, or of a file: `hanse carve`, `hanse import`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::examples;

#[derive(Debug, Args)]
#[command(after_help = examples::CARVE)]
pub(crate) struct CarveArgs {
    /// The folder of a dense model.
    #[arg(value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// How many slices each feed-forward layer becomes; must divide its width.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(crate) slices: u16,
    /// The new folder; must not exist.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// One JSON document on standard output and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = examples::IMPORT)]
pub(crate) struct ImportArgs {
    /// A GGUF file; of a model in several files the first, named ...-00001-of-0000N.gguf.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// The new folder; must not exist.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// What tensors become that the file holds quantised; without it matrices in Q8_0 and Q4_K and gpt-oss's experts in MXFP4 stay as
    /// they are, and others become f16. Those in f32, f16 and bf16 always stay as they are.
    #[arg(long, value_enum, value_name = "DTYPE")]
    pub(crate) to: Option<FloatDtype>,
    /// One JSON document on standard output and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How values are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FloatDtype {
    /// Exactly what the blocks stand for.
    F32,
    /// Half the bytes, 11 bits of precision.
    F16,
    /// Half the bytes, 8 bits of precision and the range of f32.
    Bf16,
}
