//! Text to tokens and back, with the folder's `tokenizer.json`.

mod stream;
mod vocabulary;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

pub use stream::TextStream;
pub use vocabulary::VocabularyToken;

use crate::chat_template::{ChatTemplate, ChatTemplateError};
use crate::checkpoint::{CheckpointError, read_text};

const MAX_CONFIG_BYTES: u64 = 64 << 20;
const MAX_TOKENIZER_BYTES: u64 = 512 << 20;

/// A model's tokenizer and chat template. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    dir: Arc<Path>,
}

/// Why a tokenizer could not be loaded or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A file could not be read.
    #[error(transparent)]
    Read(#[from] CheckpointError),
    /// `tokenizer.json` is malformed.
    #[error("{} is not a tokenizer: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the tokenizer library says.
        reason: String,
    },
    /// `tokenizer_config.json` or `special_tokens_map.json` is malformed.
    #[error("{}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The chat template is malformed.
    #[error(transparent)]
    ChatTemplate(#[from] ChatTemplateError),
    /// A text could not be encoded.
    #[error("cannot encode the text: {0}")]
    Encode(String),
    /// Tokens could not be decoded.
    #[error("cannot decode the tokens: {0}")]
    Decode(String),
}

impl Tokenizer {
    /// Reads `tokenizer.json`.
    ///
    /// # Errors
    /// If `tokenizer.json` is absent or malformed.
    pub fn load(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let text = read_text(&path, MAX_TOKENIZER_BYTES)?;
        let malformed =
            |error: tokenizers::Error| TokenizerError::Malformed { path: path.clone(), reason: error.to_string() };
        let mut inner = tokenizers::Tokenizer::from_bytes(text.as_bytes()).map_err(malformed)?;
        // Files may carry the settings of their last training run; encoding here never cuts nor pads.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(malformed)?;
        Ok(Self { inner: Arc::new(inner), dir: dir.into() })
    }

    /// The tokens of a text. Special tokens written out in the text are recognised; `add_special_tokens` adds those
    /// that the model wants around a text.
    ///
    /// # Errors
    /// If the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        Ok(encoding.map_err(|error| TokenizerError::Encode(error.to_string()))?.get_ids().to_vec())
    }

    /// The text of tokens. An incomplete character at the end becomes U+FFFD; use [`Tokenizer::stream`] to hold it back.
    /// Tokens that are not in the vocabulary are left out.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        self.inner.decode(ids, skip_special_tokens).map_err(|error| TokenizerError::Decode(error.to_string()))
    }

    /// Decodes tokens one by one as they come.
    pub fn stream(&self, skip_special_tokens: bool) -> TextStream {
        TextStream::new(self.clone(), skip_special_tokens)
    }

    /// What turns a conversation into a prompt, from `chat_template.jinja` or `tokenizer_config.json`; `None` if the
    /// model has no chat template. Read when asked for: a bad template keeps nobody from using the tokenizer.
    ///
    /// # Errors
    /// If the template, `tokenizer_config.json` or `special_tokens_map.json` is malformed.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, TokenizerError> {
        read_chat_template(&self.dir)
    }

    /// Tokens that it knows, with added ones.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The number of a token written exactly so.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }
}

fn read_chat_template(dir: &Path) -> Result<Option<ChatTemplate>, TokenizerError> {
    let path = dir.join("tokenizer_config.json");
    let config = read_json(&path)?;
    let file = dir.join("chat_template.jinja");
    let source = if file.exists() {
        Some(read_text(&file, MAX_CONFIG_BYTES)?)
    } else {
        match &config["chat_template"] {
            Value::Null => None,
            Value::String(source) => Some(source.clone()),
            Value::Array(named) => {
                let default = named.iter().find(|entry| entry["name"] == "default");
                let source = default.and_then(|entry| entry["template"].as_str());
                let missing = || TokenizerError::Config {
                    path: path.clone(),
                    reason: "`chat_template` is a list without a template named `default`".into(),
                };
                Some(source.ok_or_else(missing)?.to_owned())
            }
            _ => {
                let reason = "`chat_template` must be a string or a list of templates with names".into();
                return Err(TokenizerError::Config { path, reason });
            }
        }
    };
    let Some(source) = source else { return Ok(None) };
    // Older folders name the tokens only there.
    let map = read_json(&dir.join("special_tokens_map.json"))?;
    let tokens = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
        .into_iter()
        .filter_map(|name| {
            let token = config.get(name).or_else(|| map.get(name))?;
            // A string, or an object of the token's properties.
            let text = token.as_str().or_else(|| token["content"].as_str())?;
            Some((name, text.to_owned()))
        });
    Ok(Some(ChatTemplate::new(&source, tokens)?))
}

/// `Null` if the file is absent.
fn read_json(path: &Path) -> Result<Value, TokenizerError> {
    if !path.exists() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&read_text(path, MAX_CONFIG_BYTES)?)
        .map_err(|error| TokenizerError::Config { path: path.to_owned(), reason: error.to_string() })
}
