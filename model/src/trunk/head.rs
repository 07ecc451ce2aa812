//! A multi-token-prediction head: one decoder layer that guesses the token after the next. Source: DeepSeek-V3, arXiv:2412.19437,
//! section 2.2.
//!
//! Of a position's last hidden state and the token after it, `eh_proj([enorm(embedding); hnorm(hidden)])` is what the layer reads, and
//! `shared_head.norm` and `shared_head.head` make its output logits. What the report leaves open is taken as vLLM and SGLang have it, who
//! follow the checkpoints' own code: the hidden state is the one after the model's final norm, and where the head goes on from its own
//! output, that is the one after `shared_head.norm`.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use candle_nn::ops::rms_norm;
use rayon::ThreadPool;

use super::attending::{norm, tensor};
use super::error::ForwardError;
use super::layer::{Layer, Pass, Rows};
use super::{Segment, by_segment, cache_of, check, embed, wanted, whole, within};
use crate::cache::KvCache;
use crate::checkpoint::{Checkpoint, LoadError};
use crate::experts::LocalExperts;
use crate::linear::{Matrix, linear};
use crate::rope::Rope;
use crate::spec::ModelSpec;

/// The head of a checkpoint, its routed experts included: nothing of it is asked of others.
#[derive(Debug)]
pub struct DraftHead {
    /// The model with the head's layer as its last.
    spec: ModelSpec,
    embedding: Matrix,
    enorm: Tensor,
    hnorm: Tensor,
    /// `[hidden, 2 x hidden]`
    eh_proj: Matrix,
    layer: Layer,
    experts: Arc<LocalExperts>,
    norm: Tensor,
    lm_head: Matrix,
    rope: Rope,
    pool: Arc<ThreadPool>,
}

/// What a head gives for the rows whose logits were wanted, by segment.
#[derive(Debug)]
pub struct HeadOutput {
    /// Of the token after the one that was given, `[n, vocab_size]`.
    pub logits: Vec<Vec<f32>>,
    /// The head's own hidden states, `[n, hidden_size]`, from which it can go on guessing.
    pub hidden: Vec<Vec<f32>>,
}

impl DraftHead {
    pub(super) fn load(checkpoint: &Checkpoint, pool: Arc<ThreadPool>) -> Result<Self, LoadError> {
        let (checkpoint, layer) = checkpoint.with_draft_head()?;
        let spec = checkpoint.spec().clone();
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        let path = |name: &str| format!("model.layers.{layer}.{name}.weight");
        let norm = |name: &str| tensor(&checkpoint, &path(name), hidden);
        let model = || checkpoint.matrix("model.embed_tokens.weight", vocab, hidden);
        let own = |name: &str| checkpoint.own_matrix(&path(name), vocab, hidden);
        let lm_head = match own("shared_head.head")? {
            Some(lm_head) => lm_head,
            None => checkpoint.lm_head()?.map_or_else(model, Ok)?,
        };
        Ok(Self {
            embedding: own("embed_tokens")?.map_or_else(model, Ok)?,
            enorm: norm("enorm")?,
            hnorm: norm("hnorm")?,
            eh_proj: checkpoint.matrix(&path("eh_proj"), hidden, 2 * hidden)?,
            layer: Layer::load(&checkpoint, layer)?,
            experts: Arc::new(LocalExperts::load_layer(&checkpoint, layer, pool.clone())?),
            norm: norm("shared_head.norm")?,
            lm_head,
            rope: Rope::new(&spec.rope),
            spec,
            pool,
        })
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self) -> KvCache {
        KvCache::new(self.spec.layers.last().map(|layer| cache_of(&layer.attention)).into_iter().collect())
    }

    /// Advances several sequences together. Each token of a segment comes with the last hidden state of the position before it: the
    /// model's ([`KvCache::hidden`]) or, where it only guesses the token, the head's own. `hidden` is `[rows, hidden_size]`, for the
    /// rows of all segments. A cache has one position for each pair, from the model's first position on.
    ///
    /// # Errors
    /// As [`Trunk::forward`](super::Trunk::forward), and `HiddenStates` if they are not as many as tokens. Every cache is then as long
    /// as it was before.
    pub fn forward(&self, segments: &mut [Segment<'_>], hidden: &[f32]) -> Result<HeadOutput, ForwardError> {
        let layer = self.spec.layers.last().map(|layer| cache_of(&layer.attention));
        check(&self.spec, layer.as_slice(), segments)?;
        let rows: usize = segments.iter().map(|segment| segment.tokens.len()).sum();
        let expected = rows * self.spec.hidden_size;
        if hidden.len() != expected {
            return Err(ForwardError::HiddenStates { expected, found: hidden.len() });
        }
        whole(segments, |segments| self.forward_rows(segments, hidden))
    }

    fn forward_rows(&self, segments: &mut [Segment<'_>], hidden: &[f32]) -> Result<HeadOutput, ForwardError> {
        let (spec, width) = (&self.spec, self.spec.hidden_size);
        let rows = Rows::new(segments);
        let count = rows.positions.len();
        if count == 0 {
            return Ok(HeadOutput { logits: Vec::new(), hidden: Vec::new() });
        }
        let stay = count == 1;
        let x = within(&self.pool, stay, || -> candle_core::Result<Tensor> {
            let embedded = norm(embed(&self.embedding, spec, segments), &self.enorm, spec.rms_norm_eps)?;
            let hidden = norm(hidden.to_vec(), &self.hnorm, spec.rms_norm_eps)?;
            let pairs = embedded.chunks_exact(width).zip(hidden.chunks_exact(width));
            let joined: Vec<f32> = pairs.flat_map(|(embedded, hidden)| [embedded, hidden]).flatten().copied().collect();
            Tensor::from_vec(linear(&joined, &self.eh_proj, &self.pool), (count, width), &Device::Cpu)
        })?;
        let angles = self.rope.angles(&rows.positions);
        let mut pass = Pass { layer: 0, rows: &rows, angles: &angles, segments: &mut *segments, pool: &self.pool };
        let x = self.layer.forward(x, spec, &mut pass, &mut self.experts.clone())?;
        within(&self.pool, stay, || {
            let none = || vec![Vec::new(); segments.len()];
            let Some(chosen) = wanted(&x, segments)? else { return Ok(HeadOutput { logits: none(), hidden: none() }) };
            let hidden = rms_norm(&chosen, &self.norm, spec.rms_norm_eps)?.flatten_all()?.to_vec1::<f32>()?;
            let logits = linear(&hidden, &self.lm_head, &self.pool);
            Ok(HeadOutput {
                logits: by_segment(&logits, spec.vocab_size, segments),
                hidden: by_segment(&hidden, width, segments),
            })
        })
    }
}
