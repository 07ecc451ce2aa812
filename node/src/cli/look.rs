//! Commands that look: at a network, at a model folder.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use super::{JoinArgs, examples};

#[derive(Debug, Args)]
#[command(after_help = examples::STATUS)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) join: JoinArgs,
    /// A model folder or a model id; needed only when the network hosts several models.
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: Option<String>,
    /// Look again and again, every two seconds or as many as given.
    #[arg(long, value_name = "SECONDS", conflicts_with = "web", num_args = 0..=1, default_missing_value = "2", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) watch: Option<u64>,
    /// Show the network on a web page, live, until ctrl-C; by default at 127.0.0.1:8081.
    #[arg(long, value_name = "IP:PORT", num_args = 0..=1, default_missing_value = "127.0.0.1:8081")]
    pub(crate) web: Option<SocketAddr>,
    /// One JSON document on standard output and nothing else; with --watch, a line for each look; with --web, one line when the page is
    /// served.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = examples::INSPECT)]
pub(crate) struct InspectArgs {
    /// A Hugging Face model folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// One JSON document on standard output and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = examples::MANIFEST)]
pub(crate) struct ManifestArgs {
    /// A Hugging Face model folder.
    #[arg(value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Where to write it; by default hanse-manifest.json in the folder.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Where the key is kept that signs it; by default hanse in the user's data folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// One JSON document on standard output and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}
