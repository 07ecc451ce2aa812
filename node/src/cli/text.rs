//! Commands that compute text: the demonstration, `generate`, `chat` and `score`.

use std::path::PathBuf;

use clap::Args;

use super::{ClientArgs, DraftArgs, examples};

/// How tokens are drawn. What is not given is taken from the model's generation_config.json.
#[derive(Debug, Args)]
pub(crate) struct SamplingArgs {
    /// 0 always takes the likeliest token.
    #[arg(long, value_name = "T", allow_negative_numbers = true, value_parser = temperature)]
    pub(crate) temperature: Option<f32>,
    /// Draw among the K likeliest tokens only.
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Draw among the likeliest tokens that together have probability P.
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = probability)]
    pub(crate) top_p: Option<f32>,
    /// The same seed gives the same text.
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    pub(crate) seed: Option<u64>,
}

#[derive(Debug, Args)]
#[command(after_help = examples::DEMO)]
pub(crate) struct DemoArgs {
    /// A model folder; by default the small model that comes with the source.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// The text to continue.
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// How many volunteer processes to start.
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=64))]
    pub(crate) nodes: u16,
    /// How many volunteers host each expert.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=63))]
    pub(crate) replicas: u16,
    /// Kill one volunteer in the middle of the answer.
    #[arg(long)]
    pub(crate) kill: bool,
    /// How many tokens to generate.
    #[arg(long, default_value_t = 96, value_name = "N")]
    pub(crate) max_tokens: usize,
    /// One JSON document on standard output and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("text").required(true).args(["prompt", "prompt_ids"])))]
#[command(after_help = examples::GENERATE)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    #[command(flatten)]
    pub(crate) draft: DraftArgs,
    /// The text to continue.
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// The prompt as token ids, such as 1,2,3.
    #[arg(long, value_name = "IDS", value_delimiter = ',', value_parser = token_id)]
    pub(crate) prompt_ids: Option<Vec<u32>>,
    /// The most tokens to add.
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub(crate) max_tokens: usize,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// Stop before this text; may be given more than once.
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Go on after an end-of-sequence token.
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// One JSON document on standard output and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = examples::CHAT)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    #[command(flatten)]
    pub(crate) draft: DraftArgs,
    /// What the model is told before the conversation.
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// The most tokens of one answer.
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub(crate) max_tokens: usize,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("text").required(true).args(["prompt", "prompt_ids", "file"])))]
#[command(after_help = examples::SCORE)]
pub(crate) struct ScoreArgs {
    /// Without --bootstrap the experts are computed in this process.
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    /// The text.
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// The text as token ids, such as 1,2,3.
    #[arg(long, value_name = "IDS", value_delimiter = ',', value_parser = token_id)]
    pub(crate) prompt_ids: Option<Vec<u32>>,
    /// A file with the text.
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Write the logits at every position to this safetensors file: tensor `logits`, [tokens, vocab], f32.
    #[arg(long, value_name = "FILE")]
    pub(crate) logits_out: Option<PathBuf>,
    /// Compare with the logits that an earlier call has written for the same text: KL divergence of the next token's distribution from
    /// theirs, and how often the likeliest token is the same.
    #[arg(long, value_name = "FILE")]
    pub(crate) compare: Option<PathBuf>,
    /// One JSON document on standard output and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

fn token_id(text: &str) -> Result<u32, String> {
    text.trim().parse().map_err(|_| "it is not a token id".to_owned())
}

fn temperature(text: &str) -> Result<f32, String> {
    let valid = |t: &f32| t.is_finite() && *t >= 0.0;
    text.parse().ok().filter(valid).ok_or_else(|| "it is not a number of at least 0".to_owned())
}

fn probability(text: &str) -> Result<f32, String> {
    let valid = |p: &f32| (0.0..=1.0).contains(p);
    text.parse().ok().filter(valid).ok_or_else(|| "it is not a number from 0 to 1".to_owned())
}
