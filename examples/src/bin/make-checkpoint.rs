//! Writes a checkpoint with random weights, of any family and size: for measuring, and for trying a network.
//!
//! ```text
//! cargo run --release -p hanse-examples --bin make-checkpoint -- --out /tmp/synthetic
//! cargo run --release -p hanse-examples --bin make-checkpoint -- --family mixtral --hidden 512 --experts 8 --top-k 2 \
//!     --layers 8 --intermediate 1024 --heads 8 --kv-heads 2 --head-dim 64 --shards 3 --out /tmp/small-mixtral
//! ```
//!
//! Without options it is a qwen3_moe of 2048 hidden, 64 experts, top-8 and 4 layers in bf16: 2.7 GB.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use hanse_examples::random_checkpoint::{Output, Shape, make};
use indicatif::{ProgressBar, ProgressStyle};
use safetensors::Dtype;

/// Write a checkpoint with random weights.
#[derive(Debug, Parser)]
struct Args {
    /// The model's family, such as mixtral or qwen3_moe; an unknown one is answered with the list.
    #[arg(long, default_value = "qwen3_moe")]
    family: String,
    /// Length of a row of hidden states.
    #[arg(long, default_value_t = 2048)]
    hidden: usize,
    /// Number of layers, each with experts.
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Routed experts of a layer.
    #[arg(long, default_value_t = 64)]
    experts: usize,
    /// Routed experts that a token uses.
    #[arg(long, default_value_t = 8)]
    top_k: usize,
    /// Width of one expert.
    #[arg(long, default_value_t = 768)]
    intermediate: usize,
    /// Width of the shared expert, in families that have one; by default as one routed expert.
    #[arg(long)]
    shared_intermediate: Option<usize>,
    /// Query heads.
    #[arg(long, default_value_t = 32)]
    heads: usize,
    /// Key and value heads.
    #[arg(long, default_value_t = 4)]
    kv_heads: usize,
    /// Values of one head.
    #[arg(long, default_value_t = 128)]
    head_dim: usize,
    /// Number of tokens in the vocabulary.
    #[arg(long, default_value_t = 32_000)]
    vocab: usize,
    /// Longest sequence, in tokens.
    #[arg(long, default_value_t = 4096)]
    positions: usize,
    /// Use the embedding as LM head.
    #[arg(long)]
    tied: bool,
    /// How weights are stored.
    #[arg(long, value_enum, default_value_t = Stored::Bf16)]
    dtype: Stored,
    /// The same seed and sizes give the same weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Number of files to cut the weights into.
    #[arg(long, default_value_t = 1)]
    shards: usize,
    /// A model folder whose tokenizer is copied; its tokens must be in the vocabulary.
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// The folder to write, which must be empty or absent.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Stored {
    F32,
    F16,
    Bf16,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let shape = Shape {
        family: args.family,
        hidden: args.hidden,
        layers: args.layers,
        experts: args.experts,
        top_k: args.top_k,
        intermediate: args.intermediate,
        shared_intermediate: args.shared_intermediate.unwrap_or(args.intermediate),
        heads: args.heads,
        kv_heads: args.kv_heads,
        head_dim: args.head_dim,
        vocab: args.vocab,
        positions: args.positions,
        tied: args.tied,
    };
    let dtype = match args.dtype {
        Stored::F32 => Dtype::F32,
        Stored::F16 => Dtype::F16,
        Stored::Bf16 => Dtype::BF16,
    };
    let output = Output { dtype, seed: args.seed, shards: args.shards, tokenizer: args.tokenizer };
    // Drawn on standard error, and only if that is a terminal.
    let bar =
        ProgressBar::new(0).with_style(ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {eta} left")?);
    let mut written = 0;
    make(&shape, &output, &args.out, |done, total| {
        written = total;
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    println!("{}: {} with {written} bytes of weights", args.out.display(), shape.family);
    Ok(())
}
