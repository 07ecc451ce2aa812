//! Log probabilities of a text.

use std::ops::ControlFlow;
use std::sync::Arc;

use hanse_model::{Experts, LocalExperts, log_softmax_at};
use tokio_util::sync::CancellationToken;

use super::{Client, Place};
use crate::generate::{self, GenerateError};
use crate::remote::RemoteExperts;
use crate::stats::NetworkUse;

/// Log probabilities of a text under the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    /// One for each token: ln p(token | tokens before it), `None` for the first.
    pub logprobs: Vec<Option<f32>>,
    /// exp of the mean negative log probability; 1 for a single token, of which nothing is predicted.
    pub perplexity: f64,
    /// Logits at every position, `[tokens, vocab]`, if they were asked for.
    pub logits: Option<Vec<f32>>,
    /// What it cost on the network.
    pub network: NetworkUse,
}

impl Client {
    /// Log probabilities of `tokens` under the model, with the logits if `keep_logits`.
    ///
    /// Must be called within a tokio runtime; dropping the future ends the work after the chunk in progress.
    ///
    /// # Errors
    /// See [`GenerateError`].
    pub async fn score(
        &self,
        tokens: Vec<u32>,
        keep_logits: bool,
        progress: impl Fn(usize) + Send + 'static,
    ) -> Result<Score, GenerateError> {
        let cancel = CancellationToken::new();
        let guard = cancel.clone().drop_guard();
        let client = self.clone();
        let runtime = tokio::runtime::Handle::current();
        let scored =
            tokio::task::spawn_blocking(move || client.score_here(&tokens, keep_logits, &progress, runtime, cancel))
                .await;
        drop(guard);
        scored.unwrap_or(Err(GenerateError::Cancelled))
    }

    fn score_here(
        &self,
        tokens: &[u32],
        keep_logits: bool,
        progress: &dyn Fn(usize),
        runtime: tokio::runtime::Handle,
        cancel: CancellationToken,
    ) -> Result<Score, GenerateError> {
        let vocab = self.spec().vocab_size;
        let mut logprobs: Vec<Option<f32>> = vec![None];
        let mut kept = keep_logits.then(Vec::new);
        let mut experts = self.experts(runtime, cancel.clone());
        generate::logits(&self.core.trunk, experts.as_dyn(), tokens, |first, values| {
            for (offset, row) in values.chunks_exact(vocab).enumerate() {
                if let Some(&next) = tokens.get(first + offset + 1) {
                    logprobs.push(Some(log_softmax_at(row, next)));
                }
            }
            progress(first + values.len() / vocab);
            if let Some(kept) = &mut kept {
                kept.extend(values);
            }
            if cancel.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        let known: Vec<f64> = logprobs.iter().flatten().map(|&l| f64::from(l)).collect();
        let perplexity = (-known.iter().sum::<f64>() / known.len().max(1) as f64).exp();
        Ok(Score { logprobs, perplexity, logits: kept, network: experts.usage() })
    }

    /// Experts for one request.
    fn experts(&self, runtime: tokio::runtime::Handle, cancel: CancellationToken) -> RequestExperts {
        match &self.core.place {
            Place::Here(local) => RequestExperts::Local(local.clone()),
            Place::Network(network) => RequestExperts::Remote(RemoteExperts::new(network.clone(), runtime, cancel)),
        }
    }
}

enum RequestExperts {
    Local(Arc<LocalExperts>),
    Remote(RemoteExperts),
}

impl RequestExperts {
    fn as_dyn(&mut self) -> &mut dyn Experts {
        match self {
            Self::Local(local) => local,
            Self::Remote(remote) => remote,
        }
    }

    fn usage(&self) -> NetworkUse {
        match self {
            Self::Local(_) => NetworkUse::default(),
            Self::Remote(remote) => remote.usage(),
        }
    }
}
