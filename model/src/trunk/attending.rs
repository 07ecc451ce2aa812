//! What the kinds of attention share: projections, norms of vectors, and the division of a pass into pieces of work.

use std::ops::Range;

use candle_core::{Device, Result as CandleResult, Tensor};
use candle_nn::ops::rms_norm;
use rayon::ThreadPool;

use super::layer::Rows;
use super::placed::{Placing, TrunkMatrix};
use crate::activation::add_bias;
use crate::checkpoint::{Checkpoint, CheckpointError, LoadError};
use crate::device::DeviceError;

/// Scores that a task of attention keeps at a time: 512 KiB.
const MOST_SCORES: usize = 128 << 10;

#[derive(Debug)]
pub(super) struct Projection {
    pub(super) weight: TrunkMatrix,
    bias: Option<Vec<f32>>,
}

pub(super) fn tensor(checkpoint: &Checkpoint, name: &str, len: usize) -> Result<Tensor, LoadError> {
    Ok(Tensor::new(checkpoint.vector(name, len)?, &Device::Cpu)?)
}

impl Projection {
    pub(super) fn load(
        checkpoint: &Checkpoint,
        name: &str,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<Self, CheckpointError> {
        let weight = checkpoint.matrix(&format!("{name}.weight"), shape[0], shape[1])?.into();
        let bias = if bias { Some(checkpoint.vector(&format!("{name}.bias"), shape[0])?) } else { None };
        Ok(Self { weight, bias })
    }

    pub(super) fn place(&self, placing: &mut Placing<'_>) -> Result<(), DeviceError> {
        placing.matrix(&self.weight)
    }

    /// To `y` of `[rows, outputs]`.
    pub(super) fn add_bias(&self, y: &mut [f32]) {
        if let Some(bias) = &self.bias {
            y.chunks_exact_mut(bias.len()).for_each(|row| add_bias(row, bias));
        }
    }
}

/// RMS norm of vectors as long as `weight`, one after another in `x`.
pub(super) fn norm(x: Vec<f32>, weight: &Tensor, eps: f32) -> CandleResult<Vec<f32>> {
    let rows = Tensor::from_vec(x, ((), weight.dims1()?), &Device::Cpu)?;
    rms_norm(&rows, weight, eps)?.flatten_all()?.to_vec1()
}

/// Some queries over the keys of one key/value head of one segment.
#[derive(Debug)]
pub(super) struct Task {
    /// The first row of the segment in the pass.
    pub(super) first: usize,
    /// Rows of the segment in the pass.
    pub(super) rows: usize,
    pub(super) kv_head: usize,
    /// Which of the `rows x grouped` queries.
    pub(super) queries: Range<usize>,
}

/// Divides a pass whose rows have `grouped` queries for each of `kv_heads`: so many tasks that threads have enough to share, and so few
/// queries in each that scores stay in a cache.
pub(super) fn tasks(rows: &Rows, kv_heads: usize, grouped: usize, pool: &ThreadPool) -> Vec<Task> {
    let longest = rows.longest();
    let queries = rows.positions.len() * kv_heads * grouped;
    let most = (queries / (2 * pool.current_num_threads())).min(MOST_SCORES / longest.max(1)).clamp(4, 32) / 4 * 4;
    let mut tasks = Vec::new();
    let mut first = 0;
    for of_segment in rows.segments.chunk_by(|a, b| a == b) {
        let rows = of_segment.len();
        let count = rows * grouped;
        for kv_head in 0..kv_heads {
            let queries = (0..count).step_by(most).map(|from| from..count.min(from + most));
            tasks.extend(queries.map(|queries| Task { first, rows, kv_head, queries }));
        }
        first += rows;
    }
    tasks
}
