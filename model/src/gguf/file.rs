//! The form of a GGUF file: header, metadata, descriptions of tensors, their data. Every byte may be a lie.
//!
//! Source: docs/gguf.md of ggml.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::blocks::BlockType;
use super::error::GgufError;
use super::metadata::{Metadata, Value};
use crate::checkpoint::{Mapping, open_file};

const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 17;
/// Elements of an array: vocabularies have hundreds of thousands.
const MAX_ELEMENTS: u64 = 1 << 22;
/// Bytes of a text: chat templates are the longest.
const MAX_TEXT: u64 = 1 << 24;
const MAX_NAME: u64 = 1 << 16;
const MAX_DIMENSIONS: u32 = 4;
const MAX_ALIGNMENT: u64 = 1 << 20;
const DEFAULT_ALIGNMENT: u64 = 32;
/// Files that a model may be cut into.
const MAX_FILES: u64 = 1024;

/// The files of a model, mapped. They must not be truncated meanwhile.
#[derive(Debug)]
pub(super) struct Files {
    paths: Vec<PathBuf>,
    maps: Vec<Mapping>,
}

/// What the files say.
#[derive(Debug)]
pub(super) struct Gguf<'a> {
    /// Of the first file.
    pub(super) metadata: Metadata<'a>,
    pub(super) tensors: BTreeMap<&'a str, Entry<'a>>,
    /// Bytes of all tensors.
    pub(super) bytes: u64,
}

/// A tensor.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    pub(super) kind: &'static BlockType,
    /// The slowest dimension first, as in safetensors.
    pub(super) shape: Vec<usize>,
    /// All of its blocks.
    pub(super) data: &'a [u8],
}

impl Files {
    /// Opens a file and, if it is the first of several, the others beside it.
    pub(super) fn open(path: &Path) -> Result<Self, GgufError> {
        let mut this = Self { paths: vec![path.to_owned()], maps: vec![map(path)?] };
        let count = Parsed::of(path, &this.maps[0])?.metadata.whole("split.count")?.unwrap_or(1);
        if count > 1 {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let first = format!("-00001-of-{count:05}.gguf");
            let Some(stem) = name.strip_suffix(&first).filter(|_| count <= MAX_FILES) else {
                let reason = format!("it is one of {count} files: give the first, whose name ends in {first}");
                return Err(GgufError::NotGguf { path: path.to_owned(), reason });
            };
            for number in 2..=count {
                let path = path.with_file_name(format!("{stem}-{number:05}-of-{count:05}.gguf"));
                this.maps.push(map(&path)?);
                this.paths.push(path);
            }
        }
        Ok(this)
    }

    /// Reads what they say and checks it.
    pub(super) fn parse(&self) -> Result<Gguf<'_>, GgufError> {
        let (mut metadata, mut tensors, mut bytes) = (None, BTreeMap::new(), 0);
        for (number, (path, map)) in self.paths.iter().zip(&self.maps).enumerate() {
            let parsed = Parsed::of(path, map)?;
            let (no, count) = (parsed.metadata.whole("split.no")?, parsed.metadata.whole("split.count")?);
            if number > 0 && (no != Some(number as u64) || count != Some(self.paths.len() as u64)) {
                let reason = format!("it is not file {} of {}", number + 1, self.paths.len());
                return Err(GgufError::NotGguf { path: path.clone(), reason });
            }
            for (name, entry) in parsed.tensors {
                bytes += entry.data.len() as u64;
                if tensors.insert(name, entry).is_some() {
                    return Err(GgufError::Tensor { tensor: name.to_owned(), reason: "it is there twice".to_owned() });
                }
            }
            metadata.get_or_insert(parsed.metadata);
        }
        let metadata = metadata.unwrap_or_default();
        if let Some(expected) = metadata.whole("split.tensors.count")?.filter(|_| self.paths.len() > 1)
            && expected != tensors.len() as u64
        {
            return Err(metadata.invalid("split.tensors.count", format!("the files hold {}", tensors.len())));
        }
        Ok(Gguf { metadata, tensors, bytes })
    }
}

fn map(path: &Path) -> Result<Mapping, GgufError> {
    let file = open_file(path)?;
    Mapping::of(&file).map_err(|source| GgufError::Read { path: path.to_owned(), source })
}

/// One file.
struct Parsed<'a> {
    metadata: Metadata<'a>,
    tensors: Vec<(&'a str, Entry<'a>)>,
}

/// A tensor's description, before its data is looked for.
struct Described<'a> {
    name: &'a str,
    kind: &'static BlockType,
    shape: Vec<usize>,
    range: Range<u64>,
}

impl<'a> Parsed<'a> {
    fn of(path: &Path, bytes: &'a [u8]) -> Result<Self, GgufError> {
        let mut reader = Reader { path, bytes, at: 0 };
        let not_gguf = |reason: &str| GgufError::NotGguf { path: path.to_owned(), reason: reason.to_owned() };
        if bytes.get(..4) != Some(b"GGUF") {
            return Err(not_gguf("it does not begin with GGUF"));
        }
        reader.at = 4;
        match reader.u32("the version")? {
            2 | 3 => {}
            1 => return Err(not_gguf("version 1 is not supported; newer tools write version 3")),
            version if version.swap_bytes() <= 3 => return Err(not_gguf("its numbers are big-endian")),
            version => return Err(not_gguf(&format!("its version is {version}; supported are 2 and 3"))),
        }
        let tensor_count = reader.count("tensors", MAX_TENSORS)?;
        let key_count = reader.count("metadata keys", MAX_KEYS)?;
        let mut metadata = Metadata::default();
        for _ in 0..key_count {
            let key = reader.text("a metadata key", MAX_NAME)?;
            let kind = reader.u32(key)?;
            let value = reader.value(key, kind)?;
            if !metadata.insert(key, value) {
                return Err(reader.damaged(format!("`{key}` is there twice")));
            }
        }
        let alignment = metadata.whole("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
            return Err(metadata.invalid("general.alignment", "it must be a power of two, at most 1048576"));
        }
        let mut described = Vec::new();
        for _ in 0..tensor_count {
            described.push(reader.tensor(alignment)?);
        }
        let start = (reader.at as u64).next_multiple_of(alignment);
        let tensors = place(path, bytes, start, described)?;
        Ok(Self { metadata, tensors })
    }
}

/// Finds the tensors' data, which must lie in the file and must not overlap.
fn place<'a>(
    path: &Path,
    bytes: &'a [u8],
    start: u64,
    mut described: Vec<Described<'a>>,
) -> Result<Vec<(&'a str, Entry<'a>)>, GgufError> {
    described.sort_by_key(|tensor| (tensor.range.start, tensor.range.end));
    let mut before = 0;
    let mut placed = Vec::with_capacity(described.len());
    for Described { name, kind, shape, range } in described {
        let wrong = |reason: &str| GgufError::Tensor { tensor: name.to_owned(), reason: reason.to_owned() };
        if range.start < before {
            return Err(wrong("its bytes overlap another tensor's"));
        }
        before = range.end;
        let data = start
            .checked_add(range.start)
            .zip(start.checked_add(range.end))
            .and_then(|(start, end)| bytes.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?));
        let data = data.ok_or_else(|| wrong(&format!("its bytes end beyond the end of {}", path.display())))?;
        placed.push((name, Entry { kind, shape, data }));
    }
    Ok(placed)
}

/// Reads numbers and texts one after another.
struct Reader<'r, 'a> {
    path: &'r Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'_, 'a> {
    fn damaged(&self, what: impl Into<String>) -> GgufError {
        GgufError::Damaged { path: self.path.to_owned(), what: what.into() }
    }

    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], GgufError> {
        let end = usize::try_from(len).ok().and_then(|len| self.at.checked_add(len));
        let taken = end.and_then(|end| Some((end, self.bytes.get(self.at..end)?)));
        let (end, taken) = taken.ok_or_else(|| self.damaged(format!("it ends within {what}")))?;
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let taken = self.take(N as u64, what)?;
        taken.try_into().map_err(|_| self.damaged(format!("it ends within {what}")))
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn count(&mut self, what: &str, most: u64) -> Result<u64, GgufError> {
        let count = self.u64(what)?;
        if count > most {
            return Err(self.damaged(format!("it says that it has {count} {what}; at most {most} are read")));
        }
        Ok(count)
    }

    fn text(&mut self, what: &str, most: u64) -> Result<&'a str, GgufError> {
        let len = self.u64(what)?;
        if len > most {
            return Err(self.damaged(format!("{what} has {len} bytes; at most {most} are read")));
        }
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|_| self.damaged(format!("{what} is not UTF-8 text")))
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value<'a>, GgufError> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            // As written in decimals: 1e-5 and not 9.999999747378752e-6.
            6 => Value::Float(decimal(f32::from_le_bytes(self.array(key)?))),
            7 => match self.array::<1>(key)? {
                [0] => Value::Flag(false),
                [1] => Value::Flag(true),
                [other] => return Err(self.damaged(format!("`{key}` is {other}, neither true nor false"))),
            },
            8 => Value::Text(self.text(key, MAX_TEXT)?),
            9 => self.list(key)?,
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err(self.damaged(format!("`{key}` has a value of type {other}, which does not exist"))),
        })
    }

    fn list(&mut self, key: &str) -> Result<Value<'a>, GgufError> {
        let kind = self.u32(key)?;
        let count = self.u64(key)?;
        if count > MAX_ELEMENTS {
            return Err(self.damaged(format!("`{key}` has {count} elements; at most {MAX_ELEMENTS} are read")));
        }
        // A text has at least its length, so what the file holds bounds what is allocated.
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(self.damaged(format!("`{key}` is an array of arrays, which is not supported"))),
            other => return Err(self.damaged(format!("`{key}` has elements of type {other}, which does not exist"))),
        };
        if count * size > (self.bytes.len() - self.at) as u64 {
            return Err(self.damaged(format!("it ends within `{key}`")));
        }
        if kind == 8 {
            let texts = (0..count).map(|_| self.text(key, MAX_TEXT)).collect::<Result<_, _>>()?;
            return Ok(Value::Texts(texts));
        }
        let bytes = self.take(count * size, key)?;
        let whole = |number: fn(&[u8]) -> i64| Value::Numbers(bytes.chunks_exact(size as usize).map(number).collect());
        Ok(match kind {
            0 => whole(|bytes| bytes[0].into()),
            1 => whole(|bytes| bytes[0].cast_signed().into()),
            2 => whole(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]).into()),
            3 => whole(|bytes| i16::from_le_bytes([bytes[0], bytes[1]]).into()),
            4 => whole(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]).into()),
            5 => whole(|bytes| i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]).into()),
            6 => Value::Floats(
                bytes
                    .chunks_exact(4)
                    .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
                    .collect(),
            ),
            7 => Value::Other("an array of flags"),
            _ => Value::Other("an array of 64-bit numbers"),
        })
    }

    fn tensor(&mut self, alignment: u64) -> Result<Described<'a>, GgufError> {
        let name = self.text("a tensor's name", MAX_NAME)?;
        let wrong = |reason: String| GgufError::Tensor { tensor: name.to_owned(), reason };
        let dimensions = self.u32(name)?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(wrong(format!("it has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64(name)?;
            // Sizes of models are checked later; this keeps products in range.
            shape.push(
                usize::try_from(size)
                    .ok()
                    .filter(|size| (1..=1 << 31).contains(size))
                    .ok_or_else(|| wrong(format!("it has a dimension of {size}, not 1 to 2147483648")))?,
            );
        }
        let kind = self.u32(name)?;
        let kind = BlockType::of(kind).map_err(wrong)?;
        let start = self.u64(name)?;
        if !start.is_multiple_of(alignment) {
            return Err(wrong(format!("it begins at {start}, which is not a multiple of {alignment}")));
        }
        if !shape[0].is_multiple_of(kind.values) {
            let reason =
                format!("its rows of {} values are no whole blocks of {} ({})", shape[0], kind.values, kind.name);
            return Err(wrong(reason));
        }
        let values = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size as u64));
        let end = values
            .and_then(|values| (values / kind.values as u64).checked_mul(kind.bytes as u64))
            .and_then(|bytes| start.checked_add(bytes))
            .ok_or_else(|| wrong("it is larger than any file".to_owned()))?;
        shape.reverse();
        Ok(Described { name, kind, shape, range: start..end })
    }
}

/// The shortest decimal number that is this f32.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(value.into())
}
