//! `hanse completions`: what a shell needs to complete commands and options.

use clap::CommandFactory;

use super::generate::show;
use crate::cli::{Cli, CompletionsArgs};

pub(crate) fn run(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "hanse", &mut script);
    show(&String::from_utf8(script)?)
}
