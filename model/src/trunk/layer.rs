//! One decoder layer.

use candle_core::{Device, Result as CandleResult, Tensor};
use candle_nn::ops::rms_norm;
use candle_nn::rotary_emb::rope_thd;
use rayon::ThreadPool;

use super::{ForwardError, Segment, within};
use crate::attention::{Group, Query, attend};
use crate::checkpoint::{Checkpoint, CheckpointError, LoadError, Swiglu};
use crate::expert::{SwigluJob, run_swiglus};
use crate::experts::Experts;
use crate::gate::route;
use crate::lanes::Isa;
use crate::linear::{Matrix, SharedMut, linear, linears, run_tasks};
use crate::spec::{AttentionSpec, FeedForwardSpec, GroupedQuerySpec, ModelSpec, MoeSpec, QkNorm};

/// Scores that a task of attention keeps at a time: 512 KiB.
const MOST_SCORES: usize = 128 << 10;

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
}

#[derive(Debug)]
pub(super) struct Layer {
    input_norm: Tensor,
    attention: Attention,
    post_attention_norm: Tensor,
    feed_forward: FeedForward,
}

#[derive(Debug)]
struct Attention {
    spec: GroupedQuerySpec,
    q_proj: Projection,
    k_proj: Projection,
    v_proj: Projection,
    o_proj: Projection,
    /// Weights of the norms of queries and keys.
    qk_norm: Option<(Tensor, Tensor)>,
}

#[derive(Debug)]
struct Projection {
    weight: Matrix,
    bias: Option<Vec<f32>>,
}

#[derive(Debug)]
enum FeedForward {
    Dense(Swiglu),
    /// There is no gate where every row goes to all experts.
    Moe {
        spec: MoeSpec,
        gate: Option<Matrix>,
        shared: Option<Shared>,
    },
}

/// The expert that every row goes through.
#[derive(Debug)]
struct Shared {
    swiglu: Swiglu,
    /// Weighs it, where there is one.
    gate: Option<Matrix>,
}

fn tensor(checkpoint: &Checkpoint, name: &str, len: usize) -> Result<Tensor, LoadError> {
    Ok(Tensor::new(checkpoint.vector(name, len)?, &Device::Cpu)?)
}

impl Projection {
    fn load(checkpoint: &Checkpoint, name: &str, shape: [usize; 2], bias: bool) -> Result<Self, CheckpointError> {
        let weight = checkpoint.matrix(&format!("{name}.weight"), shape[0], shape[1])?;
        let bias = if bias { Some(checkpoint.vector(&format!("{name}.bias"), shape[0])?) } else { None };
        Ok(Self { weight, bias })
    }

    fn add_bias(&self, y: &mut [f32]) {
        let Some(bias) = &self.bias else { return };
        for row in y.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
        }
    }
}

impl Attention {
    fn load(checkpoint: &Checkpoint, layer: usize, spec: &GroupedQuerySpec, hidden: usize) -> Result<Self, LoadError> {
        let path = |name: &str| format!("model.layers.{layer}.self_attn.{name}");
        let queries = spec.heads * spec.head_dim;
        let keys = spec.kv_heads * spec.head_dim;
        let projection = |name, outputs| Projection::load(checkpoint, &path(name), [outputs, hidden], spec.qkv_bias);
        let norms = match spec.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some((spec.head_dim, spec.head_dim)),
            QkNorm::WholeVector => Some((queries, keys)),
        };
        let norm = |name, len| tensor(checkpoint, &path(name), len);
        Ok(Self {
            q_proj: projection("q_proj", queries)?,
            k_proj: projection("k_proj", keys)?,
            v_proj: projection("v_proj", keys)?,
            o_proj: Projection::load(checkpoint, &path("o_proj"), [hidden, queries], spec.o_bias)?,
            qk_norm: match norms {
                None => None,
                Some((query, key)) => Some((norm("q_norm.weight", query)?, norm("k_norm.weight", key)?)),
            },
            spec: spec.clone(),
        })
    }

    /// Norm, clip and rope of queries or keys; `x` is `[rows, heads * head_dim]`.
    fn prepare(
        &self,
        mut x: Vec<f32>,
        norm: Option<&Tensor>,
        eps: f32,
        angles: &(Tensor, Tensor),
    ) -> CandleResult<Vec<f32>> {
        if let Some(weight) = norm {
            let width = weight.dims1()?;
            let rows = Tensor::from_vec(x, ((), width), &Device::Cpu)?;
            x = rms_norm(&rows, weight, eps)?.flatten_all()?.to_vec1()?;
        }
        self.clip(&mut x);
        let rows = angles.0.dim(0)?;
        let x = Tensor::from_vec(x, (1, rows, (), self.spec.head_dim), &Device::Cpu)?;
        rope_thd(&x, &angles.0, &angles.1)?.flatten_all()?.to_vec1()
    }

    fn clip(&self, x: &mut [f32]) {
        if let Some(limit) = self.spec.clip_qkv {
            x.iter_mut().for_each(|value| *value = value.clamp(-limit, limit));
        }
    }

    /// `x` is `[rows, hidden]`, and so is the result. Pushes the rows' keys and values to their caches.
    #[allow(clippy::too_many_arguments)]
    fn forward(
        &self,
        layer: usize,
        x: &[f32],
        eps: f32,
        rows: &Rows,
        angles: &(Tensor, Tensor),
        segments: &mut [Segment<'_>],
        pool: &ThreadPool,
    ) -> CandleResult<Vec<f32>> {
        let spec = &self.spec;
        let [mut q, mut k, mut v] = linears(x, [&self.q_proj.weight, &self.k_proj.weight, &self.v_proj.weight], pool);
        self.q_proj.add_bias(&mut q);
        self.k_proj.add_bias(&mut k);
        self.v_proj.add_bias(&mut v);
        let (q_norm, k_norm) = self.qk_norm.as_ref().map_or((None, None), |(q, k)| (Some(q), Some(k)));
        let q = self.prepare(q, q_norm, eps, angles)?;
        let k = self.prepare(k, k_norm, eps, angles)?;
        self.clip(&mut v);
        let width = spec.kv_heads * spec.head_dim;
        for ((segment, key), value) in rows.segments.iter().zip(k.chunks_exact(width)).zip(v.chunks_exact(width)) {
            segments[*segment].cache.layer_mut(layer).push(key, value);
        }
        let attended = self.attend(layer, &q, rows, segments, pool);
        let mut out = linear(&attended, &self.o_proj.weight, pool);
        self.o_proj.add_bias(&mut out);
        Ok(out)
    }

    fn attend(&self, layer: usize, q: &[f32], rows: &Rows, segments: &[Segment<'_>], pool: &ThreadPool) -> Vec<f32> {
        let spec = &self.spec;
        let (heads, head_dim) = (spec.heads, spec.head_dim);
        let isa = Isa::detect();
        let mut attended = vec![0.0; q.len()];
        let out = SharedMut(attended.as_mut_ptr());
        let grouped = heads / spec.kv_heads;
        let longest = rows.positions.iter().max().map_or(0, |position| position + 1);
        // So many that threads have enough to share and scores stay in a cache.
        let queries = rows.positions.len() * heads;
        let most = (queries / (2 * pool.current_num_threads())).min(MOST_SCORES / longest.max(1)).clamp(4, 32) / 4 * 4;
        // Ranges of the queries of one key/value head of one segment: `[rows, grouped]`.
        let mut tasks = Vec::new();
        let mut first = 0;
        for of_segment in rows.segments.chunk_by(|a, b| a == b) {
            let count = of_segment.len() * grouped;
            for kv_head in 0..spec.kv_heads {
                tasks.extend((0..count).step_by(most).map(|from| (first, kv_head, from..count.min(from + most))));
            }
            first += of_segment.len();
        }
        let work = 2 * longest * head_dim * queries;
        run_tasks(tasks.len(), work, pool, |number| {
            let (first, kv_head, ref range) = tasks[number];
            let query = |n: usize| {
                let (row, head) = (first + n / grouped, kv_head * grouped + n % grouped);
                let at = (row * heads + head) * head_dim;
                let end = rows.positions[row] + 1;
                let start = spec.sliding_window.map_or(0, |window| end.saturating_sub(window));
                Query { query: q[at..at + head_dim].as_ptr(), out: out.pointer().wrapping_add(at), start, end }
            };
            let queries: Vec<Query> = range.clone().map(query).collect();
            let (keys, values) = segments[rows.segments[first]].cache.layer(layer).head(kv_head);
            let group = Group { keys, values, head_dim, scale: spec.scale, queries: &queries };
            // SAFETY: detected above; a row sees at least itself, keys and values reach to the last row, and each query
            // is in one task.
            unsafe { attend(isa, group) };
        });
        attended
    }
}

impl FeedForward {
    fn load(checkpoint: &Checkpoint, layer: usize) -> Result<Self, LoadError> {
        let hidden = checkpoint.spec().hidden_size;
        Ok(match &checkpoint.spec().layers[layer].feed_forward {
            FeedForwardSpec::Dense { intermediate_size } => {
                let matrix = |name: &str, outputs, inputs| {
                    checkpoint.matrix(&format!("model.layers.{layer}.mlp.{name}.weight"), outputs, inputs)
                };
                Self::Dense(Swiglu {
                    gate_proj: matrix("gate_proj", *intermediate_size, hidden)?,
                    up_proj: matrix("up_proj", *intermediate_size, hidden)?,
                    down_proj: matrix("down_proj", hidden, *intermediate_size)?,
                })
            }
            FeedForwardSpec::Moe(moe) => Self::Moe {
                gate: match moe.has_gate() {
                    true => Some(checkpoint.matrix(&checkpoint.gate_name(layer), moe.experts, hidden)?),
                    false => None,
                },
                shared: checkpoint.shared_expert(layer)?.map(|(swiglu, gate)| Shared { swiglu, gate }),
                spec: moe.clone(),
            },
        })
    }

    /// `x` is `[rows, hidden]`, after the norm; so is the result.
    fn forward(
        &self,
        layer: usize,
        x: &[f32],
        hidden: usize,
        experts: &mut dyn Experts,
        pool: &ThreadPool,
    ) -> Result<Vec<f32>, ForwardError> {
        let (spec, gate, shared) = match self {
            Self::Dense(swiglu) => return Ok(apply(swiglu, x, pool)),
            Self::Moe { spec, gate, shared } => (spec, gate, shared),
        };
        let choosable = experts.choosable(layer);
        let routing = within(pool, x.len() == hidden, || {
            let scores = match gate {
                Some(gate) => linear(x, gate, pool),
                None => vec![0.0; x.len() / hidden * spec.experts],
            };
            route(&scores, spec.experts, spec.top_k, spec.gate, choosable)
        })?;
        let mut added = None;
        let out = match shared {
            // They wait in this thread, while the shared expert is computed in the pool.
            Some(shared) if experts.are_elsewhere() => pool.in_place_scope(|scope| {
                scope.spawn(|_| added = Some(shared.forward(x, pool)));
                experts.forward(layer, x, &routing)
            }),
            _ => experts.forward(layer, x, &routing),
        };
        let mut out = out.map_err(|source| ForwardError::Experts { layer, source })?;
        if out.len() != x.len() {
            return Err(ForwardError::ExpertsShape { layer, expected: x.len(), found: out.len() });
        }
        if let Some(added) = added.or_else(|| shared.as_ref().map(|shared| shared.forward(x, pool))) {
            out.iter_mut().zip(added).for_each(|(value, added)| *value += added);
        }
        Ok(out)
    }
}

impl Shared {
    /// `x` is `[rows, hidden]`, and so is the result.
    fn forward(&self, x: &[f32], pool: &ThreadPool) -> Vec<f32> {
        let mut out = apply(&self.swiglu, x, pool);
        if let Some(gate) = &self.gate {
            let rows = out.chunks_exact_mut(gate.inputs());
            for (row, score) in rows.zip(linear(x, gate, pool)) {
                let weight = 1.0 / (1.0 + (-score).exp());
                row.iter_mut().for_each(|value| *value *= weight);
            }
        }
        out
    }
}

fn apply(swiglu: &Swiglu, x: &[f32], pool: &ThreadPool) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    run_swiglus(&mut [SwigluJob { swiglu, hidden: x, output: &mut out }], pool);
    out
}

impl Layer {
    pub(super) fn load(checkpoint: &Checkpoint, layer: usize) -> Result<Self, LoadError> {
        let spec = checkpoint.spec();
        let AttentionSpec::GroupedQuery(attention) = &spec.layers[layer].attention;
        let norm = |name: &str| tensor(checkpoint, &format!("model.layers.{layer}.{name}.weight"), spec.hidden_size);
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            attention: Attention::load(checkpoint, layer, attention, spec.hidden_size)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            feed_forward: FeedForward::load(checkpoint, layer)?,
        })
    }

    pub(super) fn head_dim(&self) -> usize {
        self.attention.spec.head_dim
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn forward(
        &self,
        layer: usize,
        x: Tensor,
        spec: &ModelSpec,
        rows: &Rows,
        angles: &(Tensor, Tensor),
        segments: &mut [Segment<'_>],
        experts: &mut dyn Experts,
        pool: &ThreadPool,
    ) -> Result<Tensor, ForwardError> {
        let eps = spec.rms_norm_eps;
        // Candle shares out the rows of a norm from 33 on; a row has as many as heads where each is normed by itself.
        let stay = rows.positions.len() == 1 && self.attention.spec.heads <= 32;
        let (x, normed) = within(pool, stay, || -> CandleResult<_> {
            let normed = rms_norm(&x, &self.input_norm, eps)?.flatten_all()?.to_vec1::<f32>()?;
            let attended = self.attention.forward(layer, &normed, eps, rows, angles, segments, pool)?;
            let x = residual(x, attended, spec)?;
            let normed = rms_norm(&x, &self.post_attention_norm, eps)?.flatten_all()?.to_vec1::<f32>()?;
            Ok((x, normed))
        })?;
        let fed = self.feed_forward.forward(layer, &normed, spec.hidden_size, experts, pool)?;
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
