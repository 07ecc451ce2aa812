//! A model folder: `config.json` and memory-mapped safetensors, checked before anything is computed.

pub(crate) mod config;
mod dtype;
mod error;
mod experts;
mod head;
mod layout;
mod mapping;
mod parts;
pub(crate) mod quantization;
mod tensors;
mod weight_map;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use config::ConfigError;
pub use dtype::StoredDtype;
pub use error::{CheckpointError, LoadError};
#[cfg(any(cards, test))]
pub(crate) use experts::Biases;
pub(crate) use experts::{Swiglu, WrittenMatrix, WrittenTensor};
pub use mapping::Mapping;
pub use parts::{ExpertParts, Part, PartHashes, PartSource, Parts, Piece, Run, TrunkPart, WeightMap};
pub(crate) use tensors::finite;
pub use weight_map::weight_map_of_headers;

use serde_json::{Map, Value};

use crate::families::{self, Family};
use crate::linear::Matrix;
use crate::spec::{ModelSpec, MoeSpec};
use parts::Verifier;
use tensors::TensorFiles;

/// Bytes of `config.json` that are read at most.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// An opened model folder. Cheap to clone: clones share the mapping.
///
/// The files are mapped, not read: they must not be truncated while the checkpoint is open.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    config_text: String,
    spec: ModelSpec,
    family: &'static Family,
    tensors: Arc<TensorFiles>,
    /// Where routed experts come from that lie in no file.
    experts: Option<Experts>,
    /// The last layer of `spec`, where it is that of a multi-token-prediction head.
    head: Option<usize>,
}

/// Routed experts that are had one by one.
#[derive(Debug)]
struct Experts {
    source: Arc<dyn PartSource>,
    /// How the runs of each layer's experts are stored.
    layers: BTreeMap<usize, Vec<StoredDtype>>,
}

/// A tensor of the trunk.
#[derive(Debug)]
pub(crate) struct StoredTensor {
    pub(crate) name: String,
    pub(crate) dtype: StoredDtype,
    pub(crate) shape: Vec<usize>,
    /// It is a router's weight.
    pub(crate) is_gate: bool,
}

/// How large the parts of a checkpoint are, in bytes as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    /// Everything that a client keeps: embeddings, attention, norms, gates, dense layers, shared experts, LM head.
    pub trunk_bytes: u64,
    /// All routed experts together.
    pub expert_bytes: u64,
    /// One routed expert of each layer; 0 for a dense layer.
    pub bytes_per_expert: Vec<u64>,
}

impl Checkpoint {
    /// Opens a folder in the layout of the model hubs: `config.json` and `model.safetensors`, or shards named by
    /// `model.safetensors.index.json`. Reads the headers and checks that every tensor of the model is there with the
    /// right shape and a dtype of f32, f16 or bf16. Tensors that the model does not use are left alone.
    ///
    /// # Errors
    /// Whatever is wrong with the folder, naming file, key or tensor. Retrying does not help.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let config_text = read_text(&dir.join("config.json"), MAX_CONFIG_BYTES)?;
        let (family, spec) = read_config(&config_text)?;
        let tensors = Arc::new(TensorFiles::open(dir)?);
        let inner = Inner { dir: dir.to_owned(), config_text, spec, family, tensors, experts: None, head: None };
        inner.check()?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Like [`Checkpoint::open`], for a folder whose parts must have these hashes. Each is compared when it is first used.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and `Unlisted` if a part has no hash. Loading a part fails with `Mismatch` if it has another.
    pub fn open_verified(dir: &Path, hashes: PartHashes) -> Result<Self, CheckpointError> {
        let opened = Self::open(dir)?;
        let verifier = Verifier::new(hashes);
        verifier.covers(&opened.weight_map()?.parts)?;
        // It was made a moment ago and has no clones.
        let Some(mut inner) = Arc::into_inner(opened.inner) else { return Self::open(dir) };
        let Some(tensors) = Arc::get_mut(&mut inner.tensors) else { return Self::open(dir) };
        tensors.verifier = Some(verifier);
        Ok(Self { inner: Arc::new(inner) })
    }

    /// A checkpoint whose weights `source` gives part by part, when they are first used. `dir` is the folder with the
    /// tokenizer and the other small files.
    ///
    /// # Errors
    /// What is wrong with the config, and parts that do not fit it.
    pub fn from_parts(
        dir: &Path,
        config_text: String,
        parts: Parts,
        source: Arc<dyn PartSource>,
    ) -> Result<Self, CheckpointError> {
        let (family, spec) = read_config(&config_text)?;
        let tensors = Arc::new(TensorFiles::of_parts(parts.trunk, source.clone())?);
        let dtypes = |layer: &ExpertParts| layer.runs.iter().map(|run| run.dtype).collect();
        let layers = parts.experts.iter().map(|layer| (layer.layer, dtypes(layer))).collect();
        let experts = Some(Experts { source, layers });
        let inner = Inner { dir: dir.to_owned(), config_text, spec, family, tensors, experts, head: None };
        inner.check()?;
        let wanted = inner.spec.moe_layers().map(|(layer, moe)| {
            let runs = inner.expert_runs(layer, 0, moe).iter().map(|run| run.values() as u64).collect::<Vec<_>>();
            (layer, moe.experts, runs)
        });
        let found = parts
            .experts
            .iter()
            .map(|layer| (layer.layer, layer.experts, layer.runs.iter().map(|run| run.values).collect::<Vec<_>>()));
        if !wanted.eq(found) {
            let part = "the number or size of experts in each layer".to_owned();
            return Err(CheckpointError::Mismatch { part });
        }
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The text of `config.json`.
    pub fn config_text(&self) -> &str {
        &self.inner.config_text
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// What the model computes.
    pub fn spec(&self) -> &ModelSpec {
        &self.inner.spec
    }

    /// How large trunk and experts are.
    pub fn sizes(&self) -> Sizes {
        let inner = &self.inner;
        let bytes = |name: &str| inner.tensors.get(name).map_or(0, |tensor| tensor.bytes() as u64);
        let trunk_bytes = inner.trunk_tensors().iter().map(|(name, _)| bytes(name)).sum();
        let bytes_per_expert: Vec<u64> = (0..inner.spec.layers.len()).map(|layer| inner.expert_bytes(layer)).collect();
        let expert_bytes =
            inner.spec.moe_layers().map(|(layer, moe)| bytes_per_expert[layer] * moe.experts as u64).sum();
        Sizes { trunk_bytes, expert_bytes, bytes_per_expert }
    }

    /// A matrix `[outputs, inputs]`, used in place where the mapping is aligned.
    pub(crate) fn matrix(&self, name: &str, outputs: usize, inputs: usize) -> Result<Matrix, CheckpointError> {
        self.inner.tensors.matrix(name, &[outputs, inputs], 0..outputs)
    }

    /// A vector, widened to f32.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
        self.inner.tensors.vector(name, &[len])
    }

    /// Names and shapes of all tensors of the model.
    pub(crate) fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        self.inner.shapes()
    }

    /// How a tensor is stored.
    pub(crate) fn dtype(&self, name: &str, shape: &[usize]) -> Result<StoredDtype, CheckpointError> {
        Ok(self.inner.tensors.expect(name, shape)?.1)
    }

    /// Where the bytes of a tensor lie.
    pub(crate) fn content(&self, name: &str, shape: &[usize]) -> Result<(Arc<Mapping>, Range<usize>), CheckpointError> {
        self.inner.tensors.content(name, shape)
    }

    /// The LM head, if it is not the embedding.
    pub(crate) fn lm_head(&self) -> Result<Option<Matrix>, CheckpointError> {
        let spec = &self.inner.spec;
        if !self.inner.has_lm_head() {
            return Ok(None);
        }
        self.matrix("lm_head.weight", spec.vocab_size, spec.hidden_size).map(Some)
    }

    /// The gate's name in `layer`, below `model.layers.`.
    pub(crate) fn gate_name(&self, layer: usize) -> String {
        self.inner.gate_name(layer)
    }

    /// What the family calls the norms of queries and keys, below `self_attn`.
    pub(crate) fn qk_norm_names(&self) -> (&'static str, &'static str) {
        self.inner.family.tensors.qk_norms
    }

    /// The bias of the router of `layer`, if it has one.
    pub(crate) fn gate_bias(&self, layer: usize, moe: &MoeSpec) -> Result<Option<Vec<f32>>, CheckpointError> {
        self.inner.gate_bias(layer, moe).map(|(name, shape)| self.inner.tensors.vector(&name, &shape)).transpose()
    }

    /// What is added to the scores of `layer` for the choice, if there is such a thing.
    pub(crate) fn correction(&self, layer: usize, moe: &MoeSpec) -> Result<Option<Vec<f32>>, CheckpointError> {
        self.inner.correction(layer, moe).map(|(name, shape)| self.inner.tensors.vector(&name, &shape)).transpose()
    }

    /// How the experts of `layer` are stored: the dtypes of what one consists of; nothing if the layer is dense.
    pub fn expert_dtypes(&self, layer: usize) -> Vec<StoredDtype> {
        self.inner.expert_dtypes(layer)
    }

    /// The model id, in hexadecimal digits, of the published model of which `hanse quantize` made this one.
    pub fn original(&self) -> Option<String> {
        let map = self.config_map();
        // What is wrong with the text has been said when the checkpoint was opened.
        quantization::original(&config::Config::new(&map)).ok().flatten()
    }

    /// The trunk's tensors, as they are stored.
    pub(crate) fn trunk_parts(&self) -> Vec<StoredTensor> {
        let inner = &self.inner;
        let gates: BTreeSet<String> = inner.spec.moe_layers().map(|(layer, _)| inner.gate_name(layer)).collect();
        let stored = |(name, shape): (String, Vec<usize>)| {
            let dtype = inner.tensors.get(&name)?.stored(&name).ok()?;
            Some(StoredTensor { is_gate: gates.contains(&name), name, dtype, shape })
        };
        inner.trunk_tensors().into_iter().filter_map(stored).collect()
    }

    /// The tensors to write for the experts of `layer`; `None` for families whose experts are not written.
    pub(crate) fn written_experts(&self, layer: usize) -> Option<Vec<WrittenTensor>> {
        self.inner.written_experts(layer)
    }

    /// `config.json`, which was read when the checkpoint was opened.
    pub(crate) fn config_map(&self) -> Map<String, Value> {
        config::parse(&self.inner.config_text).unwrap_or_default()
    }

    /// The safetensors files.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        self.inner.tensors.files.iter().map(|file| file.path.as_path())
    }

    /// The matrices of one routed expert.
    pub(crate) fn expert(&self, layer: usize, expert: usize) -> Result<Swiglu, LoadError> {
        self.inner.expert(layer, expert)
    }

    /// The matrices of the shared expert of `layer` and, where it has one, its gate `[1, hidden]`.
    pub(crate) fn shared_expert(&self, layer: usize) -> Result<Option<(Swiglu, Option<Matrix>)>, CheckpointError> {
        self.inner.shared_expert(layer)
    }
}

/// The family of a `config.json`, and what the model computes.
fn read_config(text: &str) -> Result<(&'static Family, ModelSpec), ConfigError> {
    let map = config::parse(text)?;
    let config = config::Config::new(&map);
    let family = families::find(&config)?;
    let spec = family.read(&config)?;
    quantization::check(&config)?;
    Ok((family, spec))
}

/// Names and shapes of the tensors that a checkpoint with this `config.json` must hold, for programs that write
/// checkpoints. Where hubs hold several forms of a family, it is the classic one.
///
/// # Errors
/// What is wrong with the text, as [`Checkpoint::open`] would say.
pub fn tensor_shapes(config_text: &str) -> Result<Vec<(String, Vec<usize>)>, ConfigError> {
    let (family, spec) = read_config(config_text)?;
    let tensors = Arc::new(TensorFiles::none());
    Ok(Inner {
        dir: PathBuf::new(),
        config_text: config_text.to_owned(),
        spec,
        family,
        tensors,
        experts: None,
        head: None,
    }
    .shapes())
}

/// Opens a regular file.
pub(crate) fn open_file(path: &Path) -> Result<File, CheckpointError> {
    let failed = |source| CheckpointError::Read { path: path.to_owned(), source };
    let kind = std::fs::metadata(path).map_err(failed)?.file_type();
    if !kind.is_file() {
        let found = if kind.is_dir() { "a directory" } else { "a pipe, a socket or a device" };
        return Err(CheckpointError::NotAFile { path: path.to_owned(), found });
    }
    File::open(path).map_err(failed)
}

/// Reads a text file of at most `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, CheckpointError> {
    let failed = |source| CheckpointError::Read { path: path.to_owned(), source };
    let file = open_file(path)?;
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(CheckpointError::TooLarge { path: path.to_owned(), limit });
    }
    String::from_utf8(bytes).map_err(|_| CheckpointError::NotText { path: path.to_owned() })
}
