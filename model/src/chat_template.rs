//! Chat templates: Jinja as transformers sets it up, with bounds on what a template may cost.

mod clock;
mod generation;
mod json;
mod methods;

use std::collections::BTreeMap;
use std::io::Write;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, Serde};
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::{Deserialize, Serialize};

/// Bytes of a template.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Bytes that a template may write.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// Steps that a template may take; also bounds its memory, to about 64 bytes for each.
const FUEL: u64 = 4_000_000;
const NAME: &str = "chat_template";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// Turns a conversation into a prompt.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and the like.
    tokens: BTreeMap<&'static str, String>,
}

/// Why a template could not be read or rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatTemplateError {
    /// The template is larger than 1 MiB.
    #[error("the chat template has {bytes} bytes, more than {MAX_SOURCE_BYTES}")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// The template is not valid Jinja. The folder is at fault.
    #[error("the chat template is malformed: {0:#}")]
    Malformed(Error),
    /// The template refused the conversation, failed, or exceeded its bounds.
    #[error("the chat template failed: {0:#}")]
    Failed(Error),
}

impl ChatTemplate {
    pub(crate) fn new(
        source: &str,
        tokens: impl Iterator<Item = (&'static str, String)>,
    ) -> Result<Self, ChatTemplateError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(ChatTemplateError::TooLarge { bytes: source.len() });
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(ChatTemplateError::Malformed)?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(methods::call);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        // What Jinja has and minijinja leaves to others: truncate, wordcount, cycler, joiner and more.
        minijinja_contrib::add_to_environment(&mut environment);
        // That one wants a list; Jinja's takes the items one by one.
        environment.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.0));
        environment.add_filter("tojson", json::to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            clock::strftime(&format, now.as_secs())
        });
        environment
            .add_template_owned(NAME, generation::without_marks(source))
            .map_err(ChatTemplateError::Malformed)?;
        Ok(Self { environment, tokens: tokens.collect() })
    }

    /// The prompt for a conversation; `add_generation_prompt` ends it with the beginning of the assistant's answer.
    /// It already has the special tokens that the model wants: encode it without adding more.
    ///
    /// # Errors
    /// If the template refuses the conversation or takes more than its bounds.
    pub fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String, ChatTemplateError> {
        self.render_with(messages, None::<()>, add_generation_prompt)
    }

    /// As [`Self::render`], for messages with whatever fields the template reads, such as `tool_calls`, and with tools as it
    /// expects them: commonly a list of `{"type": "function", "function": {..}}`.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_with(
        &self,
        messages: &[impl Serialize],
        tools: Option<impl Serialize>,
        add_generation_prompt: bool,
    ) -> Result<String, ChatTemplateError> {
        let given = [
            ("messages", Value::from(Serde(messages))),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("tools", tools.map_or(Value::from(()), |tools| Value::from(Serde(tools)))),
            ("documents", Value::from(())),
        ];
        let tokens = self.tokens.iter().map(|(name, token)| (*name, Value::from(token)));
        let values = Value::from_pairs(given.into_iter().chain(tokens));
        let mut output = Bounded(Vec::new());
        let template = self.environment.get_template(NAME).map_err(ChatTemplateError::Failed)?;
        template.render_captured_to(values, &mut output).map_err(ChatTemplateError::Failed)?;
        String::from_utf8(output.0)
            .map_err(|error| ChatTemplateError::Failed(Error::new(ErrorKind::InvalidOperation, error.to_string())))
    }
}

/// Collects what a template writes, up to a bound.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(std::io::Error::other(format!("it writes more than {MAX_OUTPUT_BYTES} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
