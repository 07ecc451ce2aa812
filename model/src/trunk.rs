//! The trunk: everything but the routed experts.

mod attending;
mod error;
mod feed_forward;
mod grouped;
mod indexer;
mod latent;
mod layer;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use candle_nn::ops::rms_norm;
use rayon::ThreadPool;

pub use error::ForwardError;
use layer::{Layer, Pass, Rows};

use crate::cache::{KvCache, LayerCache};
use crate::checkpoint::{Checkpoint, LoadError};
use crate::experts::Experts;
use crate::linear::{Matrix, linear};
use crate::rope::Rope;
use crate::spec::{AttentionSpec, ModelSpec};

/// Embeddings, attention, norms, gates, dense layers, shared experts and LM head of a model.
#[derive(Debug)]
pub struct Trunk {
    checkpoint: Checkpoint,
    embedding: Matrix,
    layers: Vec<Layer>,
    /// The same in all layers.
    rope: Rope,
    norm: Tensor,
    /// `None`: the embedding is used.
    lm_head: Option<Matrix>,
    pool: Arc<ThreadPool>,
}

/// One sequence's part of a forward pass.
#[derive(Debug)]
pub struct Segment<'a> {
    /// New tokens, at the positions after those in the cache.
    pub tokens: &'a [u32],
    /// The sequence's cache; grows by the new tokens.
    pub cache: &'a mut KvCache,
    /// Which positions' logits are wanted.
    pub logits: LogitsWanted,
}

/// Which positions of a segment the LM head is applied to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsWanted {
    /// None: for all but the last chunk of a prefill.
    None,
    /// The last token's.
    Last,
    /// Every token's.
    All,
}

impl Trunk {
    /// Reads the trunk's tensors; matrices stay in the mapping.
    ///
    /// # Errors
    /// If the checkpoint lacks a tensor.
    pub fn load(checkpoint: &Checkpoint, pool: Arc<ThreadPool>) -> Result<Self, LoadError> {
        let spec = checkpoint.spec();
        let (vocab, hidden) = (spec.vocab_size, spec.hidden_size);
        let layers: Vec<_> =
            (0..spec.layers.len()).map(|number| Layer::load(checkpoint, number)).collect::<Result<_, _>>()?;
        Ok(Self {
            rope: Rope::new(&spec.rope),
            embedding: checkpoint.matrix("model.embed_tokens.weight", vocab, hidden)?,
            layers,
            norm: Tensor::new(checkpoint.vector("model.norm.weight", hidden)?, &Device::Cpu)?,
            lm_head: checkpoint.lm_head()?,
            checkpoint: checkpoint.clone(),
            pool,
        })
    }

    /// The model's spec.
    pub fn spec(&self) -> &ModelSpec {
        self.checkpoint.spec()
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self) -> KvCache {
        KvCache::new(self.cache_layers())
    }

    fn cache_layers(&self) -> Vec<LayerCache> {
        let layers = &self.spec().layers;
        layers
            .iter()
            .map(|layer| match &layer.attention {
                AttentionSpec::GroupedQuery(attention) => LayerCache::new(attention.kv_heads, attention.head_dim),
                AttentionSpec::Latent(attention) => {
                    let index_dim = attention.indexer.as_ref().map_or(0, |indexer| indexer.head_dim);
                    LayerCache::latent(attention.cached_values(), index_dim)
                }
            })
            .collect()
    }

    /// Advances several sequences together: their rows are joined, and `experts` is called once per MoE layer for all
    /// of them.
    ///
    /// The result has one matrix of logits per segment, `[n, vocab_size]` row-major: n is the number of tokens for
    /// `All`, 1 for `Last`, 0 for `None`. A row's bits do not depend on the other rows, nor on how a prompt is cut into
    /// calls.
    ///
    /// `experts` is called on the caller's thread, never on one of the pool's, so it may wait for work in the pool.
    ///
    /// # Errors
    /// If a token or a sequence is not possible, or the experts failed. Every cache is then as long as it was before.
    pub fn forward(
        &self,
        segments: &mut [Segment<'_>],
        experts: &mut dyn Experts,
    ) -> Result<Vec<Vec<f32>>, ForwardError> {
        self.check(segments)?;
        let before: Vec<usize> = segments.iter().map(|segment| segment.cache.len()).collect();
        let result = self.forward_rows(segments, experts);
        for (segment, before) in segments.iter_mut().zip(before) {
            match &result {
                Ok(_) => segment.cache.advance(segment.tokens.len()),
                Err(_) => segment.cache.truncate(before),
            }
        }
        result
    }

    fn check(&self, segments: &[Segment<'_>]) -> Result<(), ForwardError> {
        let (vocab_size, max) = (self.spec().vocab_size, self.spec().max_positions);
        let layers = self.cache_layers();
        for segment in segments {
            if segment.tokens.is_empty() {
                return Err(ForwardError::NoTokens);
            }
            if let Some(&token) = segment.tokens.iter().find(|token| **token as usize >= vocab_size) {
                return Err(ForwardError::TokenOutOfRange { token, vocab_size });
            }
            let wanted = segment.cache.len().saturating_add(segment.tokens.len());
            if wanted > max {
                return Err(ForwardError::ContextExceeded { wanted, max });
            }
            if !segment.cache.fits(&layers) {
                return Err(ForwardError::OtherModelsCache);
            }
        }
        Ok(())
    }

    fn forward_rows(
        &self,
        segments: &mut [Segment<'_>],
        experts: &mut dyn Experts,
    ) -> Result<Vec<Vec<f32>>, ForwardError> {
        let spec = self.spec();
        let hidden = spec.hidden_size;
        let rows = Rows::new(segments);
        if rows.positions.is_empty() {
            return Ok(Vec::new());
        }
        let mut embedded = vec![0.0; rows.positions.len() * hidden];
        let tokens = segments.iter().flat_map(|segment| segment.tokens);
        for (token, row) in tokens.zip(embedded.chunks_exact_mut(hidden)) {
            self.embedding.widen_row(*token as usize, row);
            if spec.embedding_multiplier != 1.0 {
                row.iter_mut().for_each(|value| *value *= spec.embedding_multiplier);
            }
        }
        let mut x = Tensor::from_vec(embedded, (rows.positions.len(), hidden), &Device::Cpu)?;
        let angles = self.rope.angles(&rows.positions);
        for (number, layer) in self.layers.iter().enumerate() {
            let mut pass =
                Pass { layer: number, rows: &rows, angles: &angles, segments: &mut *segments, pool: &self.pool };
            x = layer.forward(x, spec, &mut pass, experts)?;
        }
        within(&self.pool, rows.positions.len() == 1, || self.logits(&x, segments))
    }

    fn logits(&self, x: &Tensor, segments: &[Segment<'_>]) -> Result<Vec<Vec<f32>>, ForwardError> {
        let spec = self.spec();
        let mut wanted = Vec::new();
        let mut first = 0;
        for segment in segments {
            let last = first + segment.tokens.len() as u32;
            wanted.extend(match segment.logits {
                LogitsWanted::None => last..last,
                LogitsWanted::Last => last - 1..last,
                LogitsWanted::All => first..last,
            });
            first = last;
        }
        if wanted.is_empty() {
            return Ok(vec![Vec::new(); segments.len()]);
        }
        let count = wanted.len();
        let chosen = x.index_select(&Tensor::from_vec(wanted, count, &Device::Cpu)?, 0)?;
        let normed = rms_norm(&chosen, &self.norm, spec.rms_norm_eps)?.flatten_all()?.to_vec1::<f32>()?;
        let mut logits = linear(&normed, self.lm_head.as_ref().unwrap_or(&self.embedding), &self.pool);
        if spec.logits_scaling != 1.0 {
            logits.iter_mut().for_each(|logit| *logit /= spec.logits_scaling);
        }
        let mut rest = logits.as_slice();
        Ok(segments
            .iter()
            .map(|segment| {
                let rows = match segment.logits {
                    LogitsWanted::None => 0,
                    LogitsWanted::Last => 1,
                    LogitsWanted::All => segment.tokens.len(),
                };
                let (mine, others) = rest.split_at(rows * spec.vocab_size);
                rest = others;
                mine.to_vec()
            })
            .collect())
    }
}

/// Runs candle's operations in the pool, whose threads their loops then use. Where they have nothing to share out, the
/// way there and back would cost more than the work: they stay in this thread.
fn within<T: Send>(pool: &ThreadPool, stay: bool, work: impl FnOnce() -> T + Send) -> T {
    if stay { work() } else { pool.install(work) }
}
