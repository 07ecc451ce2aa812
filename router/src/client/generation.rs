//! A generation in progress, as a stream.

use std::ops::ControlFlow;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::Stream;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Client;
use crate::generate::{FinishReason, GenerateError, GenerateRequest, Timings, Token, generate};
use crate::stats::NetworkUse;

/// Tokens that may wait for a slow reader before the model waits too.
const TOKEN_QUEUE: usize = 64;

/// What is known when a generation has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Text that came after the last token's, held back until then.
    pub rest: String,
    /// How long it took.
    pub timings: Timings,
    /// What it cost on the network; zeros for a local client.
    pub network: NetworkUse,
}

enum Step {
    Token(Token),
    End(Result<Summary, GenerateError>),
}

/// The tokens of one generation as they come. Dropping it ends the generation.
#[derive(Debug)]
pub struct Generation {
    steps: mpsc::Receiver<Step>,
    summary: Option<Summary>,
    ended: bool,
    _cancel: DropGuard,
}

impl Generation {
    /// How it ended; `None` before the stream's end and after an error.
    #[must_use]
    pub fn summary(&self) -> Option<&Summary> {
        self.summary.as_ref()
    }
}

impl Stream for Generation {
    type Item = Result<Token, GenerateError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let Poll::Ready(step) = self.steps.poll_recv(context) else { return Poll::Pending };
        if let Some(Step::Token(token)) = step {
            return Poll::Ready(Some(Ok(token)));
        }
        self.ended = true;
        match step {
            Some(Step::End(Ok(summary))) => {
                self.summary = Some(summary);
                Poll::Ready(None)
            }
            Some(Step::End(Err(error))) => Poll::Ready(Some(Err(error))),
            // The thread panicked before it could say anything.
            _ => Poll::Ready(Some(Err(GenerateError::Cancelled))),
        }
    }
}

pub(super) fn start(client: Client, request: GenerateRequest) -> Generation {
    let (sender, steps) = mpsc::channel(TOKEN_QUEUE);
    let cancel = CancellationToken::new();
    let guard = cancel.clone().drop_guard();
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || {
        let end = run(&client, &request, runtime, cancel, &sender);
        // Nobody to tell when the reader has gone.
        let _ = sender.blocking_send(Step::End(end));
    });
    Generation { steps, summary: None, ended: false, _cancel: guard }
}

fn run(
    client: &Client,
    request: &GenerateRequest,
    runtime: tokio::runtime::Handle,
    cancel: CancellationToken,
    sender: &mpsc::Sender<Step>,
) -> Result<Summary, GenerateError> {
    let mut experts = client.experts(runtime, cancel);
    let shared = &client.shared;
    let finished =
        generate(&shared.trunk, shared.tokenizer.as_ref(), &shared.defaults, experts.as_dyn(), request, |token| {
            if sender.blocking_send(Step::Token(token)).is_ok() {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })?;
    Ok(Summary {
        finish_reason: finished.reason,
        rest: finished.rest,
        timings: finished.timings,
        network: experts.usage(),
    })
}
