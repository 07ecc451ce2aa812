//! What may be asked: the fields of OpenAI's requests that mean something here. Others are ignored, as its server does with those
//! that it does not know.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

/// A request to either endpoint; each looks at its own fields.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Body {
    pub(super) model: Option<String>,
    pub(super) messages: Option<Vec<Map<String, Value>>>,
    pub(super) prompt: Option<Prompts>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    pub(super) max_tokens: Option<u64>,
    pub(super) max_completion_tokens: Option<u64>,
    pub(super) temperature: Option<f32>,
    pub(super) top_p: Option<f32>,
    pub(super) top_k: Option<u32>,
    pub(super) n: Option<u32>,
    pub(super) best_of: Option<u32>,
    pub(super) stop: Option<OneOrMany>,
    pub(super) seed: Option<i64>,
    pub(super) presence_penalty: Option<f32>,
    pub(super) frequency_penalty: Option<f32>,
    pub(super) logit_bias: Option<BTreeMap<String, f32>>,
    pub(super) logprobs: Option<Logprobs>,
    pub(super) top_logprobs: Option<u32>,
    pub(super) echo: Option<bool>,
    pub(super) suffix: Option<String>,
    pub(super) response_format: Option<ResponseFormat>,
    pub(super) tools: Option<Vec<Tool>>,
    pub(super) tool_choice: Option<ToolChoice>,
}

impl Body {
    /// Whether its answers may have to obey a format.
    pub(super) fn may_have_a_format(&self) -> bool {
        self.response_format.is_some() || self.tool_choice.is_some()
    }
}

/// A text, tokens, or several of either.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    ManyTokens(Vec<Vec<u32>>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct StreamOptions {
    pub(super) include_usage: bool,
}

/// Whether to tell log probabilities (chat), or of how many tokens in each place (completions).
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
pub(super) enum Logprobs {
    Wanted(bool),
    Count(u32),
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: JsonSchema },
}

#[derive(Debug, Deserialize)]
pub(super) struct JsonSchema {
    #[serde(default)]
    pub(super) schema: Option<Value>,
}

/// A tool that the model may call, as OpenAI describes it.
#[derive(Debug, Clone, Deserialize, serde::Serialize)]
pub(super) struct Tool {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) function: Function,
}

#[derive(Debug, Clone, Deserialize, serde::Serialize)]
pub(super) struct Function {
    pub(super) name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) description: Option<String>,
    #[serde(default)]
    pub(super) parameters: Option<Value>,
}

/// `none`, `auto`, `required`, or one tool.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum ToolChoice {
    Mode(String),
    One { function: Named },
}

#[derive(Debug, Deserialize)]
pub(super) struct Named {
    pub(super) name: String,
}
