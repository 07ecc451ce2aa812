//! The form of a model folder's weights: which tensors a safetensors file holds, its header, and the index of several.

use std::collections::BTreeMap;

use safetensors::Dtype;
use serde_json::json;

use crate::checkpoint::StoredDtype;

/// The index of a folder with several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// A tensor to be written.
#[derive(Debug, Clone)]
pub(crate) struct NewTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl NewTensor {
    /// A tensor of `shape` values that are stored so, under the name that says it; `None` if rows are no whole blocks. Scales that lie
    /// elsewhere are a tensor of their own.
    pub(crate) fn stored(name: &str, stored: StoredDtype, mut shape: Vec<usize>) -> Option<Self> {
        let dtype = stored.in_file();
        if dtype == Dtype::U8 {
            let columns = shape.last_mut()?;
            *columns = stored.bytes(*columns)?;
        }
        Some(Self { name: format!("{name}{}", stored.suffix().unwrap_or_default()), dtype, shape })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.bitsize() as u64 / 8
    }
}

/// The name of one of `all` files, counted from 0.
pub(crate) fn name(number: usize, all: usize) -> String {
    match all {
        1 => "model.safetensors".to_owned(),
        all => format!("model-{:05}-of-{all:05}.safetensors", number + 1),
    }
}

/// Which tensors each file holds, of at most so many bytes unless a single tensor has more. In a file those with the largest values are
/// first, so that all are aligned.
pub(super) fn cut(tensors: &[NewTensor], most: u64) -> Vec<Vec<usize>> {
    let (mut shards, mut bytes) = (vec![Vec::new()], 0);
    for (number, tensor) in tensors.iter().enumerate() {
        if bytes > 0 && bytes + tensor.bytes() > most {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += tensor.bytes();
        if let Some(last) = shards.last_mut() {
            last.push(number);
        }
    }
    for shard in &mut shards {
        shard.sort_by_key(|number| std::cmp::Reverse(tensors[*number].dtype.bitsize()));
    }
    shards
}

/// Length and text of a file's header.
pub(crate) fn header<'a>(shard: impl IntoIterator<Item = &'a NewTensor>) -> Vec<u8> {
    let mut entries = serde_json::Map::new();
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut start = 0;
    for tensor in shard {
        let NewTensor { name, dtype, shape } = tensor;
        let end = start + tensor.bytes();
        entries.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] }));
        start = end;
    }
    let mut text = serde_json::Value::Object(entries).to_string().into_bytes();
    // So that data begins at a multiple of eight bytes.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    header
}

/// The text of the index: in which file each tensor lies.
pub(crate) fn index<'a>(tensors: impl IntoIterator<Item = (&'a NewTensor, String)>) -> String {
    let (mut files, mut bytes) = (BTreeMap::new(), 0);
    for (tensor, file) in tensors {
        bytes += tensor.bytes();
        files.insert(tensor.name.as_str(), file);
    }
    format!("{:#}\n", json!({ "metadata": { "total_size": bytes }, "weight_map": files }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_end_where_the_limit_is_and_larger_values_are_first() {
        let tensor = |name: &str, dtype, len| NewTensor { name: name.to_owned(), dtype, shape: vec![len] };
        let tensors = [
            tensor("a", Dtype::F16, 3),
            tensor("b", Dtype::F32, 2),
            tensor("c", Dtype::F32, 9),
            tensor("d", Dtype::F16, 1),
        ];
        assert_eq!(cut(&tensors, 14), [vec![1, 0], vec![2], vec![3]]);
        let parsed: serde_json::Value = serde_json::from_slice(&header([&tensors[1], &tensors[0]])[8..]).unwrap();
        assert_eq!(parsed["a"], json!({ "dtype": "F16", "shape": [3], "data_offsets": [8, 14] }));
    }

    #[test]
    fn a_stored_tensor_is_read_back_as_what_it_was() {
        let all = [
            StoredDtype::F32,
            StoredDtype::F16,
            StoredDtype::Bf16,
            StoredDtype::Q8_0,
            StoredDtype::Q4K,
            StoredDtype::F8E4m3,
        ];
        for stored in all {
            let tensor = NewTensor::stored("a.weight", stored, vec![3, 512]).unwrap();
            assert_eq!(tensor.bytes(), stored.bytes(3 * 512).unwrap() as u64);
            let read = StoredDtype::of_tensor(&tensor.name, tensor.dtype, &tensor.shape).unwrap();
            assert_eq!(read, ("a.weight", Some(stored), vec![3, 512]));
        }
        assert!(NewTensor::stored("a.weight", StoredDtype::Q8_0, vec![512, 3]).is_none(), "no whole blocks");
    }
}
