//! `hanse pause`, `hanse resume` and `hanse ready`: tell or ask the node that runs on this machine.

use anyhow::{Context as _, bail};
use hanse_node::owner::control::{Command, ask};

use crate::cli::ControlArgs;
use crate::output::say;
use crate::paths;

pub(crate) async fn run(args: ControlArgs, command: Command) -> anyhow::Result<()> {
    let data_dir = args.data_dir.map_or_else(paths::data_dir, Ok)?;
    let answer = ask(&data_dir, command)
        .await
        .with_context(|| format!("no node answers in {}: name its folder with --data-dir", data_dir.display()))?;
    if let Some(reason) = answer.strip_prefix("error: ") {
        bail!("{reason}");
    }
    say!("{answer}");
    Ok(())
}
