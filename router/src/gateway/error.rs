//! What goes wrong, in OpenAI's form.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hanse_model::ForwardError;
use serde_json::{Value, json};

use super::ask::Kind;
use crate::generate::GenerateError;

/// An error as a client gets it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    message: String,
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
    /// Seconds after which it is worth trying again.
    retry_after: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), kind, param: None, code: None, retry_after: None }
    }

    /// The request makes no sense; `param` is what in it.
    pub(super) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let param = Some(param.into()).filter(|param| !param.is_empty());
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message) }
    }

    pub(super) fn unknown_model(name: &str, ours: &str) -> Self {
        let name: String = name.chars().take(80).collect();
        Self {
            status: StatusCode::NOT_FOUND,
            code: Some("model_not_found"),
            ..Self::invalid("model", format!("The model `{name}` is not served here; this gateway serves `{ours}`."))
        }
    }

    pub(super) fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", "There is nothing at this address.")
    }

    pub(super) fn method_not_allowed() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", "This address does not take this method.")
    }

    pub(super) fn too_large(limit: usize) -> Self {
        let message = format!("The request is larger than {limit} bytes.");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    pub(super) fn too_slow() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", "The request did not arrive in time.")
    }

    pub(super) fn no_key() -> Self {
        let message = "The API key is missing or wrong: send `Authorization: Bearer KEY`.";
        Self { code: Some("invalid_api_key"), ..Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message) }
    }

    /// As it stands in a body or in an event.
    pub(super) fn document(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind, "param": self.param, "code": self.code } })
    }
}

impl ApiError {
    /// Too much is asked at a time.
    pub(super) fn busy(message: impl Into<String>) -> Self {
        Self {
            code: Some("rate_limit_exceeded"),
            retry_after: Some(1),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", message)
        }
    }

    /// This server is at fault.
    pub(super) fn defect() -> Self {
        let message = "This server has failed; its log says more.";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// Why a generation for a request of this `kind` failed.
    pub(super) fn of(kind: Kind, error: &GenerateError) -> Self {
        let message = chain(error);
        let prompt = kind.prompt();
        match error {
            GenerateError::PromptTooLong { tokens, context } => Self {
                code: Some("context_length_exceeded"),
                ..Self::invalid(
                    prompt,
                    format!(
                        "This model's maximum context length is {context} tokens, and your {prompt} has {tokens}: \
                         leave room for at least one token of the answer."
                    ),
                )
            },
            GenerateError::EmptyPrompt => Self::invalid(prompt, message),
            GenerateError::Sampling(_) => Self::invalid("", message),
            GenerateError::Grammar(_) => Self::invalid("response_format", message),
            GenerateError::Forward(ForwardError::TokenOutOfRange { .. }) => Self::invalid(prompt, message),
            GenerateError::Busy { .. } => Self::busy(message),
            GenerateError::Forward(ForwardError::Experts { .. }) => Self {
                code: Some("experts_unavailable"),
                retry_after: Some(5),
                ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
            },
            _ => {
                tracing::error!(%message, "a generation failed");
                Self::defect()
            }
        }
    }
}

/// An error's text with those of its causes that say something new.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.document())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
