//! A generation in progress, as a stream.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::Stream;
use tokio::sync::mpsc;

use crate::engine::Step;
use crate::generate::{FinishReason, GenerateError, ScoredToken, Timings, Token};
use crate::stats::{DraftUse, NetworkUse};

/// What is known when a generation has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Text that came after the last token's, held back until then.
    pub rest: String,
    /// How long it took.
    pub timings: Timings,
    /// What the forward passes that it took part in cost on the network, together with the other generations in them; zeros for a
    /// local client.
    pub network: NetworkUse,
    /// What drafts brought.
    pub drafts: DraftUse,
}

/// What a generation has cost as of one of its tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// How long it has taken.
    pub timings: Timings,
    /// As [`Summary::network`].
    pub network: NetworkUse,
    /// As [`Summary::drafts`].
    pub drafts: DraftUse,
}

/// The tokens of one generation as they come. Dropping it ends the generation.
#[derive(Debug)]
pub struct Generation {
    steps: mpsc::Receiver<Step>,
    prompt: Vec<ScoredToken>,
    progress: Option<Progress>,
    summary: Option<Summary>,
    ended: bool,
}

impl Generation {
    pub(super) fn new(steps: mpsc::Receiver<Step>) -> Self {
        Self { steps, prompt: Vec::new(), progress: None, summary: None, ended: false }
    }

    /// How it ended; `None` before the stream's end and after an error.
    #[must_use]
    pub fn summary(&self) -> Option<&Summary> {
        self.summary.as_ref()
    }

    /// What it had cost as of the last token that came out of the stream, for who does not wait for the end; `None` before the first.
    #[must_use]
    pub fn progress(&self) -> Option<&Progress> {
        self.progress.as_ref()
    }

    /// What the model thought of the prompt's tokens, if that was asked for; complete as soon as the first token or the end has come.
    #[must_use]
    pub fn prompt(&self) -> &[ScoredToken] {
        &self.prompt
    }
}

impl Stream for Generation {
    type Item = Result<Token, GenerateError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            let Poll::Ready(step) = self.steps.poll_recv(context) else { return Poll::Pending };
            match step {
                Some(Step::Prompt(mut tokens)) => {
                    self.prompt.append(&mut tokens);
                    continue;
                }
                Some(Step::Token(token, progress)) => {
                    self.progress = Some(progress);
                    return Poll::Ready(Some(Ok(token)));
                }
                _ => self.ended = true,
            }
            return Poll::Ready(match step {
                Some(Step::End(Ok(summary))) => {
                    self.summary = Some(summary);
                    None
                }
                Some(Step::End(Err(error))) => Some(Err(error)),
                // The engine died before it could say anything.
                _ => Some(Err(GenerateError::Cancelled)),
            });
        }
    }
}
