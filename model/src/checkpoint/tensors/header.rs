//! The header of a safetensors file, and what is wrong with one that is refused.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{SafeTensorError, SafeTensors};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::byte_count;
use crate::checkpoint::error::CheckpointError;

/// Bytes before the header: its length.
pub(super) const PREFIX: usize = 8;

/// Where the data starts, and what the header says. All offsets have been checked against the file.
pub(super) fn read_header(path: &Path, bytes: &[u8]) -> Result<(usize, Metadata), CheckpointError> {
    let header = |reason: String| CheckpointError::Header { path: path.to_owned(), reason };
    let found = bytes.len() as u64;
    let (length, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| match error {
        SafeTensorError::InvalidOffset(tensor) => CheckpointError::Overlapping { path: path.to_owned(), tensor },
        SafeTensorError::InvalidHeaderLength => CheckpointError::Truncated {
            path: path.to_owned(),
            expected: header_length(bytes).saturating_add(PREFIX as u64),
            found,
        },
        SafeTensorError::MetadataIncompleteBuffer => incomplete(path, bytes),
        other => {
            let end = usize::try_from(header_length(bytes).saturating_add(PREFIX as u64)).unwrap_or(usize::MAX);
            malformed(path, bytes.get(PREFIX..end).unwrap_or_default(), other.to_string())
        }
    })?;
    let text = bytes.get(PREFIX..PREFIX + length).unwrap_or_default();
    let names: Names = serde_json::from_slice(text).map_err(|error| header(error.to_string()))?;
    if let Some(tensor) = names.repeated {
        return Err(CheckpointError::Duplicate { tensor, first: path.to_owned(), second: path.to_owned() });
    }
    Ok((PREFIX + length, metadata))
}

/// The error for a header that the safetensors library refuses, saying `reason`. Where a tensor's size is at fault, the
/// library does not say which tensor's.
pub(super) fn malformed(path: &Path, header: &[u8], reason: String) -> CheckpointError {
    let entries: BTreeMap<String, Value> = serde_json::from_slice(header).unwrap_or_default();
    let wrong = entries.into_iter().find_map(|(name, entry)| {
        let TensorInfo { dtype, shape, data_offsets: (start, end) } = TensorInfo::deserialize(entry).ok()?;
        let bits = byte_count(&shape, dtype.bitsize());
        (bits.is_none() || bits != end.checked_sub(start)?.checked_mul(8)).then_some(name)
    });
    match wrong {
        Some(tensor) => CheckpointError::WrongSize { path: path.to_owned(), tensor },
        None => CheckpointError::Header { path: path.to_owned(), reason },
    }
}

fn header_length(bytes: &[u8]) -> u64 {
    bytes.first_chunk::<PREFIX>().map_or(0, |prefix| u64::from_le_bytes(*prefix))
}

/// The header is sound, but the file has another length than it calls for.
fn incomplete(path: &Path, bytes: &[u8]) -> CheckpointError {
    let found = bytes.len() as u64;
    let data_start = header_length(bytes).saturating_add(PREFIX as u64);
    let text = usize::try_from(data_start).ok().and_then(|end| bytes.get(PREFIX..end)).unwrap_or_default();
    let data = serde_json::from_slice::<Metadata>(text).map_or(0, |metadata| metadata.data_len() as u64);
    let expected = data_start.saturating_add(data);
    if found < expected {
        CheckpointError::Truncated { path: path.to_owned(), expected, found }
    } else {
        CheckpointError::TrailingBytes { path: path.to_owned(), extra: found - expected }
    }
}

/// The keys of a header, to see whether one is there twice, which a JSON map would hide.
struct Names {
    repeated: Option<String>,
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(NamesVisitor)
    }
}

struct NamesVisitor;

impl<'de> Visitor<'de> for NamesVisitor {
    type Value = Names;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Names, A::Error> {
        let mut seen = std::collections::HashSet::new();
        let mut repeated = None;
        while let Some((key, _)) = map.next_entry::<String, IgnoredAny>()? {
            if let Some(key) = seen.replace(key) {
                repeated = Some(key);
            }
        }
        Ok(Names { repeated })
    }
}
