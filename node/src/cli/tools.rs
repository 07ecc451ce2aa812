//! The command lines of what looks after the program and the machine: `hanse doctor`, `completions`, `man`.

use std::path::PathBuf;

use clap::Args;
use clap_complete::Shell;
use hanse_protocol::Multiaddr;

use super::{CacheArgs, JoinArgs, examples};
use crate::model::ModelRef;

#[derive(Debug, Args)]
#[command(after_help = examples::DOCTOR)]
pub(crate) struct DoctorArgs {
    /// A model that is to be used here: a folder, or what else `hanse node --model` understands.
    #[arg(long, value_name = "DIR|ID|hf:REPO")]
    pub(crate) model: Option<ModelRef>,
    #[command(flatten)]
    pub(crate) join: JoinArgs,
    /// Control-plane address that a node is to listen on; may be given more than once.
    #[arg(long, value_name = "ADDR", num_args = 1.., default_values = super::LISTEN)]
    pub(crate) listen: Vec<Multiaddr>,
    /// Do not ask the home router for a port (UPnP).
    #[arg(long)]
    pub(crate) no_upnp: bool,
    /// Where the identity key is kept; by default hanse in the user's data folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// How much a node is to host, such as 6GiB: whether the disk has room for it.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<bytesize::ByteSize>,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    /// One JSON document on standard output and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = examples::COMPLETIONS)]
pub(crate) struct CompletionsArgs {
    /// The shell.
    #[arg(value_name = "SHELL")]
    pub(crate) shell: Shell,
}

#[derive(Debug, Args)]
#[command(after_help = examples::MAN)]
pub(crate) struct ManArgs {
    /// Write a page for each command into this folder; without it, the program's page goes to standard output.
    #[arg(value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}
