//! What comes of a request, in OpenAI's words.

use hanse_model::VocabularyToken;
use serde_json::{Map, Value, json};

use super::ask::{Ask, Kind};
use crate::generate::{FinishReason, ScoredToken};

/// Writes the documents of one response.
#[derive(Debug)]
pub(super) struct Writer {
    kind: Kind,
    id: String,
    created: u64,
    model: String,
}

impl Writer {
    pub(super) fn new(ask: &Ask, created: u64, model: &str) -> Self {
        let prefix = if ask.kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{:016x}{:016x}", super::ask::random_seed(), super::ask::random_seed());
        Self { kind: ask.kind, id, created, model: model.to_owned() }
    }

    fn document(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        let mut document = Map::new();
        document.insert("id".into(), self.id.clone().into());
        document.insert("object".into(), object.into());
        document.insert("created".into(), self.created.into());
        document.insert("model".into(), self.model.clone().into());
        document.insert("choices".into(), choices.into());
        document
    }

    /// A piece of a stream; `usage` is null, a document or absent.
    pub(super) fn chunk(&self, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let object = if self.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" };
        let mut document = self.document(object, choices);
        document.extend(usage.map(|usage| ("usage".to_owned(), usage)));
        document.into()
    }

    /// A whole response.
    pub(super) fn whole(&self, choices: Vec<Value>, usage: Value) -> Value {
        let object = if self.kind == Kind::Chat { "chat.completion" } else { "text_completion" };
        let mut document = self.document(object, choices);
        document.insert("usage".into(), usage);
        document.into()
    }

    /// A choice in a stream: some text, calls of tools, or its end.
    pub(super) fn delta(
        &self,
        index: usize,
        text: &str,
        is_first: bool,
        calls: &[Value],
        logprobs: Value,
        reason: Option<&str>,
    ) -> Value {
        if self.kind == Kind::Text {
            return json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": reason });
        }
        let mut delta = Map::new();
        if is_first {
            delta.insert("role".into(), "assistant".into());
        }
        if is_first || !text.is_empty() {
            delta.insert("content".into(), text.into());
        }
        if !calls.is_empty() {
            let numbered = calls.iter().enumerate().map(|(at, call)| {
                let mut call = call.clone();
                call["index"] = at.into();
                call
            });
            delta.insert("tool_calls".into(), numbered.collect());
        }
        json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason })
    }

    /// A whole choice.
    pub(super) fn choice(&self, index: usize, text: &str, calls: Vec<Value>, logprobs: Value, reason: &str) -> Value {
        if self.kind == Kind::Text {
            return json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": reason });
        }
        let content = if text.is_empty() && !calls.is_empty() { Value::Null } else { text.into() };
        let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
        if !calls.is_empty() {
            message["tool_calls"] = calls.into();
        }
        json!({ "index": index, "message": message, "logprobs": logprobs, "finish_reason": reason })
    }

    /// Log probabilities of some tokens. For completions `offset` is where their text begins, in characters.
    pub(super) fn logprobs(&self, vocabulary: &[VocabularyToken], tokens: &[ScoredToken], offset: usize) -> Value {
        match self.kind {
            Kind::Chat => {
                let entry = |id: u32, logprob: Option<f32>| {
                    let bytes = bytes(vocabulary, id);
                    json!({ "token": String::from_utf8_lossy(bytes), "logprob": finite(logprob), "bytes": bytes })
                };
                let content = tokens.iter().map(|thought| {
                    let mut document = entry(thought.id, thought.logprob);
                    document["top_logprobs"] = thought.top.iter().map(|(id, value)| entry(*id, Some(*value))).collect();
                    document
                });
                json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
            }
            Kind::Text => {
                let name = |id: u32| name(vocabulary, id);
                let mut at = offset;
                let offsets = tokens.iter().map(|thought| {
                    let begins = at;
                    at += String::from_utf8_lossy(bytes(vocabulary, thought.id)).chars().count();
                    begins
                });
                let top = tokens.iter().map(|thought| match thought.logprob {
                    None => Value::Null,
                    Some(_) => thought.top.iter().map(|(id, value)| (name(*id), json!(finite(Some(*value))))).collect(),
                });
                json!({
                    "text_offset": offsets.collect::<Vec<_>>(),
                    "tokens": tokens.iter().map(|thought| name(thought.id)).collect::<Vec<_>>(),
                    "token_logprobs": tokens.iter().map(|thought| finite(thought.logprob)).collect::<Vec<_>>(),
                    "top_logprobs": top.collect::<Vec<_>>(),
                })
            }
        }
    }
}

fn bytes(vocabulary: &[VocabularyToken], id: u32) -> &[u8] {
    vocabulary.get(id as usize).map_or(&[], |token| token.bytes.as_slice())
}

/// A token's text, or its bytes if they are no text, so that different tokens have different names.
fn name(vocabulary: &[VocabularyToken], id: u32) -> String {
    match std::str::from_utf8(bytes(vocabulary, id)) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            bytes(vocabulary, id).iter().map(|byte| format!("\\x{byte:02x}")).fold("bytes:".into(), |a, b| a + &b)
        }
    }
}

/// JSON has no infinity: OpenAI writes -9999 for what is impossible.
fn finite(logprob: Option<f32>) -> Option<f32> {
    logprob.map(|value| if value.is_finite() { value } else { -9999.0 })
}

pub(super) fn usage(prompt_tokens: usize, completion_tokens: usize) -> Value {
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    })
}

pub(super) fn reason(reason: FinishReason, calls: bool) -> &'static str {
    match reason {
        _ if calls => "tool_calls",
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}
