//! Manifests as the file `hanse-manifest.json`.

use serde::{Deserialize, Serialize};

use super::{
    Blob, ExpertLayer, ExpertRun, MAX_MANIFEST_BYTES, Manifest, ManifestError, ManifestFile, SignedManifest,
    TensorDtype, TrunkTensor,
};
use crate::BlobHash;

const FORMAT: u64 = 2;

/// A place in a file: an index into [`Locations::files`] and the first byte.
pub type Place = (u32, u64);

/// Where the parts lie in the files of a folder or a repository. A hint: it is neither signed nor part of the model's id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locations {
    /// Names of safetensors files.
    pub files: Vec<String>,
    /// Of each trunk tensor, in the manifest's order.
    pub trunk: Vec<Place>,
    /// Of each run of each layer's experts, in the manifest's order.
    pub experts: Vec<Vec<Vec<Place>>>,
}

#[derive(Serialize, Deserialize)]
struct Document {
    format: u64,
    model_id: String,
    publisher: String,
    signature: String,
    family: String,
    config: String,
    files: Vec<FileEntry>,
    hidden_size: u32,
    weight_files: Vec<String>,
    trunk: Vec<TrunkEntry>,
    experts: Vec<LayerEntry>,
}

#[derive(Serialize, Deserialize)]
struct FileEntry {
    name: String,
    bytes: u64,
    hash: String,
}

#[derive(Serialize, Deserialize)]
struct TrunkEntry {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    bytes: u64,
    hash: String,
    at: Place,
}

#[derive(Serialize, Deserialize)]
struct LayerEntry {
    layer: u32,
    runs: Vec<RunEntry>,
    bytes: u64,
    hashes: Vec<String>,
    at: Vec<Vec<Place>>,
}

#[derive(Serialize, Deserialize)]
struct RunEntry {
    dtype: String,
    values: u64,
}

pub(super) fn write(signed: &SignedManifest, locations: &Locations) -> String {
    let manifest = &signed.manifest;
    let document = Document {
        format: FORMAT,
        model_id: signed.id.to_string(),
        publisher: hex::encode(signed.public_key),
        signature: hex::encode(signed.signature),
        family: manifest.family.clone(),
        config: manifest.config.clone(),
        files: manifest
            .files
            .iter()
            .map(|file| FileEntry { name: file.name.clone(), bytes: file.blob.bytes, hash: file.blob.hash.to_string() })
            .collect(),
        hidden_size: manifest.hidden_size,
        weight_files: locations.files.clone(),
        trunk: manifest
            .trunk
            .iter()
            .zip(&locations.trunk)
            .map(|(tensor, at)| TrunkEntry {
                name: tensor.name.clone(),
                dtype: tensor.dtype.name().to_owned(),
                shape: tensor.shape.clone(),
                bytes: tensor.blob().bytes,
                hash: tensor.hash.to_string(),
                at: *at,
            })
            .collect(),
        experts: manifest
            .experts
            .iter()
            .zip(&locations.experts)
            .map(|(layer, at)| LayerEntry {
                layer: layer.layer,
                runs: layer
                    .runs
                    .iter()
                    .map(|run| RunEntry { dtype: run.dtype.name().to_owned(), values: run.values })
                    .collect(),
                bytes: layer.expert_bytes(),
                hashes: layer.hashes.iter().map(ToString::to_string).collect(),
                at: at.clone(),
            })
            .collect(),
    };
    // Strings, numbers and lists of them always have a JSON form.
    serde_json::to_string(&document).unwrap_or_default()
}

pub(super) fn read(text: &str) -> Result<(SignedManifest, Locations), ManifestError> {
    if text.len() > MAX_MANIFEST_BYTES {
        return Err(ManifestError::TooLong(text.len()));
    }
    let failed = |error: serde_json::Error| ManifestError::Json(error.to_string());
    #[derive(Deserialize)]
    struct Version {
        format: u64,
    }
    let Version { format } = serde_json::from_str(text).map_err(failed)?;
    if format != FORMAT {
        return Err(ManifestError::Format(format));
    }
    let document: Document = serde_json::from_str(text).map_err(failed)?;
    let files = document
        .files
        .into_iter()
        .map(|file| Ok(ManifestFile { blob: Blob { hash: hash(&file.hash)?, bytes: file.bytes }, name: file.name }))
        .collect::<Result<_, ManifestError>>()?;
    let mut locations = Locations { files: document.weight_files, ..Locations::default() };
    let mut trunk = Vec::new();
    for entry in document.trunk {
        let (dtype, hash) = (dtype(&entry.dtype)?, hash(&entry.hash)?);
        let tensor = TrunkTensor { name: entry.name, dtype, shape: entry.shape, hash };
        if tensor.blob().bytes != entry.bytes {
            return Err(ManifestError::invalid(format!("tensor {:?}", tensor.name), "has another size than its shape"));
        }
        trunk.push(tensor);
        locations.trunk.push(entry.at);
    }
    let mut experts = Vec::new();
    for entry in document.experts {
        let layer = ExpertLayer {
            layer: entry.layer,
            runs: entry
                .runs
                .iter()
                .map(|run| Ok(ExpertRun { dtype: dtype(&run.dtype)?, values: run.values }))
                .collect::<Result<_, ManifestError>>()?,
            hashes: entry.hashes.iter().map(|text| hash(text)).collect::<Result<_, _>>()?,
        };
        let sizes_differ = layer.expert_bytes() != entry.bytes;
        let places_differ = entry.at.iter().any(|places| places.len() != layer.runs.len());
        if sizes_differ || places_differ || entry.at.len() != layer.hashes.len() {
            return Err(ManifestError::invalid(format!("layer {}", layer.layer), "contradicts itself"));
        }
        experts.push(layer);
        locations.experts.push(entry.at);
    }
    let known = |(file, _): &Place| (*file as usize) < locations.files.len();
    if !locations.trunk.iter().chain(locations.experts.iter().flatten().flatten()).all(known) {
        return Err(ManifestError::invalid("list of weight files", "is too short"));
    }
    let manifest = Manifest {
        family: document.family,
        config: document.config,
        files,
        hidden_size: document.hidden_size,
        trunk,
        experts,
    };
    let signed = SignedManifest::verified(manifest, hex_bytes(&document.publisher)?, hex_bytes(&document.signature)?)?;
    if signed.id.to_string() != document.model_id {
        return Err(ManifestError::invalid("model id", "is not its content's"));
    }
    Ok((signed, locations))
}

fn hash(text: &str) -> Result<BlobHash, ManifestError> {
    text.parse().map_err(|_| ManifestError::invalid("hash", "is not 64 hex digits"))
}

fn hex_bytes<const N: usize>(text: &str) -> Result<[u8; N], ManifestError> {
    let mut bytes = [0; N];
    hex::decode_to_slice(text, &mut bytes)
        .map_err(|_| ManifestError::invalid("publisher or signature", "is not so many hex digits"))?;
    Ok(bytes)
}

fn dtype(name: &str) -> Result<TensorDtype, ManifestError> {
    let known = TensorDtype::ALL.into_iter().find(|dtype| dtype.name() == name);
    known.ok_or_else(|| ManifestError::invalid(format!("dtype {name:?}"), "is not known"))
}
