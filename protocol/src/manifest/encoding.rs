//! Manifests as bytes, little-endian and without padding; the table is in `docs/protocol.md`.

use super::{
    Blob, ExpertLayer, ExpertRun, MAX_CONFIG_BYTES, MAX_DIMENSIONS, MAX_EXPERT_RUNS, MAX_FILES, MAX_NAME_BYTES,
    MAX_TRUNK_TENSORS, Manifest, ManifestError, ManifestFile, TensorDtype, TrunkTensor,
};
use crate::{BlobHash, MAX_EXPERTS, MAX_LAYERS};

const FORMAT: u16 = 2;

/// Lengths fit their fields for a manifest that has been checked.
pub(super) fn encode(manifest: &Manifest) -> Vec<u8> {
    let mut out = Vec::with_capacity(4096);
    out.extend(FORMAT.to_le_bytes());
    text(&mut out, &manifest.family);
    text(&mut out, &manifest.config);
    out.extend((manifest.files.len() as u16).to_le_bytes());
    for file in &manifest.files {
        text(&mut out, &file.name);
        out.extend(file.blob.bytes.to_le_bytes());
        out.extend(file.blob.hash.0);
    }
    out.extend(manifest.hidden_size.to_le_bytes());
    out.extend((manifest.trunk.len() as u32).to_le_bytes());
    for tensor in &manifest.trunk {
        text(&mut out, &tensor.name);
        out.push(tensor.dtype.code());
        out.push(tensor.shape.len() as u8);
        for size in &tensor.shape {
            out.extend(size.to_le_bytes());
        }
        out.extend(tensor.hash.0);
    }
    out.extend((manifest.experts.len() as u16).to_le_bytes());
    for layer in &manifest.experts {
        out.extend((layer.layer as u16).to_le_bytes());
        out.push(layer.runs.len() as u8);
        for run in &layer.runs {
            out.push(run.dtype.code());
            out.extend(run.values.to_le_bytes());
        }
        out.extend((layer.hashes.len() as u16).to_le_bytes());
        for hash in &layer.hashes {
            out.extend(hash.0);
        }
    }
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

pub(super) fn decode(bytes: &[u8]) -> Result<Manifest, ManifestError> {
    let mut rest = Reader(bytes);
    let format = rest.u16()?;
    if format != FORMAT {
        return Err(ManifestError::Format(format.into()));
    }
    let manifest = Manifest {
        family: rest.text(MAX_NAME_BYTES)?,
        config: rest.text(MAX_CONFIG_BYTES)?,
        files: {
            let count = rest.u16()?;
            list(count.into(), MAX_FILES, "list of files", || {
                let name = rest.text(MAX_NAME_BYTES)?;
                let bytes = u64::from_le_bytes(rest.array()?);
                Ok(ManifestFile { name, blob: Blob { hash: BlobHash(rest.array()?), bytes } })
            })?
        },
        hidden_size: rest.u32()?,
        trunk: {
            let count = rest.u32()?;
            list(count, MAX_TRUNK_TENSORS, "list of tensors", || tensor(&mut rest))?
        },
        experts: {
            let count = rest.u16()?;
            list(count.into(), MAX_LAYERS as usize, "list of layers", || layer(&mut rest))?
        },
    };
    match rest.0.len() {
        0 => Ok(manifest),
        trailing => Err(ManifestError::TrailingBytes(trailing)),
    }
}

fn tensor(rest: &mut Reader<'_>) -> Result<TrunkTensor, ManifestError> {
    let name = rest.text(MAX_NAME_BYTES)?;
    let dtype = rest.dtype()?;
    let [dimensions] = rest.array()?;
    let shape = list(dimensions.into(), MAX_DIMENSIONS, "shape", || Ok(u64::from_le_bytes(rest.array()?)))?;
    Ok(TrunkTensor { name, dtype, shape, hash: BlobHash(rest.array()?) })
}

fn layer(rest: &mut Reader<'_>) -> Result<ExpertLayer, ManifestError> {
    let layer = rest.u16()?.into();
    let [count] = rest.array()?;
    let runs = list(count.into(), MAX_EXPERT_RUNS, "list of runs", || {
        Ok(ExpertRun { dtype: rest.dtype()?, values: u64::from_le_bytes(rest.array()?) })
    })?;
    let count = rest.u16()?;
    let hashes = list(count.into(), MAX_EXPERTS as usize, "list of experts", || Ok(BlobHash(rest.array()?)))?;
    Ok(ExpertLayer { layer, runs, hashes })
}

/// Grows with what is really there.
fn list<T>(
    count: u32,
    most: usize,
    what: &'static str,
    mut next: impl FnMut() -> Result<T, ManifestError>,
) -> Result<Vec<T>, ManifestError> {
    if count as usize > most {
        return Err(ManifestError::invalid(what, "is too long"));
    }
    (0..count).map(|_| next()).collect()
}

/// What is left to be read.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], ManifestError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(ManifestError::Truncated)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u16(&mut self) -> Result<u16, ManifestError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, ManifestError> {
        self.array().map(u32::from_le_bytes)
    }

    fn dtype(&mut self) -> Result<TensorDtype, ManifestError> {
        let [code] = self.array()?;
        let known = TensorDtype::ALL.into_iter().find(|dtype| dtype.code() == code);
        known.ok_or_else(|| ManifestError::invalid("dtype", "is not known"))
    }

    fn text(&mut self, most: usize) -> Result<String, ManifestError> {
        let length = self.u32()? as usize;
        if length > most {
            return Err(ManifestError::invalid("text", "is too long"));
        }
        let (taken, rest) = self.0.split_at_checked(length).ok_or(ManifestError::Truncated)?;
        self.0 = rest;
        String::from_utf8(taken.to_vec()).map_err(|_| ManifestError::invalid("text", "is not UTF-8"))
    }
}
