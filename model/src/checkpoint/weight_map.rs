//! Where the parts of a model lie in its files.

use std::path::PathBuf;
use std::sync::Arc;

use super::error::CheckpointError;
use super::parts::{ExpertParts, Parts, Piece, Run, TrunkPart, WeightMap};
use super::tensors::{Tensor, TensorFiles};
use super::{Checkpoint, Inner, read_config};

impl Checkpoint {
    /// Where the parts lie in the folder's files.
    ///
    /// # Errors
    /// `MixedDtypes`. A checkpoint that is no folder has no files: `MissingTensor`.
    pub fn weight_map(&self) -> Result<WeightMap, CheckpointError> {
        self.inner.weight_map()
    }
}

/// Where the parts of a model with this `config.json` lie in safetensors files of which only the headers are at hand:
/// for each file its name and its first bytes, up to the end of the header.
///
/// # Errors
/// As [`Checkpoint::open`].
pub fn weight_map_of_headers(config_text: &str, headers: Vec<(String, Vec<u8>)>) -> Result<WeightMap, CheckpointError> {
    let (family, spec) = read_config(config_text)?;
    let tensors = Arc::new(TensorFiles::of_headers(headers)?);
    let config_text = config_text.to_owned();
    let inner = Inner { dir: PathBuf::new(), config_text, spec, family, tensors, experts: None, head: None };
    inner.check()?;
    inner.weight_map()
}

impl Inner {
    fn weight_map(&self) -> Result<WeightMap, CheckpointError> {
        let found = |name: &str| {
            let missing = || CheckpointError::MissingTensor { tensor: name.to_owned() };
            let tensor = self.tensors.get(name).filter(|_| self.experts.is_none()).ok_or_else(missing)?;
            Ok::<_, CheckpointError>((tensor, tensor.stored(name)?))
        };
        let piece = |tensor: &Tensor, start: usize, end: usize| Piece {
            file: tensor.file,
            offset: (tensor.range.start + start) as u64,
            bytes: (end - start) as u64,
        };
        let mut names = self.trunk_tensors();
        names.sort();
        let (mut trunk_parts, mut trunk) = (Vec::new(), Vec::new());
        for (name, shape) in names {
            let (tensor, dtype) = found(&name)?;
            trunk.push(piece(tensor, 0, tensor.bytes()));
            trunk_parts.push(TrunkPart { name, dtype, shape });
        }
        let (mut expert_parts, mut experts) = (Vec::new(), Vec::new());
        for (layer, moe) in self.spec.moe_layers() {
            let mut runs: Option<Vec<Run>> = None;
            let mut pieces = Vec::with_capacity(moe.experts);
            for expert in 0..moe.experts {
                let (mut stored, mut at) = (Vec::new(), Vec::new());
                for run in self.expert_runs(layer, expert, moe) {
                    let (tensor, dtype) = found(&run.name)?;
                    let range = run.range(tensor);
                    stored.push(Run { dtype, values: run.values() as u64 });
                    at.push(piece(tensor, range.start, range.end));
                }
                if runs.as_ref().is_some_and(|runs| *runs != stored) {
                    return Err(CheckpointError::MixedDtypes { layer });
                }
                runs = Some(stored);
                pieces.push(at);
            }
            expert_parts.push(ExpertParts { layer, experts: moe.experts, runs: runs.unwrap_or_default() });
            experts.push(pieces);
        }
        let name_of = |path: &PathBuf| path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let files = self.tensors.files.iter().map(|file| name_of(&file.path)).collect();
        Ok(WeightMap { files, parts: Parts { trunk: trunk_parts, experts: expert_parts }, trunk, experts })
    }
}
