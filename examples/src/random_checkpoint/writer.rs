//! Safetensors files, written as a stream: header first, then tensor by tensor in pieces.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

use super::values::{Fill, Stream};
use super::{MakeError, Output, at};

/// Values made at a time.
const PIECE: usize = 1 << 18;
/// Tensor data starts at a multiple of this, so that it can be used where it lies.
const ALIGNMENT: usize = 64;

type Tensor = (String, Vec<usize>);

fn bytes_of(tensor: &Tensor, dtype: Dtype) -> u64 {
    tensor.1.iter().product::<usize>() as u64 * (dtype.bitsize() / 8) as u64
}

pub(super) fn write_weights(
    tensors: &[Tensor],
    output: &Output,
    dir: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), MakeError> {
    let shards = cut(tensors, output.shards, output.dtype)?;
    let total = tensors.iter().map(|tensor| bytes_of(tensor, output.dtype)).sum();
    let tied = !tensors.iter().any(|(name, _)| name == "lm_head.weight");
    let mut done = 0;
    let mut weight_map = BTreeMap::new();
    for (number, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        write_file(shard, output, tied, &dir.join(&file), |written| {
            done += written;
            progress(done, total);
        })?;
        weight_map.extend(shard.iter().map(|(name, _)| (name.clone(), file.clone())));
    }
    if shards.len() > 1 {
        let path = dir.join("model.safetensors.index.json");
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        std::fs::write(&path, format!("{index:#}\n")).map_err(at(&path))?;
    }
    Ok(())
}

/// Cuts the list into `shards` runs of about the same number of bytes, none of them empty.
fn cut(tensors: &[Tensor], shards: usize, dtype: Dtype) -> Result<Vec<&[Tensor]>, MakeError> {
    if shards == 0 || shards > tensors.len() {
        return Err(MakeError::Shards { shards, tensors: tensors.len() });
    }
    let mut runs = Vec::with_capacity(shards);
    let mut rest = tensors;
    for left in (1..=shards).rev() {
        let share = rest.iter().map(|tensor| bytes_of(tensor, dtype)).sum::<u64>() / left as u64;
        let mut count = 0;
        let mut bytes = 0;
        // Each of the other runs needs a tensor too.
        while count < rest.len() + 1 - left && (left == 1 || count == 0 || bytes < share) {
            bytes += bytes_of(&rest[count], dtype);
            count += 1;
        }
        let (run, remaining) = rest.split_at(count);
        runs.push(run);
        rest = remaining;
    }
    Ok(runs)
}

fn write_file(
    tensors: &[Tensor],
    output: &Output,
    tied: bool,
    path: &Path,
    mut progress: impl FnMut(u64),
) -> Result<(), MakeError> {
    let mut file = BufWriter::new(File::create(path).map_err(at(path))?);
    file.write_all(&header(tensors, output.dtype)?).map_err(at(path))?;
    let mut bytes = Vec::new();
    for (name, shape) in tensors {
        let fill = Fill::of(name, shape, tied);
        let mut stream = Stream::new(output.seed, name);
        let mut left = shape.iter().product::<usize>();
        while left > 0 {
            let count = left.min(PIECE);
            bytes.clear();
            stream.write(&fill, output.dtype, count, &mut bytes);
            file.write_all(&bytes).map_err(at(path))?;
            progress(bytes.len() as u64);
            left -= count;
        }
    }
    file.flush().map_err(at(path))
}

/// The length of the JSON text, then the text, padded by spaces.
fn header(tensors: &[Tensor], dtype: Dtype) -> Result<Vec<u8>, MakeError> {
    let mut end = 0;
    let infos = tensors.iter().map(|tensor| {
        let start = end;
        end += bytes_of(tensor, dtype) as usize;
        (tensor.0.clone(), TensorInfo { dtype, shape: tensor.1.clone(), data_offsets: (start, end) })
    });
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let broken = |error: String| MakeError::Header(error);
    let metadata = Metadata::new(Some(format), infos.collect()).map_err(|error| broken(error.to_string()))?;
    let mut text = serde_json::to_vec(&metadata).map_err(|error| broken(error.to_string()))?;
    const LENGTH: usize = size_of::<u64>();
    text.resize((LENGTH + text.len()).next_multiple_of(ALIGNMENT) - LENGTH, b' ');
    Ok([&(text.len() as u64).to_le_bytes()[..], &text].concat())
}
