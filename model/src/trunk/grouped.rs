//! Grouped-query attention.

use candle_core::{Result as CandleResult, Tensor};

use super::attending::{Projection, Task, norm, tasks, tensor};
use super::layer::Pass;
use super::placed::{Placing, linear, linears};
use crate::attention::{Group, Query, attend};
use crate::checkpoint::{Checkpoint, LoadError};
use crate::device::DeviceError;
use crate::lanes::Isa;
use crate::linear::{SharedMut, run_tasks};
use crate::spec::{GroupedQuerySpec, QkNorm};

#[derive(Debug)]
pub(super) struct Grouped {
    spec: GroupedQuerySpec,
    q_proj: Projection,
    k_proj: Projection,
    v_proj: Projection,
    o_proj: Projection,
    /// Weights of the norms of queries and keys.
    qk_norm: Option<(Tensor, Tensor)>,
    /// By head.
    sinks: Option<Vec<f32>>,
}

impl Grouped {
    pub(super) fn load(
        checkpoint: &Checkpoint,
        layer: usize,
        spec: &GroupedQuerySpec,
        hidden: usize,
    ) -> Result<Self, LoadError> {
        let path = |name: &str| format!("model.layers.{layer}.self_attn.{name}");
        let (queries, keys) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let projection = |name, outputs| Projection::load(checkpoint, &path(name), [outputs, hidden], spec.qkv_bias);
        let norm = |name: &str, len| tensor(checkpoint, &path(&format!("{name}.weight")), len);
        let (q_norm, k_norm) = checkpoint.qk_norm_names();
        Ok(Self {
            q_proj: projection("q_proj", queries)?,
            k_proj: projection("k_proj", keys)?,
            v_proj: projection("v_proj", keys)?,
            o_proj: Projection::load(checkpoint, &path("o_proj"), [hidden, queries], spec.o_bias)?,
            qk_norm: match spec.norm_lengths() {
                None => None,
                Some((query, key)) => Some((norm(q_norm, query)?, norm(k_norm, key)?)),
            },
            sinks: if spec.sinks { Some(checkpoint.vector(&path("sinks"), spec.heads)?) } else { None },
            spec: spec.clone(),
        })
    }

    pub(super) fn place(&self, placing: &mut Placing<'_>) -> Result<(), DeviceError> {
        [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj].into_iter().try_for_each(|each| each.place(placing))
    }

    /// Vectors that are normed by themselves in a pass of one row.
    pub(super) fn normed_vectors(&self) -> usize {
        self.spec.heads
    }

    fn clip(&self, x: &mut [f32]) {
        if let Some(limit) = self.spec.clip_qkv {
            x.iter_mut().for_each(|value| *value = value.clamp(-limit, limit));
        }
    }

    /// Norm, clip and rope of queries or keys; `x` is `[rows, heads, head_dim]`.
    fn prepare(
        &self,
        mut x: Vec<f32>,
        heads: usize,
        weight: Option<&Tensor>,
        eps: f32,
        pass: &Pass<'_, '_>,
    ) -> CandleResult<Vec<f32>> {
        let after = self.spec.qk_norm == QkNorm::PerHeadAfterRope;
        if let Some(weight) = weight.filter(|_| !after) {
            x = norm(x, weight, eps)?;
        }
        self.clip(&mut x);
        pass.angles.rotate(&mut x, heads, self.spec.head_dim, 0);
        match weight.filter(|_| after) {
            Some(weight) => norm(x, weight, eps),
            None => Ok(x),
        }
    }

    /// `x` is `[rows, hidden]`, and so is the result. Pushes the rows' keys and values to their caches.
    pub(super) fn forward(&self, x: &[f32], eps: f32, pass: &mut Pass<'_, '_>) -> CandleResult<Vec<f32>> {
        let (spec, pool) = (&self.spec, pass.pool);
        let [mut q, mut k, mut v] = linears(x, [&self.q_proj.weight, &self.k_proj.weight, &self.v_proj.weight], pool);
        self.q_proj.add_bias(&mut q);
        self.k_proj.add_bias(&mut k);
        self.v_proj.add_bias(&mut v);
        let (q_norm, k_norm) = self.qk_norm.as_ref().map_or((None, None), |(q, k)| (Some(q), Some(k)));
        let q = self.prepare(q, spec.heads, q_norm, eps, pass)?;
        let k = self.prepare(k, spec.kv_heads, k_norm, eps, pass)?;
        self.clip(&mut v);
        let width = spec.kv_heads * spec.head_dim;
        pass.push(k.chunks_exact(width).zip(v.chunks_exact(width)));
        let attended = self.attend(&q, pass);
        let mut out = linear(&attended, &self.o_proj.weight, pool);
        self.o_proj.add_bias(&mut out);
        Ok(out)
    }

    /// `q` is `[rows, heads, head_dim]`, and so is the result.
    fn attend(&self, q: &[f32], pass: &Pass<'_, '_>) -> Vec<f32> {
        let (spec, rows) = (&self.spec, pass.rows);
        let (heads, head_dim) = (spec.heads, spec.head_dim);
        let isa = Isa::detect();
        let mut attended = vec![0.0; q.len()];
        let out = SharedMut(attended.as_mut_ptr());
        let grouped = heads / spec.kv_heads;
        let tasks = tasks(rows, spec.kv_heads, grouped, pass.pool);
        let work = 2 * rows.longest() * q.len();
        run_tasks(tasks.len(), work, pass.pool, |number| {
            let Task { first, kv_head, queries, .. } = &tasks[number];
            let query = |n: usize| {
                let (row, head) = (first + n / grouped, kv_head * grouped + n % grouped);
                let at = (row * heads + head) * head_dim;
                let end = rows.positions[row] + 1;
                Query {
                    query: q[at..at + head_dim].as_ptr(),
                    out: out.pointer().wrapping_add(at),
                    sink: self.sinks.as_ref().map(|sinks| sinks[head]),
                    start: spec.sliding_window.map_or(0, |window| end.saturating_sub(window)),
                    end,
                }
            };
            let queries: Vec<Query> = queries.clone().map(query).collect();
            let (keys, values) = pass.cache_of(*first).head(*kv_head);
            let (key_dim, value_dim, value_stride) = (head_dim, head_dim, head_dim);
            let group = Group { keys, values, key_dim, value_dim, value_stride, scale: spec.scale, queries: &queries };
            // SAFETY: detected above; a row sees at least itself, keys and values reach to the last row, and each query
            // is in one task.
            unsafe { attend(isa, group) };
        });
        attended
    }
}
