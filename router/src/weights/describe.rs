//! The manifest of a model folder: made by hashing it, or read from the file beside the weights.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use hanse_model::{
    Checkpoint, CheckpointError, ExpertParts, Part, PartHashes, Piece, Run, StoredDtype, TrunkPart, WeightMap,
};
use hanse_protocol::{
    Blob, BlobHash, ExpertLayer, ExpertRun, Locations, MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, ManifestError,
    ManifestFile, ModelId, SignedManifest, TensorDtype, TrunkTensor,
};
use rayon::prelude::*;

/// The small files of a folder that belong to the model, beside `config.json`.
pub const FILES: [&str; 5] = [
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];
/// The largest of them that is taken.
const MAX_FILE_BYTES: u64 = 512 << 20;
/// Bytes read at a time.
const STEP: usize = 1 << 20;

/// A folder's manifest, and where its parts lie in the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// What the model consists of.
    pub manifest: Manifest,
    /// Where it lies.
    pub locations: Locations,
}

/// Why a folder's manifest could not be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DescribeError {
    /// The folder is damaged.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The manifest breaks a rule or its signature is wrong.
    #[error("{}: {reason}", path.display())]
    Manifest {
        /// The manifest's file, or the folder.
        path: PathBuf,
        /// What is wrong.
        reason: ManifestError,
    },
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file is not the one that the manifest lists.
    #[error("{} is not the one of the manifest: its hash differs. Get it again, or make a new manifest", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
}

/// Hashes a folder. `progress` is told bytes done and bytes in all.
///
/// The files are read, not touched through their mapping, so that resident memory does not grow.
///
/// # Errors
/// A file that cannot be read, a weight that is infinite or no number, or a model that no manifest can describe.
pub fn describe(
    checkpoint: &Checkpoint,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<Described, DescribeError> {
    let map = checkpoint.weight_map()?;
    let dir = checkpoint.dir();
    let files = map.files.iter().map(|name| open(&dir.join(name))).collect::<Result<Vec<_>, _>>()?;
    let total = map.trunk.iter().chain(map.experts.iter().flatten().flatten()).map(|piece| piece.bytes).sum();
    let done = Mutex::new((0, progress));
    let hash = |part: Part<'_>, pieces: &mut dyn Iterator<Item = (&Piece, StoredDtype)>| {
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; STEP];
        let mut values = 0;
        for (piece, dtype) in pieces {
            let (block, block_bytes) = dtype.block();
            let whole_blocks = STEP / block_bytes * block_bytes;
            let mut at = 0;
            while at < piece.bytes {
                let step = (piece.bytes - at).min(whole_blocks as u64);
                let bytes = &mut buffer[..step as usize];
                files[piece.file]
                    .read_exact_at(bytes, piece.offset + at)
                    .map_err(|source| DescribeError::Read { path: dir.join(&map.files[piece.file]), source })?;
                hasher.update(bytes);
                if let Some((place, value)) = dtype.not_finite(bytes) {
                    let (part, at) = (part.to_string(), values + place);
                    return Err(CheckpointError::NotFinite { part, at, value }.into());
                }
                values += bytes.len() / block_bytes * block;
                at += step;
                let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                done.0 += step;
                let so_far = done.0;
                (done.1)(so_far, total);
            }
        }
        Ok(BlobHash(*hasher.finalize().as_bytes()))
    };
    let of_tensor =
        |(piece, part): (&Piece, &TrunkPart)| hash(Part::Trunk(&part.name), &mut std::iter::once((piece, part.dtype)));
    let trunk: Vec<BlobHash> =
        map.trunk.par_iter().zip(&map.parts.trunk).map(of_tensor).collect::<Result<_, DescribeError>>()?;
    let of_layer = |(experts, parts): (&Vec<Vec<Piece>>, &ExpertParts)| {
        let of_expert = |(expert, pieces): (usize, &Vec<Piece>)| {
            let dtypes = parts.runs.iter().map(|run| run.dtype);
            hash(Part::Expert { layer: parts.layer, expert }, &mut pieces.iter().zip(dtypes))
        };
        experts.par_iter().enumerate().map(of_expert).collect::<Result<_, DescribeError>>()
    };
    let experts: Vec<Vec<BlobHash>> =
        map.experts.par_iter().zip(&map.parts.experts).map(of_layer).collect::<Result<_, _>>()?;
    let manifest = assemble(checkpoint, &map, trunk, experts)?;
    Ok(Described { manifest, locations: locations(&map) })
}

/// The id of the model in a folder, made by hashing all of it.
///
/// # Errors
/// As [`describe`].
pub fn model_id(checkpoint: &Checkpoint) -> Result<ModelId, DescribeError> {
    Ok(describe(checkpoint, &mut |_, _| {})?.manifest.id())
}

/// The folder's own manifest, if it has one.
///
/// # Errors
/// If it is there and cannot be read, or its signature is wrong.
pub fn read_manifest(dir: &Path) -> Result<Option<(SignedManifest, Locations)>, DescribeError> {
    let path = dir.join(MANIFEST_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let invalid = |reason| DescribeError::Manifest { path: path.clone(), reason };
    let bytes = read(&path, MAX_MANIFEST_BYTES as u64)?.ok_or_else(|| invalid(ManifestError::TooLong(usize::MAX)))?;
    let text = String::from_utf8(bytes).map_err(|error| invalid(ManifestError::Json(error.to_string())))?;
    SignedManifest::from_json(&text).map(Some).map_err(invalid)
}

/// Opens a folder whose manifest is known: what is loaded is compared with it, tensor by tensor, and so are the small files.
///
/// # Errors
/// `Changed` for a small file, and what is wrong with the folder. A tensor that was changed is found when it is loaded.
pub fn open_described(dir: &Path, manifest: &Manifest) -> Result<Checkpoint, DescribeError> {
    let config = dir.join("config.json");
    if read(&config, hanse_protocol::MAX_CONFIG_BYTES as u64)?.as_deref() != Some(manifest.config.as_bytes()) {
        return Err(DescribeError::Changed { path: config });
    }
    for file in &manifest.files {
        let path = dir.join(&file.name);
        // A volunteer does not need the tokenizer.
        if !path.exists() {
            continue;
        }
        let content = read(&path, MAX_FILE_BYTES)?;
        if content.is_none_or(|content| BlobHash::of(&content) != file.blob.hash) {
            return Err(DescribeError::Changed { path });
        }
    }
    Ok(Checkpoint::open_verified(dir, part_hashes(manifest))?)
}

fn part_hashes(manifest: &Manifest) -> PartHashes {
    PartHashes {
        trunk: manifest.trunk.iter().map(|tensor| (tensor.name.clone(), tensor.hash.0)).collect(),
        experts: manifest
            .experts
            .iter()
            .map(|layer| (layer.layer as usize, layer.hashes.iter().map(|hash| hash.0).collect()))
            .collect(),
    }
}

fn assemble(
    checkpoint: &Checkpoint,
    map: &WeightMap,
    trunk: Vec<BlobHash>,
    experts: Vec<Vec<BlobHash>>,
) -> Result<Manifest, DescribeError> {
    let (dir, spec) = (checkpoint.dir(), checkpoint.spec());
    let mut files = Vec::new();
    for name in FILES {
        let path = dir.join(name);
        if !path.exists() {
            continue;
        }
        let too_large = || CheckpointError::TooLarge { path: path.clone(), limit: MAX_FILE_BYTES };
        let content = read(&path, MAX_FILE_BYTES)?.ok_or_else(too_large)?;
        if !content.is_empty() {
            let blob = Blob { hash: BlobHash::of(&content), bytes: content.len() as u64 };
            files.push(ManifestFile { name: name.to_owned(), blob });
        }
    }
    let tensor = |(part, hash): (&TrunkPart, BlobHash)| TrunkTensor {
        name: part.name.clone(),
        dtype: tensor_dtype(part.dtype),
        shape: part.shape.iter().map(|size| *size as u64).collect(),
        hash,
    };
    let layer = |(part, hashes): (&ExpertParts, Vec<BlobHash>)| ExpertLayer {
        layer: part.layer as u32,
        runs: part.runs.iter().map(expert_run).collect(),
        hashes,
    };
    Ok(Manifest {
        family: spec.family.to_owned(),
        config: checkpoint.config_text().to_owned(),
        files,
        hidden_size: spec.hidden_size as u32,
        trunk: map.parts.trunk.iter().zip(trunk).map(tensor).collect(),
        experts: map.parts.experts.iter().zip(experts).map(layer).collect(),
    })
}

/// Where a model's parts lie, in the manifest's words.
pub(crate) fn locations(map: &WeightMap) -> Locations {
    let place = |piece: &Piece| (piece.file as u32, piece.offset);
    Locations {
        files: map.files.clone(),
        trunk: map.trunk.iter().map(place).collect(),
        experts: map
            .experts
            .iter()
            .map(|layer| layer.iter().map(|pieces| pieces.iter().map(place).collect()).collect())
            .collect(),
    }
}

/// In the manifest's words.
pub(crate) fn expert_run(run: &Run) -> ExpertRun {
    ExpertRun { dtype: tensor_dtype(run.dtype), values: run.values }
}

pub(crate) fn tensor_dtype(dtype: StoredDtype) -> TensorDtype {
    match dtype {
        StoredDtype::F32 => TensorDtype::F32,
        StoredDtype::F16 => TensorDtype::F16,
        StoredDtype::Bf16 => TensorDtype::Bf16,
        StoredDtype::Q8_0 => TensorDtype::Q8_0,
        StoredDtype::Q4K => TensorDtype::Q4K,
        StoredDtype::F8E4m3 => TensorDtype::F8E4m3,
        StoredDtype::F4E2m1 => TensorDtype::F4E2m1,
        StoredDtype::F8E8m0 => TensorDtype::F8E8m0,
    }
}

pub(crate) fn stored_dtype(dtype: TensorDtype) -> StoredDtype {
    match dtype {
        TensorDtype::F32 => StoredDtype::F32,
        TensorDtype::F16 => StoredDtype::F16,
        TensorDtype::Bf16 => StoredDtype::Bf16,
        TensorDtype::Q8_0 => StoredDtype::Q8_0,
        TensorDtype::Q4K => StoredDtype::Q4K,
        TensorDtype::F8E4m3 => StoredDtype::F8E4m3,
        TensorDtype::F4E2m1 => StoredDtype::F4E2m1,
        TensorDtype::F8E8m0 => StoredDtype::F8E8m0,
    }
}

fn open(path: &Path) -> Result<File, DescribeError> {
    File::open(path).map_err(|source| DescribeError::Read { path: path.to_owned(), source })
}

/// `None` if it is longer than `limit`.
fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, DescribeError> {
    let failed = |source| DescribeError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    open(path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    Ok((bytes.len() as u64 <= limit).then_some(bytes))
}
