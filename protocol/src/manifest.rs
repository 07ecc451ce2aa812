//! Manifests: what a model consists of, by content hash.

mod dtype;
mod encoding;
mod json;

use std::collections::BTreeSet;

use libp2p::PeerId;
use libp2p::identity::{PublicKey, ed25519};

use crate::{BlobHash, Identity, ModelId, verify_signature};

pub use dtype::TensorDtype;
pub use json::{Locations, Place};

/// What signatures under manifests are for.
const DOMAIN: &str = "hanse/manifest/1";
/// Public key and signature, before the manifest itself.
const SIGNED_PREFIX: usize = 32 + 64;

/// The file of a model folder that holds its manifest.
pub const MANIFEST_FILE: &str = "hanse-manifest.json";
/// Bytes of a manifest, encoded or as JSON.
pub const MAX_MANIFEST_BYTES: usize = 32 << 20;
/// Bytes of `config.json` in a manifest.
pub const MAX_CONFIG_BYTES: usize = 1 << 20;
/// Small files in a manifest.
pub const MAX_FILES: usize = 64;
/// Bytes of the name of a file or of a tensor.
pub(crate) const MAX_NAME_BYTES: usize = 256;
/// Tensors of the trunk.
pub const MAX_TRUNK_TENSORS: usize = 65_536;
/// Dimensions of a tensor.
pub(crate) const MAX_DIMENSIONS: usize = 8;
/// Runs of values in an expert.
pub(crate) const MAX_EXPERT_RUNS: usize = 16;
/// Bytes of one blob.
pub const MAX_BLOB_BYTES: u64 = 1 << 40;

/// A blob: so many bytes with this hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Blob {
    /// Its hash.
    pub hash: BlobHash,
    /// Its length.
    pub bytes: u64,
}

/// A small file that belongs to the model, such as `tokenizer.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestFile {
    /// Its name in the model's folder.
    pub name: String,
    /// Its content.
    pub blob: Blob,
}

/// A tensor of the trunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrunkTensor {
    /// Its name.
    pub name: String,
    /// How it is stored.
    pub dtype: TensorDtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// The hash of its bytes.
    pub hash: BlobHash,
}

/// The routed experts of one layer. An expert's bytes are its runs, one after another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertLayer {
    /// The layer, counted from 0 over all layers.
    pub layer: u32,
    /// What an expert consists of, in the order of its family: gate_proj, up_proj and down_proj in most.
    pub runs: Vec<ExpertRun>,
    /// The hash of each expert's bytes.
    pub hashes: Vec<BlobHash>,
}

/// Values of an expert that lie side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertRun {
    /// How they are stored.
    pub dtype: TensorDtype,
    /// How many.
    pub values: u64,
}

impl ExpertRun {
    /// Bytes. Saturates: a manifest that has not been checked may say anything.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(self.values)
    }
}

/// What a model consists of. How the weights are cut into files is not part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The family's name: `model_type` of `config.json`.
    pub family: String,
    /// `config.json`, byte for byte.
    pub config: String,
    /// The small files, in the order of their names.
    pub files: Vec<ManifestFile>,
    /// Values in a hidden state.
    pub hidden_size: u32,
    /// The trunk's tensors, in the order of their names.
    pub trunk: Vec<TrunkTensor>,
    /// The layers that have routed experts, ascending.
    pub experts: Vec<ExpertLayer>,
}

/// A manifest with its publisher's signature, which has been verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedManifest {
    manifest: Manifest,
    id: ModelId,
    public_key: [u8; 32],
    signature: [u8; 64],
}

/// Why a manifest cannot be made or is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Longer than any manifest.
    #[error("a manifest of {0} bytes, more than the {MAX_MANIFEST_BYTES} allowed")]
    TooLong(usize),
    /// It ends too early.
    #[error("the manifest ends too early")]
    Truncated,
    /// It goes on after its end.
    #[error("{0} bytes after the end of the manifest")]
    TrailingBytes(usize),
    /// Another encoding of manifests.
    #[error("manifest format {0} is not known")]
    Format(u64),
    /// The JSON cannot be read.
    #[error("the manifest is not the JSON that it should be: {0}")]
    Json(String),
    /// The signature is not the publisher's over this content: it was changed after it was signed.
    #[error("the manifest's signature is wrong: it is not what its publisher signed")]
    Signature,
    /// It is the manifest of another model.
    #[error("the manifest is that of model {found}, not of {expected}")]
    OtherModel {
        /// The model asked for.
        expected: ModelId,
        /// The model that it describes.
        found: ModelId,
    },
    /// A rule is broken.
    #[error("the manifest's {what} {problem}")]
    Invalid {
        /// Of what.
        what: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl ManifestError {
    fn invalid(what: impl Into<String>, problem: &'static str) -> Self {
        Self::Invalid { what: what.into(), problem }
    }
}

impl TrunkTensor {
    /// Its content. The manifest it is from has been checked; one that has not may give a wrong length.
    #[must_use]
    pub fn blob(&self) -> Blob {
        let (row, rows) = self.shape.split_last().map_or((1, &[][..]), |(row, rows)| (*row, rows));
        let bytes = rows.iter().fold(self.dtype.bytes(row), |bytes, size| bytes.saturating_mul(*size));
        Blob { hash: self.hash, bytes }
    }
}

impl ExpertLayer {
    /// Bytes of one expert.
    #[must_use]
    pub fn expert_bytes(&self) -> u64 {
        self.runs.iter().map(ExpertRun::bytes).fold(0, u64::saturating_add)
    }
}

impl Manifest {
    /// The model's id: BLAKE3 of the encoded manifest, in key derivation mode with the context `hanse/manifest/1`.
    #[must_use]
    pub fn id(&self) -> ModelId {
        id_of(&encoding::encode(self))
    }

    /// The content of a trunk tensor.
    #[must_use]
    pub fn trunk_blob(&self, name: &str) -> Option<Blob> {
        let at = self.trunk.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()?;
        self.trunk.get(at).map(TrunkTensor::blob)
    }

    /// The content of an expert.
    #[must_use]
    pub fn expert_blob(&self, layer: u32, expert: u32) -> Option<Blob> {
        let at = self.experts.binary_search_by_key(&layer, |layer| layer.layer).ok()?;
        let layer = self.experts.get(at)?;
        let hash = *layer.hashes.get(expert as usize)?;
        Some(Blob { hash, bytes: layer.expert_bytes() })
    }

    /// The content of a small file.
    #[must_use]
    pub fn file_blob(&self, name: &str) -> Option<Blob> {
        self.files.iter().find(|file| file.name == name).map(|file| file.blob)
    }

    /// Bytes of all trunk tensors.
    #[must_use]
    pub fn trunk_bytes(&self) -> u64 {
        self.trunk.iter().map(|tensor| tensor.blob().bytes).fold(0, u64::saturating_add)
    }

    /// Checks every rule: what comes from a file or a stranger is a manifest only after this.
    fn check(&self) -> Result<(), ManifestError> {
        let name_ok = |name: &str| !name.is_empty() && name.len() <= MAX_NAME_BYTES;
        if !name_ok(&self.family) {
            return Err(ManifestError::invalid("family", "is no name"));
        }
        if self.config.len() > MAX_CONFIG_BYTES {
            return Err(ManifestError::invalid("config.json", "is too long"));
        }
        if self.files.len() > MAX_FILES {
            return Err(ManifestError::invalid("list of files", "is too long"));
        }
        if self.hidden_size == 0 {
            return Err(ManifestError::invalid("hidden size", "is 0"));
        }
        ascending(self.files.iter().map(|file| file.name.as_str()), "list of files")?;
        for ManifestFile { name, blob } in &self.files {
            // A name with a directory in it would be written outside the model's folder.
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            if !name_ok(name) || name.starts_with('.') || !name.chars().all(plain) {
                return Err(ManifestError::invalid(format!("file {name:?}"), "has no plain name"));
            }
            blob.check(|| format!("file {name:?}"))?;
        }
        if self.trunk.len() > MAX_TRUNK_TENSORS {
            return Err(ManifestError::invalid("list of tensors", "is too long"));
        }
        ascending(self.trunk.iter().map(|tensor| tensor.name.as_str()), "list of tensors")?;
        for tensor in &self.trunk {
            let what = || format!("tensor {:?}", tensor.name);
            if !name_ok(&tensor.name) || tensor.shape.is_empty() || tensor.shape.len() > MAX_DIMENSIONS {
                return Err(ManifestError::invalid(what(), "has no proper name or shape"));
            }
            if !tensor.shape.last().is_some_and(|row| tensor.dtype.fits(*row)) {
                return Err(ManifestError::invalid(what(), "has rows that are no whole blocks"));
            }
            tensor.blob().check(what)?;
        }
        ascending(self.experts.iter().map(|layer| layer.layer), "list of layers")?;
        for layer in &self.experts {
            let what = || format!("layer {}", layer.layer);
            if layer.layer >= crate::MAX_LAYERS || layer.hashes.len() > crate::MAX_EXPERTS as usize {
                return Err(ManifestError::invalid(what(), "has too high a number or too many experts"));
            }
            if layer.runs.len() > MAX_EXPERT_RUNS || layer.runs.iter().any(|run| run.values == 0) {
                return Err(ManifestError::invalid(what(), "has experts of too many or empty runs"));
            }
            if layer.runs.iter().any(|run| !run.dtype.fits(run.values)) {
                return Err(ManifestError::invalid(what(), "has experts of parts of blocks"));
            }
            if layer.hashes.is_empty() {
                return Err(ManifestError::invalid(what(), "has no experts"));
            }
            Blob { hash: BlobHash([0; 32]), bytes: layer.expert_bytes() }.check(what)?;
        }
        Ok(())
    }
}

impl Blob {
    fn check(&self, what: impl Fn() -> String) -> Result<(), ManifestError> {
        if (1..=MAX_BLOB_BYTES).contains(&self.bytes) {
            return Ok(());
        }
        Err(ManifestError::invalid(what(), "has an impossible size"))
    }
}

fn ascending<T: Ord>(mut items: impl Iterator<Item = T>, what: &'static str) -> Result<(), ManifestError> {
    let Some(mut last) = items.next() else { return Ok(()) };
    for item in items {
        if item <= last {
            return Err(ManifestError::invalid(what, "is not in order, or has something twice"));
        }
        last = item;
    }
    Ok(())
}

fn id_of(encoded: &[u8]) -> ModelId {
    ModelId(blake3::derive_key(DOMAIN, encoded))
}

impl SignedManifest {
    /// Signs in the name of `identity`.
    ///
    /// # Errors
    /// A manifest that others would refuse is not signed.
    pub fn sign(manifest: Manifest, identity: &Identity) -> Result<Self, ManifestError> {
        manifest.check()?;
        let encoded = encoding::encode(&manifest);
        check_length(SIGNED_PREFIX + encoded.len())?;
        let id = id_of(&encoded);
        let signature = identity.sign(DOMAIN, &id.0).to_bytes();
        Ok(Self { manifest, id, public_key: identity.public_key(), signature })
    }

    fn verified(manifest: Manifest, public_key: [u8; 32], signature: [u8; 64]) -> Result<Self, ManifestError> {
        manifest.check()?;
        let id = manifest.id();
        if !verify_signature(&public_key, DOMAIN, &id.0, &signature) {
            return Err(ManifestError::Signature);
        }
        Ok(Self { manifest, id, public_key, signature })
    }

    /// What the model consists of.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The model's id.
    #[must_use]
    pub fn id(&self) -> ModelId {
        self.id
    }

    /// Who signed it; `None` for a key that is no peer's, which cannot have signed.
    #[must_use]
    pub fn publisher(&self) -> Option<PeerId> {
        let key = ed25519::PublicKey::try_from_bytes(&self.public_key).ok()?;
        Some(PublicKey::from(key).to_peer_id())
    }

    /// As it goes over the wire: 32 bytes public key, 64 bytes signature, the manifest.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.public_key);
        out.extend(self.signature);
        out.extend(encoding::encode(&self.manifest));
        out
    }

    /// Reads and verifies.
    ///
    /// # Errors
    /// [`ManifestError`], as its variants say.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        check_length(bytes.len())?;
        let (public_key, rest) = bytes.split_first_chunk().ok_or(ManifestError::Truncated)?;
        let (signature, rest) = rest.split_first_chunk().ok_or(ManifestError::Truncated)?;
        Self::verified(encoding::decode(rest)?, *public_key, *signature)
    }

    /// As [`MANIFEST_FILE`] holds it, with where the parts lie in the folder's files.
    #[must_use]
    pub fn to_json(&self, locations: &Locations) -> String {
        json::write(self, locations)
    }

    /// Reads and verifies the text of a [`MANIFEST_FILE`]. Locations are not signed: bytes found there must be compared
    /// with their hashes.
    ///
    /// # Errors
    /// [`ManifestError`], as its variants say.
    pub fn from_json(text: &str) -> Result<(Self, Locations), ManifestError> {
        json::read(text)
    }

    /// Every hash that the manifest lists, each once.
    #[must_use]
    pub fn hashes(&self) -> BTreeSet<BlobHash> {
        let files = self.manifest.files.iter().map(|file| file.blob.hash);
        let trunk = self.manifest.trunk.iter().map(|tensor| tensor.hash);
        let experts = self.manifest.experts.iter().flat_map(|layer| layer.hashes.iter().copied());
        files.chain(trunk).chain(experts).collect()
    }
}

fn check_length(length: usize) -> Result<(), ManifestError> {
    if length > MAX_MANIFEST_BYTES { Err(ManifestError::TooLong(length)) } else { Ok(()) }
}
