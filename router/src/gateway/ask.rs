//! A request, checked and made into generations.

use std::sync::Arc;

use hanse_model::{ForwardError, SamplingParams};
use serde_json::{Map, Value};

use super::Gateway;
use super::body::{Body, Logprobs, OneOrMany, Prompts, ResponseFormat, Tool, ToolChoice};
use super::error::ApiError;
use crate::generate::{GenerateRequest, Grammar};

/// Answers of one request, over all its prompts.
const MOST_CHOICES: usize = 64;
const MOST_STOPS: usize = 16;
const LONGEST_STOP: usize = 1024;
const MOST_LOGPROBS: u32 = 20;
const MOST_BIASES: usize = 1024;
const MOST_MESSAGES: usize = 4096;
const MOST_TOOLS: usize = 128;
/// What OpenAI gives an answer on the completions endpoint if nobody says how long it may be.
const DEFAULT_COMPLETION: u64 = 16;

/// Which endpoint was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Chat,
    Text,
}

impl Kind {
    /// The field that says what to continue.
    pub(super) fn prompt(self) -> &'static str {
        match self {
            Self::Chat => "messages",
            Self::Text => "prompt",
        }
    }
}

/// What is to be done.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) kind: Kind,
    /// One for each choice, in the order of their indices.
    pub(super) requests: Vec<GenerateRequest>,
    /// Tokens of the prompts, each counted once.
    pub(super) prompt_tokens: usize,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    /// Whether to tell log probabilities.
    pub(super) logprobs: bool,
    /// Whether the prompt is part of the answer.
    pub(super) echo: bool,
    /// Whether calls of tools are looked for in the text.
    pub(super) tools: bool,
}

impl Ask {
    pub(super) fn new(gateway: &Gateway, kind: Kind, body: Body) -> Result<Self, ApiError> {
        match &body.model {
            Some(model) if gateway.is_model(model) => {}
            Some(model) => return Err(ApiError::unknown_model(model, &gateway.config.name)),
            None => return Err(ApiError::invalid("model", "Say which `model` you mean.")),
        }
        let tools = Tools::of(&body)?;
        let prompts = match kind {
            Kind::Chat => vec![chat_prompt(gateway, &body, tools.shown)?],
            Kind::Text => text_prompts(gateway, &body)?,
        };
        let n = body.n.unwrap_or(1) as usize;
        if n == 0 {
            return Err(ApiError::invalid("n", "`n` must be 1 at least."));
        }
        if body.best_of.is_some_and(|best_of| best_of as usize != n) {
            return Err(ApiError::invalid("best_of", "`best_of` other than `n` is not supported."));
        }
        if body.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::invalid("suffix", "`suffix` is not supported."));
        }
        // More than that would be refused whenever it is asked.
        let most = MOST_CHOICES.min(gateway.client.engine_config().capacity());
        if prompts.len().saturating_mul(n) > most {
            return Err(ApiError::invalid(
                "n",
                format!("A request may have {most} answers at most, over all its prompts."),
            ));
        }
        let (logprobs, top_logprobs) = logprobs(kind, &body)?;
        let echo = kind == Kind::Text && body.echo.unwrap_or(false);
        let max_tokens = max_tokens(kind, &body, echo)?;
        let grammar = grammar(gateway, &body, &tools)?;
        let sampling = sampling(gateway, &body)?;
        let stop = stops(&body)?;
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        let choices = prompts.iter().flat_map(|prompt| (0..n as u64).map(move |choice| (prompt, choice)));
        let requests = choices.map(|(prompt, choice)| GenerateRequest {
            prompt: prompt.clone(),
            max_tokens: max_tokens.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX)),
            sampling: SamplingParams { seed: sampling.seed.wrapping_add(choice), ..sampling.clone() },
            stop: stop.clone(),
            ignore_eos: false,
            top_logprobs,
            prompt_logprobs: echo && logprobs,
            grammar: grammar.clone(),
        });
        Ok(Self {
            kind,
            requests: requests.collect(),
            prompt_tokens,
            stream: body.stream.unwrap_or(false),
            include_usage: body.stream_options.as_ref().is_some_and(|options| options.include_usage),
            logprobs,
            echo,
            tools: !tools.offered.is_empty(),
        })
    }
}

/// The tools of a request.
struct Tools<'a> {
    /// Those that may be called.
    offered: Vec<&'a Tool>,
    /// Those that the model is told of.
    shown: &'a [Tool],
    /// Whether one must be called.
    required: bool,
}

impl<'a> Tools<'a> {
    fn of(body: &'a Body) -> Result<Self, ApiError> {
        let all = body.tools.as_deref().unwrap_or_default();
        if all.len() > MOST_TOOLS {
            return Err(ApiError::invalid("tools", format!("A request may have {MOST_TOOLS} tools at most.")));
        }
        if let Some(tool) = all.iter().find(|tool| tool.kind != "function") {
            return Err(ApiError::invalid("tools", format!("Tools of type `{}` are not supported.", tool.kind)));
        }
        let every = || all.iter().collect::<Vec<_>>();
        let (offered, required) = match &body.tool_choice {
            None => (every(), false),
            Some(ToolChoice::Mode(mode)) => match mode.as_str() {
                "none" => (Vec::new(), false),
                "auto" => (every(), false),
                "required" => (every(), true),
                _ => return Err(ApiError::invalid("tool_choice", "`tool_choice` is none, auto, required or a tool.")),
            },
            Some(ToolChoice::One { function }) => {
                (all.iter().filter(|tool| tool.function.name == function.name).collect(), true)
            }
        };
        if required && offered.is_empty() {
            return Err(ApiError::invalid("tool_choice", "`tool_choice` wants a tool that is not among `tools`."));
        }
        Ok(Self { offered, shown: all, required })
    }
}

fn chat_prompt(gateway: &Gateway, body: &Body, tools: &[Tool]) -> Result<Vec<u32>, ApiError> {
    let messages = body.messages.as_deref().filter(|messages| !messages.is_empty());
    let messages = messages.ok_or_else(|| ApiError::invalid("messages", "`messages` must have a message."))?;
    if messages.len() > MOST_MESSAGES {
        return Err(ApiError::invalid("messages", format!("A chat may have {MOST_MESSAGES} messages at most.")));
    }
    let template = gateway.template.as_ref();
    let template = template.ok_or_else(|| ApiError::invalid("messages", "This model has no chat template."))?;
    let messages = messages.iter().enumerate().map(|(at, given)| message(at, given)).collect::<Result<Vec<_>, _>>()?;
    let tools = (!tools.is_empty()).then_some(tools);
    let text = template.render_with(&messages, tools, true);
    let text = text.map_err(|error| ApiError::invalid("messages", error.to_string()))?;
    encode(gateway, Kind::Chat, &text)
}

/// A message in the form that chat templates read: the content one text, arguments of calls as objects.
fn message(at: usize, given: &Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    let invalid = |what: &str, text: &str| ApiError::invalid(format!("messages[{at}].{what}"), text);
    let mut message = given.clone();
    match given.get("role").and_then(Value::as_str) {
        Some("developer") => message.insert("role".into(), "system".into()),
        Some("system" | "user" | "assistant" | "tool" | "function") => None,
        Some(_) => return Err(invalid("role", "`role` is system, developer, user, assistant or tool.")),
        None => return Err(invalid("role", "A message needs a `role`.")),
    };
    let content = match given.get("content") {
        None | Some(Value::Null) if given.contains_key("tool_calls") => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let texts = parts.iter().map(|part| (part["type"] == "text").then(|| part["text"].as_str()).flatten());
            let texts: Option<Vec<&str>> = texts.collect();
            texts.ok_or_else(|| invalid("content", "Only parts of type `text` are supported."))?.concat()
        }
        _ => return Err(invalid("content", "`content` must be a text or a list of text parts.")),
    };
    message.insert("content".into(), content.into());
    for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        if let Some(parsed) = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok()) {
            *arguments = parsed;
        }
    }
    Ok(message)
}

fn text_prompts(gateway: &Gateway, body: &Body) -> Result<Vec<Vec<u32>>, ApiError> {
    let encoded =
        |texts: &[String]| texts.iter().map(|text| encode(gateway, Kind::Text, text)).collect::<Result<_, _>>();
    let prompts: Vec<Vec<u32>> = match &body.prompt {
        None => return Err(ApiError::invalid("prompt", "`prompt` is missing.")),
        Some(Prompts::Texts(none)) if none.is_empty() => {
            return Err(ApiError::invalid("prompt", "`prompt` must not be empty."));
        }
        Some(Prompts::Text(text)) => vec![encode(gateway, Kind::Text, text)?],
        Some(Prompts::Texts(texts)) if texts.len() <= MOST_CHOICES => encoded(texts)?,
        Some(Prompts::Tokens(tokens)) => vec![tokens.clone()],
        Some(Prompts::ManyTokens(many)) if many.len() <= MOST_CHOICES => many.clone(),
        Some(_) => return Err(ApiError::invalid("prompt", format!("At most {MOST_CHOICES} prompts at a time."))),
    };
    let vocab_size = gateway.client.spec().vocab_size;
    if let Some(&token) = prompts.iter().flatten().find(|token| **token as usize >= vocab_size) {
        return Err(ApiError::of(Kind::Text, &ForwardError::TokenOutOfRange { token, vocab_size }.into()));
    }
    Ok(prompts)
}

/// Tokens of a text. A chat's template writes the special ones itself.
fn encode(gateway: &Gateway, kind: Kind, text: &str) -> Result<Vec<u32>, ApiError> {
    let tokenizer = gateway.client.tokenizer().ok_or_else(ApiError::not_found)?;
    tokenizer.encode(text, kind == Kind::Text).map_err(|error| ApiError::of(kind, &error.into()))
}

/// Whether log probabilities are wanted, and of how many tokens in each place.
fn logprobs(kind: Kind, body: &Body) -> Result<(bool, usize), ApiError> {
    let (param, wanted, top) = match (kind, body.logprobs, body.top_logprobs) {
        (Kind::Text, None, _) => ("logprobs", false, 0),
        (Kind::Text, Some(Logprobs::Wanted(wanted)), _) => ("logprobs", wanted, 0),
        (Kind::Text, Some(Logprobs::Count(count)), _) => ("logprobs", true, count),
        (Kind::Chat, Some(Logprobs::Wanted(true)), top) => ("top_logprobs", true, top.unwrap_or(0)),
        (Kind::Chat, None | Some(Logprobs::Wanted(false)), None | Some(0)) => ("top_logprobs", false, 0),
        (Kind::Chat, None | Some(Logprobs::Wanted(false)), Some(_)) => {
            return Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true."));
        }
        (Kind::Chat, Some(Logprobs::Count(_)), _) => {
            return Err(ApiError::invalid("logprobs", "`logprobs` is true or false; `top_logprobs` is a number."));
        }
    };
    if top > MOST_LOGPROBS {
        return Err(ApiError::invalid(param, format!("At most {MOST_LOGPROBS} log probabilities in a place.")));
    }
    Ok((wanted, top as usize))
}

/// The most tokens of an answer; `None` for what the context has room for.
fn max_tokens(kind: Kind, body: &Body, echo: bool) -> Result<Option<u64>, ApiError> {
    let given = body.max_completion_tokens.or(body.max_tokens);
    if given == Some(0) && !echo {
        return Err(ApiError::invalid("max_tokens", "`max_tokens` must be 1 at least."));
    }
    Ok(given.or((kind == Kind::Text).then_some(DEFAULT_COMPLETION)))
}

fn sampling(gateway: &Gateway, body: &Body) -> Result<SamplingParams, ApiError> {
    let bounds = [
        ("temperature", body.temperature, 0.0..=2.0),
        ("top_p", body.top_p, 0.0..=1.0),
        ("presence_penalty", body.presence_penalty, -2.0..=2.0),
        ("frequency_penalty", body.frequency_penalty, -2.0..=2.0),
    ];
    for (name, value, bounds) in bounds {
        if value.is_some_and(|value| !bounds.contains(&value)) {
            let (least, most) = bounds.into_inner();
            return Err(ApiError::invalid(name, format!("`{name}` must be between {least} and {most}.")));
        }
    }
    let biases = body.logit_bias.iter().flatten().map(|(token, bias)| Some((token.parse().ok()?, *bias)));
    let logit_bias: Option<Vec<(u32, f32)>> = biases.collect();
    let vocab_size = gateway.client.spec().vocab_size;
    let is_fine = |(token, bias): &(u32, f32)| (*token as usize) < vocab_size && (-100.0..=100.0).contains(bias);
    let logit_bias = logit_bias.filter(|biases| biases.len() <= MOST_BIASES && biases.iter().all(is_fine));
    let Some(logit_bias) = logit_bias else {
        let text = format!(
            "`logit_bias` maps at most {MOST_BIASES} token numbers below {vocab_size} to values between -100 and 100."
        );
        return Err(ApiError::invalid("logit_bias", text));
    };
    let seed = body.seed.map_or_else(random_seed, |seed| seed as u64);
    // What the model's makers recommend belongs together: who chooses a temperature chooses the rest.
    let base = match body.temperature {
        Some(temperature) => SamplingParams { temperature, seed, ..SamplingParams::default() },
        None => gateway.client.defaults().sampling(seed),
    };
    Ok(SamplingParams {
        top_p: body.top_p.or(base.top_p),
        top_k: body.top_k.map(|top_k| top_k as usize).or(base.top_k),
        presence_penalty: body.presence_penalty.unwrap_or(0.0),
        frequency_penalty: body.frequency_penalty.unwrap_or(0.0),
        logit_bias,
        ..base
    })
}

/// A number that nobody can foresee.
pub(super) fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}

fn stops(body: &Body) -> Result<Vec<String>, ApiError> {
    let stops = match &body.stop {
        None => Vec::new(),
        Some(OneOrMany::One(stop)) => vec![stop.clone()],
        Some(OneOrMany::Many(stops)) => stops.clone(),
    };
    if stops.len() > MOST_STOPS || stops.iter().any(|stop| stop.len() > LONGEST_STOP) {
        let text = format!("`stop` has at most {MOST_STOPS} texts of at most {LONGEST_STOP} bytes.");
        return Err(ApiError::invalid("stop", text));
    }
    Ok(stops)
}

fn grammar(gateway: &Gateway, body: &Body, tools: &Tools<'_>) -> Result<Option<Arc<dyn Grammar>>, ApiError> {
    let grammars = &gateway.grammars;
    let compiled = if tools.required {
        grammars.tool_call(&tools.offered)
    } else {
        match &body.response_format {
            None | Some(ResponseFormat::Text) => return Ok(None),
            Some(ResponseFormat::JsonObject) => grammars.json(serde_json::json!({ "type": "object" })),
            Some(ResponseFormat::JsonSchema { json_schema }) => {
                let missing = || ApiError::invalid("response_format", "`json_schema` has no `schema`.");
                grammars.json(json_schema.schema.clone().ok_or_else(missing)?)
            }
        }
    };
    let param = if tools.required { "tools" } else { "response_format" };
    compiled.map(Some).map_err(|error| ApiError::invalid(param, format!("This format cannot be obeyed: {error}.")))
}
