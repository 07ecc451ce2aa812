//! One decoder layer.

use candle_core::{Device, Result as CandleResult, Tensor};
use candle_nn::ops::rms_norm;
use rayon::ThreadPool;

use super::attending::tensor;
use super::feed_forward::FeedForward;
use super::grouped::Grouped;
use super::latent::Latent;
use super::placed::Placing;
use super::{ForwardError, Segment, within};
use crate::cache::LayerCache;
use crate::checkpoint::{Checkpoint, LoadError};
use crate::device::DeviceError;
use crate::experts::Experts;
use crate::rope::Angles;
use crate::spec::{AttentionSpec, ModelSpec};

/// Which segment and position each row of a pass belongs to.
pub(super) struct Rows {
    pub(super) segments: Vec<usize>,
    pub(super) positions: Vec<usize>,
}

impl Rows {
    pub(super) fn new(segments: &[Segment<'_>]) -> Self {
        let mut this = Self { segments: Vec::new(), positions: Vec::new() };
        for (number, segment) in segments.iter().enumerate() {
            let first = segment.cache.len();
            this.positions.extend(first..first + segment.tokens.len());
            this.segments.resize(this.positions.len(), number);
        }
        this
    }

    /// Positions of the longest sequence.
    pub(super) fn longest(&self) -> usize {
        self.positions.iter().max().map_or(0, |position| position + 1)
    }
}

/// A pass, as one layer sees it.
pub(super) struct Pass<'a, 'b> {
    pub(super) layer: usize,
    pub(super) rows: &'a Rows,
    pub(super) angles: &'a Angles,
    pub(super) segments: &'a mut [Segment<'b>],
    pub(super) pool: &'a ThreadPool,
}

impl Pass<'_, '_> {
    /// Appends each row's key and value to its cache.
    pub(super) fn push<'v>(&mut self, keys_and_values: impl Iterator<Item = (&'v [f32], &'v [f32])>) {
        for (segment, (key, value)) in self.rows.segments.iter().zip(keys_and_values) {
            self.segments[*segment].cache.layer_mut(self.layer).push(key, value);
        }
    }

    /// The cache of a row's segment.
    pub(super) fn cache_of(&self, row: usize) -> &LayerCache {
        self.segments[self.rows.segments[row]].cache.layer(self.layer)
    }
}

#[derive(Debug)]
pub(super) struct Layer {
    input_norm: Tensor,
    attention: Attention,
    post_attention_norm: Tensor,
    feed_forward: FeedForward,
}

#[derive(Debug)]
enum Attention {
    Grouped(Box<Grouped>),
    Latent(Box<Latent>),
}

impl Attention {
    fn load(checkpoint: &Checkpoint, layer: usize, spec: &AttentionSpec, hidden: usize) -> Result<Self, LoadError> {
        Ok(match spec {
            AttentionSpec::GroupedQuery(spec) => {
                Self::Grouped(Box::new(Grouped::load(checkpoint, layer, spec, hidden)?))
            }
            AttentionSpec::Latent(spec) => Self::Latent(Box::new(Latent::load(checkpoint, layer, spec, hidden)?)),
        })
    }

    /// Vectors that are normed by themselves in a pass of one row.
    fn normed_vectors(&self) -> usize {
        match self {
            Self::Grouped(grouped) => grouped.normed_vectors(),
            Self::Latent(_) => 1,
        }
    }

    fn forward(&self, x: &[f32], eps: f32, pass: &mut Pass<'_, '_>) -> CandleResult<Vec<f32>> {
        match self {
            Self::Grouped(grouped) => grouped.forward(x, eps, pass),
            Self::Latent(latent) => latent.forward(x, pass),
        }
    }
}

impl Layer {
    pub(super) fn load(checkpoint: &Checkpoint, layer: usize) -> Result<Self, LoadError> {
        let spec = checkpoint.spec();
        let norm = |name: &str| tensor(checkpoint, &format!("model.layers.{layer}.{name}.weight"), spec.hidden_size);
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            attention: Attention::load(checkpoint, layer, &spec.layers[layer].attention, spec.hidden_size)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            feed_forward: FeedForward::load(checkpoint, layer)?,
        })
    }

    pub(super) fn place(&self, placing: &mut Placing<'_>) -> Result<(), DeviceError> {
        match &self.attention {
            Attention::Grouped(grouped) => grouped.place(placing)?,
            Attention::Latent(latent) => latent.place(placing)?,
        }
        self.feed_forward.place(placing)
    }

    /// `x` is `[rows, hidden]`, and so is the result.
    pub(super) fn forward(
        &self,
        x: Tensor,
        spec: &ModelSpec,
        pass: &mut Pass<'_, '_>,
        experts: &mut dyn Experts,
    ) -> Result<Tensor, ForwardError> {
        let (eps, layer, pool) = (spec.rms_norm_eps, pass.layer, pass.pool);
        // Candle shares out the rows of a norm from 33 on; a row has as many as heads where each is normed by itself.
        let stay = pass.rows.positions.len() == 1 && self.attention.normed_vectors() <= 32;
        let (x, normed) = within(pool, stay, || -> CandleResult<_> {
            let normed = rms_norm(&x, &self.input_norm, eps)?.flatten_all()?.to_vec1::<f32>()?;
            let attended = self.attention.forward(&normed, eps, pass)?;
            let x = residual(x, attended, spec)?;
            let normed = rms_norm(&x, &self.post_attention_norm, eps)?.flatten_all()?.to_vec1::<f32>()?;
            Ok((x, normed))
        })?;
        let fed = self.feed_forward.forward(layer, &normed, experts, pool)?;
        Ok(residual(x, fed, spec)?)
    }
}

fn residual(x: Tensor, added: Vec<f32>, spec: &ModelSpec) -> CandleResult<Tensor> {
    let mut added = Tensor::from_vec(added, x.shape(), &Device::Cpu)?;
    if spec.residual_multiplier != 1.0 {
        added = (added * f64::from(spec.residual_multiplier))?;
    }
    x + added
}
