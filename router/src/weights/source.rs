//! Where blobs come from: one trait, one file for each kind of source.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use hanse_protocol::{Blob, Manifest};

/// What a blob is, for sources that find bytes by what they are and not by their hash.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum What {
    /// A small file of the model's folder.
    File(String),
    /// A tensor of the trunk.
    Trunk(String),
    /// A routed expert.
    Expert {
        /// Its layer.
        layer: u32,
        /// Its number in the layer.
        expert: u32,
    },
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(name) => write!(f, "file `{name}`"),
            Self::Trunk(name) => write!(f, "tensor `{name}`"),
            Self::Expert { layer, expert } => write!(f, "expert {expert} of layer {layer}"),
        }
    }
}

/// A blob that is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Item {
    /// What it is.
    pub what: What,
    /// Its hash and length.
    pub blob: Blob,
}

impl Item {
    /// What the manifest says of `what`; `None` if it does not list it.
    #[must_use]
    pub fn find(manifest: &Manifest, what: What) -> Option<Self> {
        let blob = match &what {
            What::File(name) => manifest.file_blob(name),
            What::Trunk(name) => manifest.trunk_blob(name),
            What::Expert { layer, expert } => manifest.expert_blob(*layer, *expert),
        }?;
        Some(Self { what, blob })
    }

    /// The small files and the trunk's tensors: what a client keeps.
    #[must_use]
    pub fn trunk_of(manifest: &Manifest) -> Vec<Self> {
        let file = |file: &hanse_protocol::ManifestFile| Self { what: What::File(file.name.clone()), blob: file.blob };
        let tensor =
            |tensor: &hanse_protocol::TrunkTensor| Self { what: What::Trunk(tensor.name.clone()), blob: tensor.blob() };
        manifest.files.iter().map(file).chain(manifest.trunk.iter().map(tensor)).collect()
    }
}

/// Why a source did not give what it was asked for.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// It does not have this blob. Ask another source.
    #[error("it does not have it")]
    NotHere,
    /// It asks for time.
    #[error("it is busy")]
    Busy {
        /// When it may be asked again.
        retry_after: Duration,
    },
    /// It failed. It may be asked again later.
    #[error("{0}")]
    Failed(String),
    /// It is of no use, now and later: it refused, or is something else than it should be.
    #[error("{0}")]
    Useless(String),
}

/// Something that can give bytes of blobs. What it gives is not believed.
pub trait Source: std::fmt::Debug + Send + Sync {
    /// Who it is, for people; also tells sources apart.
    fn name(&self) -> String;

    /// How many reads it should be given at a time.
    fn parallel(&self) -> usize;

    /// Exactly the bytes `range` of the item, which lie in one group of the blob.
    fn read<'a>(&'a self, item: &'a Item, range: Range<u64>) -> BoxFuture<'a, Result<Bytes, SourceError>>;

    /// The chaining values of the item's groups, from those who can have computed them.
    fn tree<'a>(&'a self, item: &'a Item) -> BoxFuture<'a, Result<Option<Bytes>, SourceError>>;
}
