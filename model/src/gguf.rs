//! GGUF files, as llama.cpp and its relatives have them, made model folders once.
//!
//! The folder has the tensors under the names of the model hubs, in the dtypes that are computed with: other blocks are widened.
//! Whatever in the file changes the model and is not understood is refused by name.

mod architectures;
mod blocks;
mod error;
mod file;
mod metadata;
mod names;
mod plan;
mod source;
mod tokenizer;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

pub use error::GgufError;

use crate::checkpoint::{Checkpoint, StoredDtype};
use crate::folder::{Filling, NewFolder};
use crate::tokenizer::Tokenizer;
use file::Files;
use plan::{Plan, plan};
use source::Source;

/// What was in a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// `general.architecture`.
    pub architecture: String,
    /// `general.name`.
    pub name: Option<String>,
    /// Tensors in the file.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// How many of them were left out: those of layers that predict further tokens.
    pub left_out: usize,
    /// How many are stored in each type.
    pub types: BTreeMap<&'static str, usize>,
    /// The kind of tokenizer and, where there is one, of pre-tokenizer.
    pub tokenizer: String,
    /// It has a chat template.
    pub chat_template: bool,
}

/// Makes a model folder `out` of a GGUF file, or of several of which `path` is the first. Tensors that the file holds quantised are
/// written as `to`; if that is `None`, matrices in Q8_0 and Q4_K and the experts of gpt-oss in MXFP4 stay as they are, which are computed so,
/// and others become f16. Tensors in f32, f16 and bf16 stay as they are. `progress` is told bytes of the file done and bytes in all.
///
/// The file is mapped: it must not be truncated meanwhile. Memory is bounded by what the metadata need.
///
/// # Errors
/// What is wrong with the file or not supported, by name; what goes wrong with the folder. Nothing is left of `out` then.
pub fn import_gguf(
    path: &Path,
    to: Option<StoredDtype>,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Imported, GgufError> {
    let to = to.map(|to| to.plain().ok_or(GgufError::Precision(to))).transpose()?;
    let files = Files::open(path)?;
    let gguf = files.parse()?;
    let mut model = architectures::read(&gguf)?;
    let vocabulary = tokenizer::read(&gguf.metadata)?;
    let rows = model.config.get("vocab_size").and_then(Value::as_u64).unwrap_or(0);
    if vocabulary.len() as u64 > rows {
        let reason = format!("there are {} tokens and {rows} embeddings", vocabulary.len());
        return Err(GgufError::Tensor { tensor: "token_embd.weight".to_owned(), reason });
    }
    vocabulary.tokens_of_config(&mut model.config);
    let Plan { tensors, sources, left_out } = plan(&gguf, &model, to)?;
    if sources.iter().any(Source::is_microscaled) {
        model.config.insert("quantization_config".to_owned(), json!({ "quant_method": "mxfp4" }));
    }
    let config_text = format!("{:#}\n", Value::from(model.config));
    let folder = NewFolder::create(out)?;
    let mut done = 0;
    folder.tensors(&tensors, |number, file| {
        sources[number].write(file)?;
        done += sources[number].bytes();
        progress(done, gguf.bytes);
        Ok::<_, Filling<GgufError>>(())
    })?;
    folder.file("config.json", config_text.as_bytes())?;
    for (name, text) in vocabulary.files() {
        folder.file(name, text.as_bytes())?;
    }
    // What was written must be what a node or a client can open.
    Checkpoint::open(folder.path())?;
    Tokenizer::load(folder.path())?.chat_template()?;
    folder.finish()?;
    let mut types = BTreeMap::new();
    for entry in gguf.tensors.values() {
        *types.entry(entry.kind.name).or_default() += 1;
    }
    Ok(Imported {
        architecture: model.architecture.name.to_owned(),
        name: gguf.metadata.text("general.name")?.map(|name| name.chars().take(200).collect()),
        tensors: gguf.tensors.len(),
        bytes: gguf.bytes,
        left_out,
        types,
        tokenizer: vocabulary.kind(),
        chat_template: vocabulary.has_chat_template(),
    })
}

#[cfg(test)]
mod tests;
