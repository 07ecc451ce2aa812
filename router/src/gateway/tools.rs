//! Calls of tools in what a model writes.

use hanse_model::overlap;
use serde_json::{Value, json};

use super::ask::random_seed;

/// How most open models mark a call; answers that must be one are made to use it.
pub(super) const CALL_BEGINS: &str = "<tool_call>";
pub(super) const CALL_ENDS: &str = "</tool_call>";

/// What calls begin with, by model family: Qwen and Hermes, Granite, Mistral.
const MARKS: [&str; 3] = [CALL_BEGINS, "<|tool_call|>", "[TOOL_CALLS]"];

/// Tells text from calls while both come.
#[derive(Debug, Default)]
pub(super) struct CallFinder {
    /// The beginning of a mark perhaps, or a mark and all that followed it.
    held: String,
    found: bool,
}

impl CallFinder {
    /// Takes more text and gives what is certainly none of a call.
    pub(super) fn push(&mut self, text: &str) -> String {
        self.held.push_str(text);
        if self.found {
            return String::new();
        }
        if let Some(at) = MARKS.iter().filter_map(|mark| self.held.find(mark)).min() {
            self.found = true;
            let calls = self.held.split_off(at);
            return std::mem::replace(&mut self.held, calls);
        }
        let held = MARKS.iter().map(|mark| overlap(&self.held, mark)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - held);
        std::mem::replace(&mut self.held, rest)
    }

    /// The end has come: text that was held back after all, and the calls, as OpenAI writes them.
    pub(super) fn finish(&mut self) -> (String, Vec<Value>) {
        let held = std::mem::take(&mut self.held);
        if !self.found {
            return (held, Vec::new());
        }
        match calls(&held) {
            Some(calls) => (String::new(), calls),
            // Not what it seemed to be.
            None => (held, Vec::new()),
        }
    }
}

/// All calls in a text that consists of nothing else; `None` if there is something else or nothing.
fn calls(text: &str) -> Option<Vec<Value>> {
    let mut calls = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        if let Some(after) = MARKS.iter().find_map(|mark| rest.strip_prefix(mark)).or(rest.strip_prefix(CALL_ENDS)) {
            rest = after.trim_start();
            continue;
        }
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        let value = values.next()?.ok()?;
        let end = values.byte_offset();
        rest = rest[end..].trim_start();
        match value {
            Value::Array(many) => calls.extend(many.iter().map(call).collect::<Option<Vec<_>>>()?),
            one => calls.push(call(&one)?),
        }
    }
    (!calls.is_empty()).then_some(calls)
}

/// A call as a model writes it: `{"name": .., "arguments": {..}}`.
fn call(value: &Value) -> Option<Value> {
    let name = value["name"].as_str()?;
    let arguments = match value.get("arguments").or(value.get("parameters")) {
        None => "{}".to_owned(),
        // Some write a text with JSON in it.
        Some(Value::String(text)) => text.clone(),
        Some(arguments) => arguments.to_string(),
    };
    let id = format!("call_{:016x}", random_seed());
    Some(json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: &[&str]) -> (String, Vec<(String, String)>) {
        let mut finder = CallFinder::default();
        let mut text: String = pieces.iter().map(|piece| finder.push(piece)).collect();
        let (rest, calls) = finder.finish();
        text += &rest;
        let part = |call: &Value, name: &str| call["function"][name].as_str().unwrap().to_owned();
        (text, calls.iter().map(|call| (part(call, "name"), part(call, "arguments"))).collect())
    }

    #[test]
    fn calls_are_found_in_every_familys_form() {
        let expected = vec![("sum".to_owned(), r#"{"a":1}"#.to_owned())];
        for pieces in [
            &["Let me see. <tool", "_call>\n{\"name\": \"sum\", \"argu", "ments\": {\"a\": 1}}\n</tool_call>"][..],
            &["Let me see. <|tool_call|>[{\"name\":\"sum\",\"arguments\":{\"a\":1}}]"],
            &["Let me see. [TOOL_CALLS]", "[{\"name\": \"sum\", \"arguments\": {\"a\":1}}]"],
        ] {
            assert_eq!(read(pieces), ("Let me see. ".to_owned(), expected.clone()), "{pieces:?}");
        }
        let twice =
            "<tool_call>{\"name\":\"a\"}</tool_call>\n<tool_call>{\"name\":\"b\",\"parameters\":\"{}\"}</tool_call>";
        let (text, calls) = read(&[twice]);
        assert_eq!((text.as_str(), calls.len()), ("", 2));
    }

    #[test]
    fn what_only_looks_like_a_call_stays_text() {
        for pieces in [
            &["1 < 2 and <b>", "old</b> <to"][..],
            &["<tool_call>{\"name\": 7}</tool_call>"],
            &["<tool_call>{\"name\": \"a\"", "}</tool_call> and more"],
            &["<tool_call>"],
            &["[TOOL", "_CALLS", " is a word, ü<"],
        ] {
            assert_eq!(read(pieces), (pieces.concat(), Vec::new()), "{pieces:?}");
        }
    }
}
