//! Multi-head latent attention. Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
//!
//! What a head's keys and values are made of, by the two halves of `kv_b_proj`, is one short vector per token, the latent. Instead of
//! making them for all positions, the half of the keys is applied to the queries and that of the values to the sum of weighted latents,
//! which is the same by the associative law: `q . (K c) = (K^T q) . c`. All heads then share one key, the latent with the part that
//! rotates, whose first values are also the value. The cache holds nothing else.
//!
//! It is computed so in any case, also where a prompt is so long that making the keys would take less: a row's bits must not depend on
//! how many others there are.

use candle_core::{Result as CandleResult, Tensor};

use super::attending::{Projection, Task, norm, tasks, tensor};
use super::indexer::Indexer;
use super::layer::Pass;
use super::placed::{Placing, TrunkMatrix, linear, linears};
use crate::attention::{Group, Query, attend};
use crate::checkpoint::{Checkpoint, LoadError};
use crate::device::DeviceError;
use crate::lanes::Isa;
use crate::linear::{Combination, Inputs, Matrix, SharedMut, run_tasks};
use crate::spec::LatentSpec;

/// Added to the mean square in the norms of the short vectors, whatever the config says of other norms.
const EPS: f32 = 1e-6;
/// Heads that attend to chosen positions together, so that their scores stay in a cache.
const HEADS: usize = 16;

#[derive(Debug)]
pub(super) struct Latent {
    spec: LatentSpec,
    queries: Queries,
    /// Makes the latent and the part of the key that rotates.
    kv_a_proj: Projection,
    kv_a_norm: Tensor,
    /// `[heads, qk_nope_head_dim + v_head_dim, kv_lora_rank]`; never on a card, as it is used head by head and from both sides.
    kv_b_proj: Matrix,
    o_proj: Projection,
    indexer: Option<Indexer>,
}

/// What makes the queries.
#[derive(Debug)]
enum Queries {
    Whole(TrunkMatrix),
    Compressed { a: Projection, norm: Tensor, b: TrunkMatrix },
}

impl Latent {
    pub(super) fn load(
        checkpoint: &Checkpoint,
        layer: usize,
        spec: &LatentSpec,
        hidden: usize,
    ) -> Result<Self, LoadError> {
        let path = |name: &str| format!("model.layers.{layer}.self_attn.{name}");
        let queries = spec.heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim);
        let projection = |name, shape| Projection::load(checkpoint, &path(name), shape, spec.bias);
        let (rank, expanded) = (spec.kv_lora_rank, spec.heads * (spec.qk_nope_head_dim + spec.v_head_dim));
        Ok(Self {
            queries: match spec.q_lora_rank {
                None => Queries::Whole(checkpoint.matrix(&path("q_proj.weight"), queries, hidden)?.into()),
                Some(rank) => Queries::Compressed {
                    a: projection("q_a_proj", [rank, hidden])?,
                    norm: tensor(checkpoint, &path("q_a_layernorm.weight"), rank)?,
                    b: checkpoint.matrix(&path("q_b_proj.weight"), queries, rank)?.into(),
                },
            },
            kv_a_proj: projection("kv_a_proj_with_mqa", [spec.cached_values(), hidden])?,
            kv_a_norm: tensor(checkpoint, &path("kv_a_layernorm.weight"), rank)?,
            kv_b_proj: checkpoint.matrix(&path("kv_b_proj.weight"), expanded, rank)?,
            o_proj: projection("o_proj", [hidden, spec.heads * spec.v_head_dim])?,
            indexer: Indexer::load(checkpoint, layer, spec, hidden)?,
            spec: spec.clone(),
        })
    }

    pub(super) fn place(&self, placing: &mut Placing<'_>) -> Result<(), DeviceError> {
        match &self.queries {
            Queries::Whole(q_proj) => placing.matrix(q_proj)?,
            Queries::Compressed { a, b, .. } => {
                a.place(placing)?;
                placing.matrix(b)?;
            }
        }
        self.kv_a_proj.place(placing)?;
        self.o_proj.place(placing)?;
        self.indexer.as_ref().map_or(Ok(()), |indexer| indexer.place(placing))
    }

    /// `x` is `[rows, hidden]`, and so is the result. Pushes the rows' latents to their caches.
    pub(super) fn forward(&self, x: &[f32], pass: &mut Pass<'_, '_>) -> CandleResult<Vec<f32>> {
        let (spec, pool) = (&self.spec, pass.pool);
        let (mut q, mut kv, asked) = match &self.queries {
            Queries::Whole(q_proj) => {
                let [q, kv] = linears(x, [q_proj, &self.kv_a_proj.weight], pool);
                (q, kv, None)
            }
            Queries::Compressed { a, norm: weight, b } => {
                let [mut compressed, kv] = linears(x, [&a.weight, &self.kv_a_proj.weight], pool);
                a.add_bias(&mut compressed);
                let compressed = norm(compressed, weight, EPS)?;
                let asked = self.indexer.as_ref().map(|indexer| (indexer, indexer.ask(x, &compressed, pass)));
                (linear(&compressed, b, pool), kv, asked)
            }
        };
        self.kv_a_proj.add_bias(&mut kv);
        let (rank, width) = (spec.kv_lora_rank, spec.cached_values());
        let latents = kv.chunks_exact(width).flat_map(|row| &row[..rank]).copied().collect();
        let latents = norm(latents, &self.kv_a_norm, EPS)?;
        for (row, latent) in kv.chunks_exact_mut(width).zip(latents.chunks_exact(rank)) {
            row[..rank].copy_from_slice(latent);
        }
        pass.angles.rotate(&mut kv, 1, width, rank);
        let query_dim = spec.qk_nope_head_dim + spec.qk_rope_head_dim;
        pass.angles.rotate(&mut q, spec.heads, query_dim, spec.qk_nope_head_dim);
        let index_keys = asked.as_ref().map_or(&[][..], |(_, asked)| &asked.keys);
        let index_keys = index_keys.chunks_exact(spec.indexer.as_ref().map_or(1, |indexer| indexer.head_dim));
        pass.push(kv.chunks_exact(width).zip(index_keys.chain(std::iter::repeat(&[][..]))));
        let seen = asked.map(|(indexer, asked)| indexer.choose(&asked, pass)).unwrap_or_default();
        let q = self.absorb(&q, pass);
        let mut attended = self.attend(&q, &seen, pass);
        self.attend_to_chosen(&q, &seen, &mut attended, pass);
        let mut out = linear(&self.expand(&attended, pass), &self.o_proj.weight, pool);
        self.o_proj.add_bias(&mut out);
        Ok(out)
    }

    /// Queries for latents of queries for keys: `[rows, heads, qk_nope_head_dim + qk_rope_head_dim]` to
    /// `[rows, heads, kv_lora_rank + qk_rope_head_dim]`.
    fn absorb(&self, q: &[f32], pass: &Pass<'_, '_>) -> Vec<f32> {
        let spec = &self.spec;
        let (nope, rank, width) = (spec.qk_nope_head_dim, spec.kv_lora_rank, spec.cached_values());
        let query_dim = nope + spec.qk_rope_head_dim;
        let isa = Isa::detect();
        let rows = pass.rows.positions.len();
        let mut absorbed = vec![0.0; rows * spec.heads * width];
        for (to, from) in absorbed.chunks_exact_mut(width).zip(q.chunks_exact(query_dim)) {
            to[rank..].copy_from_slice(&from[nope..]);
        }
        let out = SharedMut(absorbed.as_mut_ptr());
        let (x_stride, y_stride) = (spec.heads * query_dim, spec.heads * width);
        let shape = Combination { rows, inputs: nope, outputs: rank, x_stride, y_stride };
        run_tasks(spec.heads, rows * spec.heads * nope * rank, pass.pool, |head| {
            let first = head * (nope + spec.v_head_dim);
            let (x, y) = (q[head * query_dim..].as_ptr(), out.pointer().wrapping_add(head * width));
            // SAFETY: detected above; the lengths allocated above and checked when the matrix was loaded; each head is in one task.
            unsafe { self.kv_b_proj.combine(isa, first, x, y, shape) };
        });
        absorbed
    }

    /// Sums of weighted latents, `[heads, rows, kv_lora_rank]`, of the rows that see all positions before them; `q` is what [`Self::absorb`] gives.
    fn attend(&self, q: &[f32], seen: &[Option<Vec<usize>>], pass: &Pass<'_, '_>) -> Vec<f32> {
        let (spec, rows) = (&self.spec, pass.rows);
        let (heads, rank, width) = (spec.heads, spec.kv_lora_rank, spec.cached_values());
        let isa = Isa::detect();
        let all_rows = rows.positions.len();
        let mut attended = vec![0.0; heads * all_rows * rank];
        let out = SharedMut(attended.as_mut_ptr());
        let tasks = tasks(rows, 1, heads, pass.pool);
        let work = 2 * rows.longest() * q.len();
        run_tasks(tasks.len(), work, pass.pool, |number| {
            let Task { first, rows: of_segment, kv_head, queries } = &tasks[number];
            let query = |n: usize| {
                let (row, head) = (first + n % of_segment, n / of_segment);
                let at = (row * heads + head) * width;
                Query {
                    query: q[at..at + width].as_ptr(),
                    out: out.pointer().wrapping_add((head * all_rows + row) * rank),
                    sink: None,
                    start: 0,
                    end: rows.positions[row] + 1,
                }
            };
            let sees_all = |n: &usize| !matches!(seen.get(first + n % of_segment), Some(Some(_)));
            let queries: Vec<Query> = queries.clone().filter(sees_all).map(query).collect();
            if queries.is_empty() {
                return;
            }
            let (keys, _) = pass.cache_of(*first).head(*kv_head);
            // SAFETY: detected above; a row sees at least itself, the latents reach to the last row, and each query
            // is in one task.
            unsafe { attend(isa, self.group(keys, &queries)) };
        });
        attended
    }

    fn group<'a>(&self, latents: &'a [f32], queries: &'a [Query]) -> Group<'a> {
        let width = self.spec.cached_values();
        Group {
            keys: latents,
            values: latents,
            key_dim: width,
            value_dim: self.spec.kv_lora_rank,
            value_stride: width,
            scale: self.spec.scale,
            queries,
        }
    }

    /// Adds those of the rows that see chosen positions. Their latents are brought together, so that each is read once for some heads.
    fn attend_to_chosen(&self, q: &[f32], seen: &[Option<Vec<usize>>], attended: &mut [f32], pass: &Pass<'_, '_>) {
        let (heads, rank, width) = (self.spec.heads, self.spec.kv_lora_rank, self.spec.cached_values());
        let all_rows = pass.rows.positions.len();
        let chosen: Vec<(usize, &Vec<usize>)> =
            seen.iter().enumerate().filter_map(|(row, seen)| Some((row, seen.as_ref()?))).collect();
        let Some((_, positions)) = chosen.first() else { return };
        let isa = Isa::detect();
        let out = SharedMut(attended.as_mut_ptr());
        // Few rows share their heads out; many bring latents together once for all heads.
        let parts = pass.pool.current_num_threads().div_ceil(chosen.len()).min(heads);
        let work = 2 * chosen.len() * positions.len() * heads * width;
        run_tasks(chosen.len() * parts, work, pass.pool, |number| {
            let ((row, positions), part) = (chosen[number / parts], number % parts);
            let (all, _) = pass.cache_of(row).head(0);
            let latents: Vec<f32> =
                positions.iter().flat_map(|position| &all[position * width..][..width]).copied().collect();
            let query = |head: usize| Query {
                query: q[(row * heads + head) * width..][..width].as_ptr(),
                out: out.pointer().wrapping_add((head * all_rows + row) * rank),
                sink: None,
                start: 0,
                end: positions.len(),
            };
            let queries: Vec<Query> = (heads * part / parts..heads * (part + 1) / parts).map(query).collect();
            for queries in queries.chunks(HEADS) {
                // SAFETY: detected above; there are as many latents as positions, and each query is in one task.
                unsafe { attend(isa, self.group(&latents, queries)) };
            }
        });
    }

    /// Values of sums of latents: `[heads, rows, kv_lora_rank]` to `[rows, heads, v_head_dim]`.
    fn expand(&self, attended: &[f32], pass: &Pass<'_, '_>) -> Vec<f32> {
        let spec = &self.spec;
        let (nope, dim, rank) = (spec.qk_nope_head_dim, spec.v_head_dim, spec.kv_lora_rank);
        let isa = Isa::detect();
        let rows = pass.rows.positions.len();
        let mut values = vec![0.0; rows * spec.heads * dim];
        let out = SharedMut(values.as_mut_ptr());
        run_tasks(spec.heads, rows * spec.heads * dim * rank, pass.pool, |head| {
            let first = head * (nope + dim) + nope;
            // The columns of this head come to where its values are.
            let y = out.pointer().wrapping_add(head * dim).wrapping_sub(first);
            let x = Inputs::new(isa, attended[head * rows * rank..].as_ptr(), rows, rank);
            // SAFETY: detected above; the lengths allocated above and checked when the matrix was loaded; each head is in one task.
            unsafe { self.kv_b_proj.multiply_to(&x, y, spec.heads * dim, (first, first + dim)) };
        });
        values
    }
}
