//! The safetensors files of a checkpoint: which tensor lies where.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use safetensors::{SafeTensorError, SafeTensors};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::dtype::StoredDtype;
use super::error::CheckpointError;
use super::mapping::Mapping;
use super::parts::{Part, PartSource, TrunkPart, Verifier};
use super::{open_file, read_text};
use crate::linear::{FP8_TILE, Matrix};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 256 << 20;
/// Bytes before the header: its length.
const PREFIX: usize = 8;

#[derive(Debug)]
pub(super) struct TensorFiles {
    pub(super) files: Vec<TensorFile>,
    pub(super) tensors: BTreeMap<String, Tensor>,
    /// Where tensors come from that lie in no file; each by itself.
    source: Option<Arc<dyn PartSource>>,
    /// What the tensors in files are compared with.
    pub(super) verifier: Option<Verifier>,
}

#[derive(Debug)]
pub(super) struct TensorFile {
    pub(super) path: PathBuf,
    /// Absent where only the header is known.
    map: Option<Arc<Mapping>>,
}

/// Where a tensor lies. The range has been checked against the file and against shape and dtype.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) file: usize,
    /// `None` if it is not one that is read.
    dtype: Option<StoredDtype>,
    /// As its file says.
    written: Dtype,
    /// Of values.
    shape: Vec<usize>,
    /// Bytes in the file.
    pub(super) range: Range<usize>,
}

impl Tensor {
    pub(super) fn bytes(&self) -> usize {
        self.range.len()
    }

    /// How it is stored. `name` is for the error.
    pub(super) fn stored(&self, name: &str) -> Result<StoredDtype, CheckpointError> {
        self.dtype.ok_or_else(|| self.unusable(name))
    }

    /// It is stored in a way that is read, but not here.
    fn unusable(&self, name: &str) -> CheckpointError {
        let found = self.dtype.map_or_else(|| format!("{:?}", self.written), |dtype| format!("{dtype:?}"));
        CheckpointError::Dtype { tensor: name.to_owned(), found }
    }
}

impl TensorFiles {
    /// No files: every tensor goes by the first of its names.
    pub(super) fn none() -> Self {
        Self { files: Vec::new(), tensors: BTreeMap::new(), source: None, verifier: None }
    }

    /// The trunk's tensors, each of which `source` gives by its name.
    pub(super) fn of_parts(trunk: Vec<TrunkPart>, source: Arc<dyn PartSource>) -> Result<Self, CheckpointError> {
        let mut this = Self { source: Some(source), ..Self::none() };
        for TrunkPart { name, dtype, shape } in trunk {
            // By rows: each is a whole number of blocks.
            let (row, rows) = shape.split_last().map_or((1, &[][..]), |(row, rows)| (*row, rows));
            let bytes = dtype.bytes(row).and_then(|row| byte_count(rows, row)).ok_or_else(|| {
                CheckpointError::Shape { tensor: name.clone(), expected: Vec::new(), found: shape.clone() }
            })?;
            let tensor = Tensor { file: 0, dtype: Some(dtype), written: Dtype::U8, shape, range: 0..bytes };
            this.tensors.insert(name, tensor);
        }
        Ok(this)
    }

    /// What the headers of safetensors files say; the tensors themselves cannot be read. `headers` are file names and
    /// the first bytes of each, up to the end of the header.
    pub(super) fn of_headers(headers: Vec<(String, Vec<u8>)>) -> Result<Self, CheckpointError> {
        let mut this = Self::none();
        for (name, bytes) in headers {
            let path = PathBuf::from(name);
            let text = bytes.get(PREFIX..).unwrap_or_default();
            let metadata: Metadata =
                serde_json::from_slice(text).map_err(|error| malformed(&path, text, error.to_string()))?;
            this.insert(path, bytes.len(), &metadata, None)?;
        }
        Ok(this)
    }

    pub(super) fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let mut this = Self::none();
        if dir.join(SINGLE).exists() {
            this.add(dir.join(SINGLE))?;
            return Ok(this);
        }
        let index_path = dir.join(INDEX);
        if !index_path.exists() {
            return Err(CheckpointError::NoWeights { dir: dir.to_owned() });
        }
        let malformed = |reason: String| CheckpointError::Index { path: index_path.clone(), reason };
        let text = read_text(&index_path, MAX_INDEX_BYTES)?;
        let index: Index = serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
        let mut shards: BTreeMap<&str, &str> = BTreeMap::new();
        for (tensor, file) in &index.weight_map {
            // A name with a directory in it could make us map a file outside the folder.
            if file.is_empty() || file.contains(['/', '\\', '\0']) || file == "." || file == ".." {
                return Err(malformed(format!("`{tensor}` is said to be in {file:?}, which is not a plain file name")));
            }
            shards.entry(file).or_insert(tensor);
        }
        if shards.is_empty() {
            return Err(malformed("its `weight_map` is empty".into()));
        }
        for (file, tensor) in shards {
            let path = dir.join(file);
            if !path.exists() {
                return Err(CheckpointError::MissingFile { path, tensor: tensor.to_owned() });
            }
            this.add(path)?;
        }
        for (tensor, file) in &index.weight_map {
            let path = dir.join(file);
            let found = this.tensors.get(tensor).or_else(|| this.tensors.get(StoredDtype::without_suffix(tensor)));
            if found.is_none_or(|found| this.files[found.file].path != path) {
                return Err(CheckpointError::NotInShard { path, tensor: tensor.clone() });
            }
        }
        Ok(this)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let map = Arc::new(map(&path)?);
        let (data_start, metadata) = read_header(&path, &map)?;
        self.insert(path, data_start, &metadata, Some(map))
    }

    fn insert(
        &mut self,
        path: PathBuf,
        data_start: usize,
        metadata: &Metadata,
        map: Option<Arc<Mapping>>,
    ) -> Result<(), CheckpointError> {
        let file = self.files.len();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let too_far = || CheckpointError::Overlapping { path: path.clone(), tensor: name.clone() };
            // Only a header whose file was not looked at can overflow.
            let range = data_start + start..data_start.checked_add(end).ok_or_else(too_far)?;
            let (name, dtype, shape) = StoredDtype::of_tensor(&name, info.dtype, &info.shape)?;
            let tensor = Tensor { file, dtype, written: info.dtype, shape, range };
            match self.tensors.entry(name.to_owned()) {
                Entry::Vacant(slot) => slot.insert(tensor),
                Entry::Occupied(slot) => {
                    // Of this file, if it has it under two names.
                    let first = self.files.get(slot.get().file).map_or_else(|| path.clone(), |file| file.path.clone());
                    return Err(CheckpointError::Duplicate { tensor: slot.key().clone(), first, second: path });
                }
            };
        }
        self.files.push(TensorFile { path, map });
        Ok(())
    }

    pub(super) fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// The tensor, if its shape is the expected one and its dtype is supported.
    pub(super) fn expect(&self, name: &str, shape: &[usize]) -> Result<(&Tensor, StoredDtype), CheckpointError> {
        let tensor = self.get(name).ok_or_else(|| CheckpointError::MissingTensor { tensor: name.to_owned() })?;
        if tensor.shape != shape {
            let (expected, found) = (shape.to_vec(), tensor.shape.clone());
            return Err(CheckpointError::Shape { tensor: name.to_owned(), expected, found });
        }
        Ok((tensor, tensor.stored(name)?))
    }

    /// Rows of a tensor seen as a matrix: all dimensions but the last are rows.
    pub(super) fn matrix(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Matrix, CheckpointError> {
        let (tensor, dtype) = self.expect(name, shape)?;
        let (inputs, all_rows) = match shape.split_last() {
            Some((inputs, outer)) => (*inputs, outer.iter().product::<usize>()),
            None => (1, 1),
        };
        let row_bytes = tensor.bytes() / all_rows.max(1);
        let start = tensor.range.start + rows.start * row_bytes;
        let map = self.mapping(name, tensor)?;
        if dtype == StoredDtype::F8E4m3 && shape.len() == 2 && rows.start.is_multiple_of(FP8_TILE) {
            let name = scale_name(name);
            let shape = scale_shape(all_rows, inputs);
            let (tensor, dtype) = self.expect(&name, &shape)?;
            if dtype != StoredDtype::F32 {
                return Err(tensor.unusable(&name));
            }
            let scales = self.mapping(&name, tensor)?;
            check_scales(&scales[tensor.range.clone()], || format!("tensor `{name}`"))?;
            let first = tensor.range.start + rows.start / FP8_TILE * shape[1] * size_of::<f32>();
            return Ok(Matrix::fp8((&map, start), (&scales, first), rows.len(), inputs));
        }
        Matrix::new(&map, start, dtype, rows.len(), inputs).ok_or_else(|| tensor.unusable(name))
    }

    /// Whether there is such a tensor, in this dtype.
    pub(super) fn is_stored(&self, name: &str, dtype: StoredDtype) -> bool {
        self.get(name).is_some_and(|tensor| tensor.dtype == Some(dtype))
    }

    /// The tensor of the scales of a matrix in floats of eight bits, by name and shape; `None` for others.
    pub(super) fn scales_of(&self, name: &str, shape: &[usize]) -> Option<(String, Vec<usize>)> {
        let [outputs, inputs] = *shape else { return None };
        self.is_stored(name, StoredDtype::F8E4m3).then(|| (scale_name(name), scale_shape(outputs, inputs)))
    }

    /// The bytes of a tensor.
    pub(super) fn content(&self, name: &str, shape: &[usize]) -> Result<(Arc<Mapping>, Range<usize>), CheckpointError> {
        let (tensor, _) = self.expect(name, shape)?;
        Ok((self.mapping(name, tensor)?, tensor.range.clone()))
    }

    /// What holds a tensor, whose content is right as far as is known.
    fn mapping(&self, name: &str, tensor: &Tensor) -> Result<Arc<Mapping>, CheckpointError> {
        if let Some(source) = &self.source {
            return open_part(&**source, Part::Trunk(name), tensor.bytes());
        }
        let missing = || CheckpointError::MissingTensor { tensor: name.to_owned() };
        let map = self.files.get(tensor.file).and_then(|file| file.map.as_ref()).ok_or_else(missing)?;
        if let Some(verifier) = &self.verifier {
            let bytes = map.get(tensor.range.clone()).ok_or_else(missing)?;
            verifier.trunk(name, (bytes, tensor.stored(name)?))?;
        }
        Ok(map.clone())
    }

    /// All values, widened to f32; none is infinite or not a number.
    pub(super) fn vector(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        let elements = shape.iter().product();
        let (tensor, dtype) = self.expect(name, shape)?;
        let row = Matrix::new(&self.mapping(name, tensor)?, tensor.range.start, dtype, 1, elements);
        let row = row.ok_or_else(|| tensor.unusable(name))?;
        let mut values = vec![0.0; elements];
        row.widen_row(0, &mut values);
        finite(&values, 0, || format!("tensor `{name}`"))?;
        Ok(values)
    }
}

/// The tensor of the scales of one in floats of eight bits.
pub(super) fn scale_name(name: &str) -> String {
    format!("{name}_scale_inv")
}

/// Its shape.
pub(super) fn scale_shape(outputs: usize, inputs: usize) -> Vec<usize> {
    vec![outputs.div_ceil(FP8_TILE), inputs.div_ceil(FP8_TILE)]
}

/// Refuses scales of floats of eight bits, f32 in `bytes`, that are negative or make any of them infinite.
pub(super) fn check_scales(bytes: &[u8], part: impl FnOnce() -> String) -> Result<(), CheckpointError> {
    /// The largest float of eight bits.
    const LARGEST: f32 = 448.0;
    let (scales, _) = bytes.as_chunks::<4>();
    let usable = |scale: f32| scale.is_sign_positive() && (scale * LARGEST).is_finite();
    match scales.iter().map(|scale| f32::from_le_bytes(*scale)).enumerate().find(|(_, scale)| !usable(*scale)) {
        Some((at, value)) => Err(CheckpointError::Scale { part: part(), at, value }),
        None => Ok(()),
    }
}

/// Refuses values that are infinite or not numbers: those of `what`, from its value number `first` on.
pub(crate) fn finite(values: &[f32], first: usize, what: impl FnOnce() -> String) -> Result<(), CheckpointError> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(CheckpointError::NotFinite { part: what(), at: first + at, value: values[at] }),
        None => Ok(()),
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn map(path: &Path) -> Result<Mapping, CheckpointError> {
    let failed = |source| CheckpointError::Read { path: path.to_owned(), source };
    let file = open_file(path)?;
    let len = file.metadata().map_err(failed)?.len();
    if len < PREFIX as u64 {
        return Err(CheckpointError::Truncated { path: path.to_owned(), expected: PREFIX as u64, found: len });
    }
    Mapping::of(&file).map_err(failed)
}

/// A part of exactly `bytes` bytes.
pub(super) fn open_part(
    source: &dyn PartSource,
    part: Part<'_>,
    bytes: usize,
) -> Result<Arc<Mapping>, CheckpointError> {
    let failed = |source| CheckpointError::Part { part: part.to_string(), source };
    let map = source.open(part).map_err(failed)?;
    if map.len() == bytes { Ok(map) } else { Err(CheckpointError::Mismatch { part: part.to_string() }) }
}

/// `None` where it would overflow.
fn byte_count(shape: &[usize], value_bytes: usize) -> Option<usize> {
    shape.iter().try_fold(value_bytes, |bytes, &size| bytes.checked_mul(size))
}

/// Where the data starts, and what the header says. All offsets have been checked against the file.
fn read_header(path: &Path, bytes: &[u8]) -> Result<(usize, Metadata), CheckpointError> {
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
fn malformed(path: &Path, header: &[u8], reason: String) -> CheckpointError {
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
