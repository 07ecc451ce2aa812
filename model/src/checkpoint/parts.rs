//! The parts that a model's weights consist of, for those who hash them, move them, or keep them one by one: each tensor
//! of the trunk is a part, and so is each routed expert.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use super::dtype::StoredDtype;
use super::error::CheckpointError;
use super::mapping::Mapping;

/// A run of bytes in one of the files of a [`WeightMap`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Index into [`WeightMap::files`].
    pub file: usize,
    /// First byte in the file.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

/// A tensor of the trunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrunkPart {
    /// Its name in the files.
    pub name: String,
    /// How it is stored.
    pub dtype: StoredDtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// The routed experts of one layer. The bytes of an expert are runs of values, one after another, whether the files hold
/// experts one by one or all together: its gate_proj `[intermediate, hidden]`, its up_proj `[intermediate, hidden]` and its
/// down_proj `[hidden, intermediate]`; in gpt-oss, as its files have it, gate and up in turns `[hidden, 2 x intermediate]`, the
/// bias of both, down `[intermediate, hidden]` and its bias.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertParts {
    /// The layer.
    pub layer: usize,
    /// How many experts it has.
    pub experts: usize,
    /// What each of them consists of.
    pub runs: Vec<Run>,
}

/// Values of an expert that lie side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// How they are stored.
    pub dtype: StoredDtype,
    /// How many.
    pub values: u64,
}

/// What parts there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    /// The trunk's tensors, in the order of their names.
    pub trunk: Vec<TrunkPart>,
    /// The layers with routed experts, ascending.
    pub experts: Vec<ExpertParts>,
}

/// Where the parts lie in safetensors files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightMap {
    /// Names of the files in the model's folder.
    pub files: Vec<String>,
    /// What parts there are.
    pub parts: Parts,
    /// For each of `parts.trunk`.
    pub trunk: Vec<Piece>,
    /// For each of `parts.experts`, each of its experts and each of its runs.
    pub experts: Vec<Vec<Vec<Piece>>>,
}

/// One part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part<'a> {
    /// The trunk's tensor of this name.
    Trunk(&'a str),
    /// A routed expert.
    Expert {
        /// Its layer.
        layer: usize,
        /// Its number in the layer.
        expert: usize,
    },
}

impl std::fmt::Display for Part<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Trunk(name) => write!(f, "tensor `{name}`"),
            Self::Expert { layer, expert } => write!(f, "expert {expert} of layer {layer}"),
        }
    }
}

/// Where a checkpoint that is no folder has its parts from.
pub trait PartSource: std::fmt::Debug + Send + Sync {
    /// The bytes of a part, which are what they should be: checked by hash. May block until they are here.
    ///
    /// # Errors
    /// Why they cannot be had.
    fn open(&self, part: Part<'_>) -> Result<Arc<Mapping>, Box<dyn std::error::Error + Send + Sync>>;
}

/// BLAKE3 hashes that the parts of a folder must have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PartHashes {
    /// By name of the tensor.
    pub trunk: BTreeMap<String, [u8; 32]>,
    /// By layer, for each expert.
    pub experts: BTreeMap<usize, Vec<[u8; 32]>>,
}

/// Bytes, and how the values in them are stored.
pub(super) type Content<'a> = (&'a [u8], StoredDtype);

/// Checks each part once, when it is first used.
#[derive(Debug)]
pub(super) struct Verifier {
    hashes: PartHashes,
    trunk: Mutex<BTreeSet<String>>,
    experts: Mutex<BTreeSet<(usize, usize)>>,
}

impl Verifier {
    pub(super) fn new(hashes: PartHashes) -> Self {
        Self { hashes, trunk: Mutex::default(), experts: Mutex::default() }
    }

    /// Whether the hash is known of every part that `parts` lists.
    pub(super) fn covers(&self, parts: &Parts) -> Result<(), CheckpointError> {
        let unknown = |part: Part<'_>| CheckpointError::Unlisted { part: part.to_string() };
        for tensor in &parts.trunk {
            self.hashes.trunk.get(&tensor.name).ok_or_else(|| unknown(Part::Trunk(&tensor.name)))?;
        }
        for layer in &parts.experts {
            let listed = self.hashes.experts.get(&layer.layer).map_or(0, Vec::len);
            if listed != layer.experts {
                return Err(unknown(Part::Expert { layer: layer.layer, expert: listed.min(layer.experts) }));
            }
        }
        Ok(())
    }

    /// Compares the bytes of a tensor; those that are no part by themselves are compared with their expert.
    pub(super) fn trunk(&self, name: &str, content: Content<'_>) -> Result<(), CheckpointError> {
        let Some(expected) = self.hashes.trunk.get(name) else { return Ok(()) };
        if self.trunk.lock().unwrap_or_else(PoisonError::into_inner).contains(name) {
            return Ok(());
        }
        compare(Part::Trunk(name), expected, &[content])?;
        self.trunk.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        Ok(())
    }

    pub(super) fn expert(&self, layer: usize, expert: usize, runs: &[Content<'_>]) -> Result<(), CheckpointError> {
        let Some(expected) = self.hashes.experts.get(&layer).and_then(|layer| layer.get(expert)) else { return Ok(()) };
        if self.experts.lock().unwrap_or_else(PoisonError::into_inner).contains(&(layer, expert)) {
            return Ok(());
        }
        compare(Part::Expert { layer, expert }, expected, runs)?;
        self.experts.lock().unwrap_or_else(PoisonError::into_inner).insert((layer, expert));
        Ok(())
    }
}

/// Compares a part with its hash, and looks for values that are infinite or no numbers: all of it is read in any case.
fn compare(part: Part<'_>, expected: &[u8; 32], runs: &[Content<'_>]) -> Result<(), CheckpointError> {
    let mut hasher = blake3::Hasher::new();
    for (bytes, _) in runs {
        hasher.update(bytes);
    }
    if hasher.finalize().as_bytes() != expected {
        return Err(CheckpointError::Mismatch { part: part.to_string() });
    }
    let mut before = 0;
    for (bytes, dtype) in runs {
        if let Some((at, value)) = dtype.not_finite(bytes) {
            return Err(CheckpointError::NotFinite { part: part.to_string(), at: before + at, value });
        }
        let (values, block) = dtype.block();
        before += bytes.len() / block * values;
    }
    Ok(())
}
