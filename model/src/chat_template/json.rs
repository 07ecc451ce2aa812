//! `tojson` as transformers sets it up: Python's `json.dumps`, without escaping HTML.

use std::io::{Result as IoResult, Write};

use minijinja::value::{Kwargs, Rest};
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::Formatter;

use super::Bounded;

const MAX_INDENT: usize = 16;
/// The arguments, in the order in which they may be given without their names.
const ARGUMENTS: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];

pub(super) fn to_json(value: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    if positional.len() > ARGUMENTS.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let mut arguments = [const { None }; ARGUMENTS.len()];
    for (i, (argument, name)) in arguments.iter_mut().zip(ARGUMENTS).enumerate() {
        let given: Option<Value> = match positional.get(i) {
            Some(value) => Some(value.clone()),
            None => kwargs.get(name)?,
        };
        *argument = given.filter(|value| !value.is_none() && !value.is_undefined());
    }
    kwargs.assert_all_used()?;
    let [ascii, indent, separators, sort_keys] = arguments;
    let python = Python::new(ascii.is_some_and(|flag| flag.is_true()), indent, separators)?;
    let json = write(value, python.clone())?;
    if !sort_keys.is_some_and(|flag| flag.is_true()) {
        return Ok(json);
    }
    let mut sorted: serde_json::Value = serde_json::from_str(&write(value, Python::default())?).map_err(failed)?;
    sorted.sort_all_objects();
    write(&sorted, python)
}

fn write(value: &impl Serialize, python: Python) -> Result<String, Error> {
    let mut out = Bounded(Vec::new());
    value.serialize(&mut Serializer::with_formatter(&mut out, python)).map_err(failed)?;
    String::from_utf8(out.0).map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::BadSerialization, error.to_string())
}

/// How Python writes JSON.
#[derive(Debug, Clone)]
struct Python {
    ascii: bool,
    /// One step of indentation; `None` writes everything on one line.
    indent: Option<String>,
    between_items: String,
    after_key: String,
    depth: usize,
    /// The array or object that ends has something in it.
    filled: bool,
}

impl Default for Python {
    fn default() -> Self {
        let (between_items, after_key) = (", ".to_owned(), ": ".to_owned());
        Self { ascii: false, indent: None, between_items, after_key, depth: 0, filled: false }
    }
}

impl Python {
    fn new(ascii: bool, indent: Option<Value>, separators: Option<Value>) -> Result<Self, Error> {
        let mut this = Self { ascii, ..Self::default() };
        if let Some(indent) = indent {
            let text = match indent.as_str() {
                Some(text) => text.chars().take(MAX_INDENT).collect(),
                None => " ".repeat(usize::try_from(i64::try_from(indent)?).unwrap_or(0).min(MAX_INDENT)),
            };
            this.indent = Some(text);
            this.between_items = ",".to_owned();
        }
        if let Some(separators) = separators {
            let both: Vec<Value> = separators.try_iter()?.collect();
            let [items, key] = &both[..] else {
                return Err(Error::new(ErrorKind::InvalidOperation, "`separators` must be two strings"));
            };
            (this.between_items, this.after_key) = (items.to_string(), key.to_string());
        }
        Ok(this)
    }

    fn new_line<W: ?Sized + Write>(&self, writer: &mut W) -> IoResult<()> {
        let Some(indent) = &self.indent else { return Ok(()) };
        writer.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| writer.write_all(indent.as_bytes()))
    }

    fn begin<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> IoResult<()> {
        self.depth += 1;
        self.filled = false;
        writer.write_all(bracket)
    }

    fn end<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> IoResult<()> {
        self.depth -= 1;
        if self.filled {
            self.new_line(writer)?;
        }
        self.filled = true;
        writer.write_all(bracket)
    }

    fn item<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> IoResult<()> {
        if !first {
            writer.write_all(self.between_items.as_bytes())?;
        }
        self.filled = true;
        self.new_line(writer)
    }
}

impl Formatter for Python {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> IoResult<()> {
        self.begin(writer, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> IoResult<()> {
        self.end(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> IoResult<()> {
        self.item(writer, first)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> IoResult<()> {
        self.begin(writer, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> IoResult<()> {
        self.end(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> IoResult<()> {
        self.item(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> IoResult<()> {
        writer.write_all(self.after_key.as_bytes())
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> IoResult<()> {
        if !self.ascii {
            return writer.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            match c {
                ' '..='~' => writer.write_all(&[c as u8])?,
                _ => c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(writer, "\\u{unit:04x}"))?,
            }
        }
        Ok(())
    }
}
