//! What a model's folder says about generating with it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::checkpoint::{CheckpointError, read_text};
use crate::sampling::SamplingParams;

const MAX_BYTES: u64 = 16 << 20;

/// The defaults of `generation_config.json`; what it leaves out comes from `config.json`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationDefaults {
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
    /// Draw at random instead of taking the best token.
    pub do_sample: bool,
    /// See [`SamplingParams`](crate::SamplingParams).
    pub temperature: Option<f32>,
    /// See [`SamplingParams`](crate::SamplingParams).
    pub top_k: Option<usize>,
    /// See [`SamplingParams`](crate::SamplingParams).
    pub top_p: Option<f32>,
}

/// Why the defaults could not be read. The folder is at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerationDefaultsError {
    /// A file could not be read.
    #[error(transparent)]
    Read(#[from] CheckpointError),
    /// A file is not a JSON object.
    #[error("{} is not a JSON object", path.display())]
    NotJson {
        /// The file.
        path: PathBuf,
    },
    /// A key's value makes no sense.
    #[error("{}: `{key}` is {value}, which makes no sense", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Its value as JSON.
        value: String,
    },
}

impl GenerationDefaults {
    /// How tokens are drawn where nobody says otherwise: as the folder recommends.
    pub fn sampling(&self, seed: u64) -> SamplingParams {
        let temperature = if self.do_sample { self.temperature.unwrap_or(1.0) } else { 0.0 };
        SamplingParams { temperature, top_k: self.top_k, top_p: self.top_p, seed, ..SamplingParams::default() }
    }

    /// Reads `generation_config.json` and `config.json`; either may be absent.
    ///
    /// # Errors
    /// If one is there and malformed.
    pub fn load(dir: &Path) -> Result<Self, GenerationDefaultsError> {
        let mut this = Self::default();
        // The first file that has a key counts.
        for name in ["generation_config.json", "config.json"] {
            let path = dir.join(name);
            if !path.exists() {
                continue;
            }
            let Ok(Value::Object(map)) = serde_json::from_str(&read_text(&path, MAX_BYTES)?) else {
                return Err(GenerationDefaultsError::NotJson { path });
            };
            let file = Keys { path, map };
            if this.eos_token_ids.is_empty() {
                this.eos_token_ids = file.tokens("eos_token_id")?;
            }
            this.bos_token_id = this.bos_token_id.or(file.tokens("bos_token_id")?.first().copied());
            let unit = |v: &f64| (0.0..=1.0).contains(v);
            this.temperature = this.temperature.or(file.number("temperature", |v| *v >= 0.0)?.map(|v| v as f32));
            this.top_p = this.top_p.or(file.number("top_p", unit)?.map(|v| v as f32));
            this.top_k = this.top_k.or(file.number("top_k", |v| *v >= 0.0 && v.fract() == 0.0)?.map(|v| v as usize));
            this.do_sample |= file.read("do_sample", Value::as_bool)?.unwrap_or(false);
        }
        Ok(this)
    }
}

struct Keys {
    path: PathBuf,
    map: serde_json::Map<String, Value>,
}

impl Keys {
    fn read<T>(
        &self,
        key: &'static str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, GenerationDefaultsError> {
        match self.map.get(key).filter(|value| !value.is_null()) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| GenerationDefaultsError::Invalid {
                path: self.path.clone(),
                key,
                value: value.to_string().chars().take(80).collect(),
            }),
        }
    }

    fn number(&self, key: &'static str, accept: impl Fn(&f64) -> bool) -> Result<Option<f64>, GenerationDefaultsError> {
        self.read(key, |value| value.as_f64().filter(|v| v.is_finite() && accept(v)))
    }

    /// One token or a list of tokens.
    fn tokens(&self, key: &'static str) -> Result<Vec<u32>, GenerationDefaultsError> {
        let token = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let tokens = self.read(key, |value| match value.as_array() {
            Some(list) => list.iter().map(token).collect::<Option<Vec<_>>>(),
            None => token(value).map(|id| vec![id]),
        })?;
        Ok(tokens.unwrap_or_default())
    }
}
