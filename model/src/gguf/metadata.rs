//! The keys and values at the beginning of a GGUF file.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use super::error::GgufError;

/// A value; text and arrays of numbers stay in the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Flag(bool),
    Text(&'a str),
    Texts(Vec<&'a str>),
    /// All signed and unsigned kinds of at most 32 bits.
    Numbers(Vec<i64>),
    Floats(Vec<f32>),
    /// Arrays of other things: nothing here needs them.
    Other(&'static str),
}

/// Keys and values. Remembers which were asked for, so that those that nobody understands can be named.
#[derive(Debug, Default)]
pub(super) struct Metadata<'a> {
    values: BTreeMap<&'a str, Value<'a>>,
    asked: RefCell<BTreeSet<String>>,
}

impl std::fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unsigned(value) => write!(f, "{value}"),
            Self::Signed(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value}"),
            Self::Flag(value) => write!(f, "{value}"),
            Self::Text(text) => write!(f, "{:?}", text.chars().take(80).collect::<String>()),
            Self::Texts(texts) => write!(f, "an array of {} texts", texts.len()),
            Self::Numbers(numbers) => write!(f, "an array of {} numbers", numbers.len()),
            Self::Floats(numbers) => write!(f, "an array of {} numbers", numbers.len()),
            Self::Other(what) => f.write_str(what),
        }
    }
}

impl<'a> Metadata<'a> {
    /// Adds a key; gives false if it is there.
    pub(super) fn insert(&mut self, key: &'a str, value: Value<'a>) -> bool {
        self.values.insert(key, value).is_none()
    }

    pub(super) fn value(&self, key: &str) -> Option<&Value<'a>> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.values.get(key)
    }

    /// Keys that begin so and that nobody asked for.
    pub(super) fn not_asked(&self, prefix: &str) -> Option<String> {
        let asked = self.asked.borrow();
        self.values.keys().find(|key| key.starts_with(prefix) && !asked.contains(**key)).map(|key| (*key).to_owned())
    }

    pub(super) fn invalid(&self, key: &str, reason: impl Into<String>) -> GgufError {
        let value = self.values.get(key).map_or_else(|| "absent".to_owned(), Value::to_string);
        GgufError::Key { key: key.to_owned(), value, reason: reason.into() }
    }

    fn read<'s, T>(
        &'s self,
        key: &str,
        what: &str,
        read: impl Fn(&'s Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.invalid(key, format!("it must be {what}")))
    }

    /// A whole number. Some writers give one for each layer: it counts if all are the same.
    pub(super) fn whole(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.read(key, "a whole number, 0 or above, the same for all layers", |value| match value {
            Value::Unsigned(value) => Some(*value),
            Value::Signed(value) => u64::try_from(*value).ok(),
            Value::Numbers(values) => {
                let first = *values.first()?;
                values.iter().all(|value| *value == first).then(|| u64::try_from(first).ok())?
            }
            _ => None,
        })
    }

    pub(super) fn required(&self, key: &str) -> Result<u64, GgufError> {
        self.whole(key)?.ok_or_else(|| GgufError::MissingKey { key: key.to_owned() })
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.read(key, "a finite number", |value| match value {
            Value::Float(value) => Some(*value).filter(|value| value.is_finite()),
            _ => None,
        })
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.read(key, "true or false", |value| match value {
            Value::Flag(value) => Some(*value),
            _ => None,
        })
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, GgufError> {
        self.read(key, "a text", |value| match value {
            Value::Text(text) => Some(*text),
            _ => None,
        })
    }

    pub(super) fn texts(&self, key: &str) -> Result<Option<&[&'a str]>, GgufError> {
        self.read(key, "an array of texts", |value| match value {
            Value::Texts(texts) => Some(texts.as_slice()),
            _ => None,
        })
    }

    pub(super) fn numbers(&self, key: &str) -> Result<Option<&[i64]>, GgufError> {
        self.read(key, "an array of whole numbers", |value| match value {
            Value::Numbers(numbers) => Some(numbers.as_slice()),
            _ => None,
        })
    }

    pub(super) fn floats(&self, key: &str) -> Result<Option<&[f32]>, GgufError> {
        self.read(key, "an array of numbers", |value| match value {
            Value::Floats(numbers) => Some(numbers.as_slice()),
            _ => None,
        })
    }
}
