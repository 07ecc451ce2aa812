//! Runs the generations of a request and sends what comes of them, at the end or as it comes.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, BoxStream, SelectAll};
use futures::{Stream, StreamExt};
use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;

use super::Gateway;
use super::ask::{Ask, Kind};
use super::body::read;
use super::error::ApiError;
use super::tools::CallFinder;
use super::write::{self, Writer};
use crate::client::{Generation, Summary};
use crate::generate::{GenerateError, ScoredToken, Token};

/// A stream that has nothing to say shows that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long a request waits for its turn to have its format compiled.
const COMPILE_PATIENCE: Duration = Duration::from_secs(20);

/// Something that one generation says.
enum Event {
    /// Before all else, where it is wanted.
    Prompt(Vec<ScoredToken>),
    Token(Token),
    End(Summary),
}

type Events = SelectAll<BoxStream<'static, (usize, Result<Event, GenerateError>)>>;

/// Answers a request to one of the two endpoints.
pub(super) async fn respond(gateway: &Arc<Gateway>, kind: Kind, request: Request) -> Result<Response, ApiError> {
    let (body, room) = read(gateway, request).await?;
    let shared = gateway.clone();
    // Formats are compiled one after the other, so that strangers' schemas do not take all threads at once.
    let turn = match body.may_have_a_format() {
        true => Some(turn(gateway).await?),
        false => None,
    };
    // Long prompts and large schemas take their time.
    let made = tokio::task::spawn_blocking(move || {
        // Kept to the end of the work, also when nobody waits for it any more.
        let _held = (turn, room);
        Ask::new(&shared, kind, body)
    });
    let ask = made.await.map_err(|_| ApiError::defect())??;
    let writer = Writer::new(&ask, super::unix_seconds(), &gateway.config.name);
    let mut events = run(gateway, &ask);
    // What is refused at once has a status of its own, in a stream too.
    let first = match events.next().await {
        Some((_, Err(error))) => return Err(ApiError::of(kind, &error)),
        first => first,
    };
    let events = stream::iter(first).chain(events);
    let answer = Answer { gateway: gateway.clone(), choices: choices(&ask), ask, writer, completion_tokens: 0 };
    if answer.ask.stream { Ok(answer.stream(events)) } else { answer.whole(events).await }
}

async fn turn(gateway: &Gateway) -> Result<OwnedSemaphorePermit, ApiError> {
    let turn = tokio::time::timeout(COMPILE_PATIENCE, gateway.compiling.clone().acquire_owned()).await;
    let late = || ApiError::busy("Many requests wait for their formats to be compiled.");
    turn.ok().and_then(Result::ok).ok_or_else(late)
}

/// Starts all generations of a request.
fn run(gateway: &Gateway, ask: &Ask) -> Events {
    let echo = ask.echo && ask.logprobs;
    let started = ask.requests.iter().enumerate().map(|(index, request)| {
        let generation = gateway.client.generate(request.clone());
        said(generation, echo).map(move |event| (index, event)).boxed()
    });
    stream::select_all(started.collect::<Vec<_>>())
}

/// What a generation says until it ends or fails.
fn said(generation: Generation, echo: bool) -> impl Stream<Item = Result<Event, GenerateError>> + Send {
    struct State {
        generation: Generation,
        /// Whether the prompt is still to be told of.
        echo: bool,
        next: Option<Event>,
        ended: bool,
    }
    let state = State { generation, echo, next: None, ended: false };
    stream::unfold(state, |mut state| async move {
        if let Some(event) = state.next.take() {
            return Some((Ok(event), state));
        }
        if state.ended {
            return None;
        }
        let event = match state.generation.next().await {
            Some(Ok(token)) => Event::Token(token),
            Some(Err(error)) => {
                state.ended = true;
                return Some((Err(error), state));
            }
            None => {
                state.ended = true;
                let summary = state.generation.summary().cloned();
                let Some(summary) = summary else { return Some((Err(GenerateError::Cancelled), state)) };
                Event::End(summary)
            }
        };
        if std::mem::take(&mut state.echo) {
            state.next = Some(event);
            return Some((Ok(Event::Prompt(state.generation.prompt().to_vec())), state));
        }
        Some((Ok(event), state))
    })
}

/// How far one choice has come.
#[derive(Debug, Default)]
struct Choice {
    prompt_tokens: usize,
    tokens: usize,
    /// Characters of text so far, the echoed prompt included.
    characters: usize,
    begun: bool,
    finder: Option<CallFinder>,
}

fn choices(ask: &Ask) -> Vec<Choice> {
    let choice = |prompt_tokens: usize| Choice {
        prompt_tokens,
        finder: ask.tools.then(CallFinder::default),
        ..Choice::default()
    };
    ask.requests.iter().map(|request| choice(request.prompt.len())).collect()
}

impl Choice {
    /// Text that may be shown.
    fn shown(&mut self, text: String) -> String {
        match &mut self.finder {
            Some(finder) => finder.push(&text),
            None => text,
        }
    }
}

/// One response in the making.
struct Answer {
    gateway: Arc<Gateway>,
    ask: Ask,
    writer: Writer,
    choices: Vec<Choice>,
    completion_tokens: usize,
}

/// What an event adds to a choice.
#[derive(Default)]
struct Addition {
    text: String,
    calls: Vec<Value>,
    thoughts: Vec<ScoredToken>,
    reason: Option<&'static str>,
}

impl Answer {
    /// The text of the prompt, for `echo`.
    fn echoed(&self, index: usize) -> String {
        let tokens = self.ask.requests.get(index).map_or(&[][..], |request| request.prompt.as_slice());
        self.gateway.client.tokenizer().and_then(|t| t.decode(tokens, false).ok()).unwrap_or_default()
    }

    fn add(&mut self, index: usize, event: Event) -> Addition {
        let mut addition = Addition::default();
        if self.ask.echo && self.choices.get(index).is_some_and(|choice| !choice.begun) {
            addition.text = self.echoed(index);
        }
        let logprobs = self.ask.logprobs;
        let Some(choice) = self.choices.get_mut(index) else { return addition };
        match event {
            Event::Prompt(tokens) => {
                addition.thoughts = tokens;
            }
            Event::Token(token) => {
                choice.tokens += 1;
                self.completion_tokens += 1;
                addition.text += &choice.shown(token.text);
                if logprobs {
                    addition.thoughts.push(ScoredToken { id: token.id, logprob: Some(token.logprob), top: token.top });
                }
            }
            Event::End(summary) => {
                addition.text += &choice.shown(summary.rest.clone());
                if let Some(finder) = &mut choice.finder {
                    let (rest, calls) = finder.finish();
                    addition.text += &rest;
                    addition.calls = calls;
                }
                addition.reason = Some(write::reason(summary.finish_reason, !addition.calls.is_empty()));
                self.gateway.metrics.answered(choice.prompt_tokens, choice.tokens, &summary);
            }
        }
        addition
    }

    fn logprobs(&self, thoughts: &[ScoredToken], offset: usize) -> Value {
        if !self.ask.logprobs || thoughts.is_empty() {
            return Value::Null;
        }
        self.writer.logprobs(&self.gateway.vocabulary, thoughts, offset)
    }

    /// One document when all has been said.
    async fn whole(
        mut self,
        events: impl Stream<Item = (usize, Result<Event, GenerateError>)>,
    ) -> Result<Response, ApiError> {
        let mut all: Vec<Addition> = self.choices.iter().map(|_| Addition::default()).collect();
        let mut events = std::pin::pin!(events);
        while let Some((index, event)) = events.next().await {
            let more = self.add(index, event.map_err(|error| ApiError::of(self.ask.kind, &error))?);
            let (Some(choice), Some(whole)) = (self.choices.get_mut(index), all.get_mut(index)) else { continue };
            choice.begun = true;
            whole.text += &more.text;
            whole.calls.extend(more.calls);
            whole.thoughts.extend(more.thoughts);
            whole.reason = more.reason.or(whole.reason);
        }
        let choices = all.into_iter().enumerate().map(|(index, whole)| {
            let logprobs = self.logprobs(&whole.thoughts, 0);
            self.writer.choice(index, &whole.text, whole.calls, logprobs, whole.reason.unwrap_or("length"))
        });
        let usage = write::usage(self.ask.prompt_tokens, self.completion_tokens);
        Ok(axum::Json(self.writer.whole(choices.collect(), usage)).into_response())
    }

    /// Server-sent events as it is said.
    fn stream(self, events: impl Stream<Item = (usize, Result<Event, GenerateError>)> + Send + 'static) -> Response {
        let state = (self, Box::pin(events) as Pin<Box<dyn Stream<Item = _> + Send>>, false);
        let documents = stream::unfold(state, |(mut answer, mut events, done)| async move {
            if done {
                return None;
            }
            let (documents, done) = match events.next().await {
                Some((index, Ok(event))) => (answer.piece(index, event), false),
                Some((_, Err(error))) => (vec![ApiError::of(answer.ask.kind, &error).document().to_string()], true),
                None => (answer.last(), true),
            };
            Some((stream::iter(documents), (answer, events, done)))
        });
        let events = documents.flatten().map(|text| Ok::<_, Infallible>(SseEvent::default().data(text)));
        Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
    }

    /// The documents for one event.
    fn piece(&mut self, index: usize, event: Event) -> Vec<String> {
        let Addition { text, calls, thoughts, reason } = self.add(index, event);
        let Some(choice) = self.choices.get_mut(index) else { return Vec::new() };
        let (is_first, offset) = (!choice.begun, choice.characters);
        choice.characters += text.chars().count();
        // A token in the middle of a character says nothing yet.
        if text.is_empty() && calls.is_empty() && thoughts.is_empty() && reason.is_none() && !is_first {
            return Vec::new();
        }
        choice.begun = true;
        let logprobs = self.logprobs(&thoughts, offset);
        let usage = || self.ask.include_usage.then_some(Value::Null);
        let mut documents = Vec::new();
        if is_first || !text.is_empty() || !calls.is_empty() || !logprobs.is_null() {
            let delta = self.writer.delta(index, &text, is_first, &calls, logprobs, None);
            documents.push(self.writer.chunk(vec![delta], usage()).to_string());
        }
        if reason.is_some() {
            let end = self.writer.delta(index, "", false, &[], Value::Null, reason);
            documents.push(self.writer.chunk(vec![end], usage()).to_string());
        }
        documents
    }

    fn last(&self) -> Vec<String> {
        let usage = || write::usage(self.ask.prompt_tokens, self.completion_tokens);
        let usage = self.ask.include_usage.then(|| self.writer.chunk(Vec::new(), Some(usage())).to_string());
        usage.into_iter().chain(["[DONE]".to_owned()]).collect()
    }
}
