//! Options for drafts, which `generate`, `chat` and `gateway` share.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

#[derive(Debug, Args)]
pub(crate) struct DraftArgs {
    /// Whether tokens are drafted and verified, several in one pass: `auto` where that is faster, `mtp` the same and also with the
    /// multi-token-prediction head of the model folder (DeepSeek V3, GLM-4.5), whose experts are computed here, or `none`. No token
    /// changes.
    #[arg(long, value_enum, default_value_t = DraftKind::Auto, value_name = "KIND")]
    pub(crate) draft: DraftKind,
    /// Hold so much of the experts here, such as 2GiB, those that the model chooses most: the model drafts with them alone, and they
    /// are not asked of peers. From the model folder, or fetched.
    #[arg(long, value_name = "SIZE", conflicts_with = "local")]
    pub(crate) resident: Option<bytesize::ByteSize>,
    /// A folder with a small model of the same vocabulary, which drafts; all of it is computed here.
    #[arg(long, value_name = "DIR")]
    pub(crate) draft_model: Option<PathBuf>,
}

/// Whether tokens are drafted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DraftKind {
    Auto,
    Mtp,
    None,
}

impl DraftArgs {
    /// Whether tokens are drafted.
    pub(crate) fn drafts(&self) -> bool {
        self.draft != DraftKind::None
    }

    /// Whether the head that the checkpoint carries drafts too.
    pub(crate) fn uses_head(&self) -> bool {
        self.draft == DraftKind::Mtp
    }
}
