//! The safetensors files of a checkpoint: which tensor lies where.

mod files;
mod header;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use safetensors::tensor::Dtype;

use super::dtype::StoredDtype;
use super::error::CheckpointError;
use super::mapping::Mapping;
use super::parts::{Part, PartSource, TrunkPart, Verifier};
use crate::linear::{FP8_TILE, Matrix};

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
