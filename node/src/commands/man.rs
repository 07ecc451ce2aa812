//! `hanse man`: manual pages.

use anyhow::Context as _;
use clap::CommandFactory;
use clap_mangen::Man;

use super::generate::show;
use crate::cli::{Cli, ManArgs};
use crate::output::say;

pub(crate) fn run(args: &ManArgs) -> anyhow::Result<()> {
    let Some(dir) = &args.dir else {
        let mut page = Vec::new();
        Man::new(Cli::command()).render(&mut page)?;
        return show(&String::from_utf8(page)?);
    };
    let cannot = || format!("cannot write manual pages into {}", dir.display());
    std::fs::create_dir_all(dir).with_context(cannot)?;
    clap_mangen::generate_to(Cli::command(), dir).with_context(cannot)?;
    say!("manual pages are in {}: read them with `man -l {}`", dir.display(), dir.join("hanse.1").display());
    Ok(())
}
