//! `config.json`, read as the hostile file it may be: every key is fetched through a check that names it.

use serde_json::{Map, Value};

/// What is wrong with `config.json`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// It is not a JSON object.
    #[error("config.json is not a JSON object: {0}")]
    NotJson(String),
    /// A key that has no default is absent.
    #[error("config.json has no `{key}`{}", or_also(*also))]
    Missing {
        /// The absent key.
        key: String,
        /// What other versions of the format call it.
        also: Option<&'static str>,
    },
    /// A key's value makes no sense.
    #[error("config.json: `{key}` is {value}, but {reason}")]
    Invalid {
        /// The key; `a.b` is key `b` inside object `a`.
        key: String,
        /// Its value as JSON.
        value: String,
        /// What it should have been.
        reason: String,
    },
    /// The family is known, and something that it needs is not there yet.
    #[error("model family `{found}` is not supported: it needs {missing}")]
    UnsupportedFamily {
        /// The `model_type` found.
        found: String,
        /// What is missing.
        missing: &'static str,
    },
    /// No family has this `model_type`.
    #[error("unknown model family `{found}`; known families: {known}")]
    UnknownFamily {
        /// The `model_type` found.
        found: String,
        /// Names of all known families.
        known: String,
    },
}

fn or_also(also: Option<&str>) -> String {
    also.map_or_else(String::new, |also| format!(" (nor `{also}`)"))
}

/// One JSON object of `config.json`: the whole file, or an object inside it.
#[derive(Clone)]
pub(crate) struct Config<'a> {
    map: &'a Map<String, Value>,
    path: String,
}

/// Parses the text of a `config.json`.
///
/// Python writes `NaN` and `Infinity`, which are not JSON: they are read as strings, so that the error names their key.
pub(crate) fn parse(text: &str) -> Result<Map<String, Value>, ConfigError> {
    match serde_json::from_str(&quote_non_finite(text)) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(ConfigError::NotJson("it is another kind of JSON value".into())),
        Err(error) => Err(ConfigError::NotJson(error.to_string())),
    }
}

fn quote_non_finite(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(first) = rest.chars().next() {
        let word = ["NaN", "-Infinity", "Infinity"].into_iter().find(|word| rest.starts_with(word));
        match word {
            Some(word) if !in_string => {
                out.push('"');
                out.push_str(word);
                out.push('"');
                rest = &rest[word.len()..];
                continue;
            }
            _ => {}
        }
        out.push(first);
        rest = &rest[first.len_utf8()..];
        if in_string && first == '\\' {
            if let Some(escaped) = rest.chars().next() {
                out.push(escaped);
                rest = &rest[escaped.len_utf8()..];
            }
        } else if first == '"' {
            in_string = !in_string;
        }
    }
    out
}

impl<'a> Config<'a> {
    pub(crate) fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, path: String::new() }
    }

    fn name(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// The error for a key whose value makes no sense.
    pub(crate) fn invalid(&self, key: &str, reason: impl Into<String>) -> ConfigError {
        let value = self.map.get(key).map_or_else(|| "absent".to_owned(), Value::to_string);
        let value =
            if value.chars().count() > 80 { value.chars().take(77).chain("...".chars()).collect() } else { value };
        ConfigError::Invalid { key: self.name(key), value, reason: reason.into() }
    }

    /// The key is there, be it null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The value, `None` when absent or null.
    pub(crate) fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The error for a key that must be there.
    pub(crate) fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing { key: self.name(key), also: None }
    }

    /// A whole number from `min` to `max`, `None` when absent or null.
    pub(crate) fn whole(&self, key: &str, min: usize, max: usize) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value
            .as_u64()
            .or_else(|| value.as_f64().filter(|v| v.fract() == 0.0 && (0.0..9e15).contains(v)).map(|v| v as u64))
            .and_then(|v| usize::try_from(v).ok())
            .filter(|v| (min..=max).contains(v))
            .map(Some)
            .ok_or_else(|| self.invalid(key, format!("it must be a whole number from {min} to {max}")))
    }

    /// A whole number from 1 to `max` that must be there.
    pub(crate) fn size(&self, key: &str, max: usize) -> Result<usize, ConfigError> {
        self.whole(key, 1, max)?.ok_or_else(|| self.missing(key))
    }

    /// A whole number from 1 to `max` that must be there under one of two names.
    pub(crate) fn size_of_either(&self, keys: [&'static str; 2], max: usize) -> Result<usize, ConfigError> {
        let missing = || ConfigError::Missing { key: self.name(keys[0]), also: Some(keys[1]) };
        self.whole(self.first(&keys), 1, max)?.ok_or_else(missing)
    }

    /// A finite number that `accept` accepts, `None` when absent or null.
    pub(crate) fn number(&self, key: &str, accept: fn(f64) -> bool, what: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value
            .as_f64()
            .filter(|v| v.is_finite() && (*v as f32).is_finite() && accept(*v))
            .map(Some)
            .ok_or_else(|| self.invalid(key, format!("it must be {what}")))
    }

    /// A number above zero, `None` when absent or null.
    pub(crate) fn positive(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.number(key, |v| v > 0.0 && v as f32 > 0.0, "a finite number above 0")
    }

    /// A number above zero that must be there.
    pub(crate) fn required_positive(&self, key: &str) -> Result<f64, ConfigError> {
        self.positive(key)?.ok_or_else(|| self.missing(key))
    }

    /// True or false, `default` when absent or null.
    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        match self.value(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.invalid(key, "it must be true or false")),
        }
    }

    /// A string, `None` when absent or null.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.invalid(key, "it must be a string")),
        }
    }

    /// A list, `None` when absent or null.
    pub(crate) fn list(&self, key: &str) -> Result<Option<&'a [Value]>, ConfigError> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => {
                value.as_array().map(|list| Some(list.as_slice())).ok_or_else(|| self.invalid(key, "it must be a list"))
            }
        }
    }

    /// An object inside this one, `None` when absent, null or empty.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Config<'a>>, ConfigError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Config { map, path: self.name(key) })),
            Some(_) => Err(self.invalid(key, "it must be an object")),
        }
    }

    /// The first key of `keys` that is there and not null, else the first.
    pub(crate) fn first<'k>(&self, keys: &[&'k str]) -> &'k str {
        keys.iter().find(|key| self.value(key).is_some()).unwrap_or(&keys[0])
    }

    /// Keys of this object that hold objects.
    pub(crate) fn nested(&self) -> impl Iterator<Item = &'a str> {
        self.map.iter().filter(|(_, value)| value.is_object()).map(|(key, _)| key.as_str())
    }
}
