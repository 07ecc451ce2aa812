//! The trunk: everything but the routed experts.

mod attending;
mod error;
mod feed_forward;
mod grouped;
mod head;
mod indexer;
mod latent;
mod layer;
mod placed;

use std::sync::{Arc, OnceLock};

use candle_core::{Device, Tensor};
use candle_nn::ops::rms_norm;
use rayon::ThreadPool;

pub use error::ForwardError;
pub use head::{DraftHead, HeadOutput};
use layer::{Layer, Pass, Rows};
pub use placed::Placement;
use placed::{Placing, TrunkMatrix, linear};

use crate::cache::{KvCache, LayerCache};
use crate::checkpoint::{Checkpoint, LoadError};
use crate::device::{DeviceError, TrunkCard};
use crate::experts::Experts;
use crate::linear::Matrix;
use crate::rope::Rope;
use crate::spec::{AttentionSpec, ModelSpec};

/// Embeddings, attention, norms, gates, dense layers, shared experts and LM head of a model.
#[derive(Debug)]
pub struct Trunk {
    checkpoint: Checkpoint,
    embedding: TrunkMatrix,
    layers: Vec<Layer>,
    /// The same in all layers.
    rope: Rope,
    norm: Tensor,
    /// `None`: the embedding is used.
    lm_head: Option<TrunkMatrix>,
    pool: Arc<ThreadPool>,
    /// Where matrices lie besides.
    card: OnceLock<TrunkCard>,
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
            embedding: checkpoint.matrix("model.embed_tokens.weight", vocab, hidden)?.into(),
            layers,
            norm: Tensor::new(checkpoint.vector("model.norm.weight", hidden)?, &Device::Cpu)?,
            lm_head: checkpoint.lm_head()?.map(TrunkMatrix::from),
            checkpoint: checkpoint.clone(),
            pool,
            card: OnceLock::new(),
        })
    }

    /// Copies the trunk's matrices to a card, which multiplies with them from then on; no bit changes. What does not fit
    /// stays with the processor, and a warning says so. Matrices also stay in the mapping: when the card fails, in whichever
    /// pass, the processor goes on. A trunk lies on one card, the one that it was given first; given again, it takes what has room by now.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]: the card does not work. The trunk is then computed on the processor.
    pub fn place(&self, card: &TrunkCard) -> Result<Placement, DeviceError> {
        let mut placing = Placing::new(self.card.get_or_init(|| card.clone()));
        self.layers.iter().try_for_each(|layer| layer.place(&mut placing))?;
        placing.matrix(self.head())?;
        Ok(placing.end())
    }

    /// What makes logits.
    fn head(&self) -> &TrunkMatrix {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }

    /// The model's spec.
    pub fn spec(&self) -> &ModelSpec {
        self.checkpoint.spec()
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self) -> KvCache {
        KvCache::new(self.cache_layers())
    }

    /// The same, which also keeps what a [`DraftHead`] reads: each position's last hidden state, as the LM head reads it.
    pub fn new_cache_with_hidden(&self) -> KvCache {
        self.new_cache().keeping_hidden(self.spec().hidden_size)
    }

    /// The multi-token-prediction head of the checkpoint, its experts included. Matrices stay in the mapping.
    ///
    /// # Errors
    /// `NoDraftHead` if there is none; a tensor is at fault.
    pub fn draft_head(&self) -> Result<DraftHead, LoadError> {
        DraftHead::load(&self.checkpoint, self.pool.clone())
    }

    fn cache_layers(&self) -> Vec<LayerCache> {
        self.spec().layers.iter().map(|layer| cache_of(&layer.attention)).collect()
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
        check(self.spec(), &self.cache_layers(), segments)?;
        whole(segments, |segments| self.forward_rows(segments, experts))
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
        let embedded = embed(self.embedding.here(), spec, segments);
        let mut x = Tensor::from_vec(embedded, (rows.positions.len(), hidden), &Device::Cpu)?;
        let angles = self.rope.angles(&rows.positions);
        for (number, layer) in self.layers.iter().enumerate() {
            let mut pass =
                Pass { layer: number, rows: &rows, angles: &angles, segments: &mut *segments, pool: &self.pool };
            x = layer.forward(x, spec, &mut pass, experts)?;
        }
        within(&self.pool, rows.positions.len() == 1, || {
            self.keep_hidden(&x, segments)?;
            self.logits(&x, segments)
        })
    }

    /// Gives the last hidden states to the caches that keep them.
    fn keep_hidden(&self, x: &Tensor, segments: &mut [Segment<'_>]) -> Result<(), ForwardError> {
        if !segments.iter().any(|segment| segment.cache.keeps_hidden()) {
            return Ok(());
        }
        let spec = self.spec();
        let normed = rms_norm(x, &self.norm, spec.rms_norm_eps)?.flatten_all()?.to_vec1::<f32>()?;
        let mut rows = normed.chunks_exact(spec.hidden_size);
        for segment in segments {
            rows.by_ref().take(segment.tokens.len()).for_each(|row| segment.cache.push_hidden(row));
        }
        Ok(())
    }

    fn logits(&self, x: &Tensor, segments: &[Segment<'_>]) -> Result<Vec<Vec<f32>>, ForwardError> {
        let spec = self.spec();
        let Some(chosen) = wanted(x, segments)? else { return Ok(vec![Vec::new(); segments.len()]) };
        let normed = rms_norm(&chosen, &self.norm, spec.rms_norm_eps)?.flatten_all()?.to_vec1::<f32>()?;
        let mut logits = linear(&normed, self.head(), &self.pool);
        if spec.logits_scaling != 1.0 {
            logits.iter_mut().for_each(|logit| *logit /= spec.logits_scaling);
        }
        Ok(by_segment(&logits, spec.vocab_size, segments))
    }
}

impl LogitsWanted {
    /// Of how many of `tokens` rows.
    fn rows(self, tokens: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Last => 1,
            Self::All => tokens,
        }
    }
}

/// The empty cache of a layer.
fn cache_of(attention: &AttentionSpec) -> LayerCache {
    match attention {
        AttentionSpec::GroupedQuery(attention) => LayerCache::new(attention.kv_heads, attention.head_dim),
        AttentionSpec::Latent(attention) => {
            let index_dim = attention.indexer.as_ref().map_or(0, |indexer| indexer.head_dim);
            LayerCache::latent(attention.cached_values(), index_dim)
        }
    }
}

/// Whether the segments are possible, whose caches have `layers`.
fn check(spec: &ModelSpec, layers: &[LayerCache], segments: &[Segment<'_>]) -> Result<(), ForwardError> {
    let (vocab_size, max) = (spec.vocab_size, spec.max_positions);
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
        if !segment.cache.fits(layers) {
            return Err(ForwardError::OtherModelsCache);
        }
    }
    Ok(())
}

/// Runs a pass, after which every cache has the new positions, or if it fails those of before.
fn whole<T>(
    segments: &mut [Segment<'_>],
    pass: impl FnOnce(&mut [Segment<'_>]) -> Result<T, ForwardError>,
) -> Result<T, ForwardError> {
    let before: Vec<usize> = segments.iter().map(|segment| segment.cache.len()).collect();
    let result = pass(segments);
    for (segment, before) in segments.iter_mut().zip(before) {
        match &result {
            Ok(_) => segment.cache.advance(segment.tokens.len()),
            Err(_) => segment.cache.truncate(before),
        }
    }
    result
}

/// The embeddings of all tokens, `[rows, hidden]`.
fn embed(embedding: &Matrix, spec: &ModelSpec, segments: &[Segment<'_>]) -> Vec<f32> {
    let tokens = segments.iter().flat_map(|segment| segment.tokens);
    let mut embedded = vec![0.0; tokens.clone().count() * spec.hidden_size];
    for (token, row) in tokens.zip(embedded.chunks_exact_mut(spec.hidden_size)) {
        embedding.widen_row(*token as usize, row);
        if spec.embedding_multiplier != 1.0 {
            row.iter_mut().for_each(|value| *value *= spec.embedding_multiplier);
        }
    }
    embedded
}

/// Of `x`, `[rows, hidden]`, the rows whose logits are wanted; `None` if there are none.
fn wanted(x: &Tensor, segments: &[Segment<'_>]) -> candle_core::Result<Option<Tensor>> {
    let mut wanted = Vec::new();
    let mut first = 0;
    for segment in segments {
        let last = first + segment.tokens.len() as u32;
        wanted.extend(last - segment.logits.rows(segment.tokens.len()) as u32..last);
        first = last;
    }
    if wanted.is_empty() {
        return Ok(None);
    }
    let count = wanted.len();
    x.index_select(&Tensor::from_vec(wanted, count, &Device::Cpu)?, 0).map(Some)
}

/// Divides what the wanted rows gave, of `width` values each, among the segments.
fn by_segment(values: &[f32], width: usize, segments: &[Segment<'_>]) -> Vec<Vec<f32>> {
    let mut rest = values;
    let of_segment = |segment: &Segment<'_>| {
        let (mine, others) = rest.split_at(segment.logits.rows(segment.tokens.len()) * width);
        rest = others;
        mine.to_vec()
    };
    segments.iter().map(of_segment).collect()
}

/// Runs candle's operations in the pool, whose threads their loops then use. Where they have nothing to share out, the
/// way there and back would cost more than the work: they stay in this thread.
fn within<T: Send>(pool: &ThreadPool, stay: bool, work: impl FnOnce() -> T + Send) -> T {
    if stay { work() } else { pool.install(work) }
}
