//! Where things are kept on this machine.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// The model that comes with the source: in the folder the command runs in, else where it was built.
pub(crate) fn bundled_model() -> anyhow::Result<PathBuf> {
    let relative = Path::new("examples/models/tiny-moe");
    let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(|root| root.join(relative));
    std::iter::once(relative.to_path_buf())
        .chain(built_in)
        .find(|dir| dir.join("config.json").exists())
        .context("the bundled model examples/models/tiny-moe is not here: run in the source folder or give --model DIR")
}

/// The folder of the user's identity, by default.
pub(crate) fn data_dir() -> anyhow::Result<PathBuf> {
    let base = dirs::data_dir().context("the user has no data folder: give --data-dir DIR")?;
    Ok(base.join("hanse"))
}

/// The folder for what can be made again.
pub(crate) fn cache_dir() -> Option<PathBuf> {
    Some(dirs::cache_dir()?.join("hanse"))
}
