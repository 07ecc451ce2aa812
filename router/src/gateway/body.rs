//! What may be asked: the fields of OpenAI's requests that mean something here, and how they are read. Others are ignored, as its
//! server does with those that it does not know.

use std::collections::BTreeMap;

use axum::body::HttpBody as _;
use axum::extract::Request;
use futures::StreamExt;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::sync::OwnedSemaphorePermit;

use super::Gateway;
use super::error::ApiError;

/// A body of so many bytes needs no room among the bodies of all: what is small gets in always.
const SMALL: usize = 64 << 10;
/// A body that is so many times larger than allowed is not even read.
const ABSURD: usize = 8;

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

/// A request's body, and the room for it among the bodies of all, if it is large.
pub(super) async fn read(
    gateway: &Gateway,
    request: Request,
) -> Result<(Body, Option<OwnedSemaphorePermit>), ApiError> {
    let limits = &gateway.config;
    let body = request.into_body();
    let most = body.size_hint().upper().and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    let most = most.min(limits.max_body_bytes);
    let room = match most > SMALL {
        true => gateway.bodies.clone().try_acquire_many_owned(super::kibibytes(most)).map(Some).map_err(|_| ()),
        false => Ok(None),
    };
    let reading = collect(body, limits.max_body_bytes, room.is_ok());
    let bytes = tokio::time::timeout(limits.body_timeout, reading).await.map_err(|_| ApiError::too_slow())??;
    let room = room.map_err(|()| ApiError::busy("Many large requests are being read."))?;
    let mut json = serde_json::Deserializer::from_slice(&bytes);
    let body = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        // Where it is not known what is wrong.
        let param = if matches!(path.as_str(), "." | "?") { String::new() } else { path };
        ApiError::invalid(param, format!("The request is not as it should be: {}", error.into_inner()))
    })?;
    json.end().map_err(|error| ApiError::invalid("", format!("The request is not JSON: {error}")))?;
    Ok((body, room))
}

/// The bytes of a body of at most `limit`; none of them unless they are to be `kept`. Many clients look for an answer only after they
/// have sent everything, and to close the connection before would take it from them: what is too much is read and forgotten, so long
/// as it is not absurd.
async fn collect(body: axum::body::Body, limit: usize, kept: bool) -> Result<Vec<u8>, ApiError> {
    let mut chunks = body.into_data_stream();
    let (mut bytes, mut length) = (Vec::new(), 0_usize);
    while let Some(chunk) = chunks.next().await {
        let Ok(chunk) = chunk else { return Err(ApiError::invalid("", "The request ends too early.")) };
        length = length.saturating_add(chunk.len());
        if length > limit.saturating_mul(ABSURD) {
            break;
        } else if length > limit {
            bytes = Vec::new();
        } else if kept {
            bytes.extend_from_slice(&chunk);
        }
    }
    if length > limit { Err(ApiError::too_large(limit)) } else { Ok(bytes) }
}
