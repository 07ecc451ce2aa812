//! Routed experts: loading one, and running many as one piece of work.

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

use crate::checkpoint::{Checkpoint, LoadError, Swiglu};
use crate::lanes::Isa;
use crate::linear::{SharedMut, column_ranges, kernel, run_tasks};

/// One routed expert: `down_proj(silu(gate_proj(x)) * up_proj(x))`. Source: Mixtral, arXiv:2401.04088.
///
/// Weights stay in the checkpoint's mapping in their stored dtype; arithmetic is f32.
#[derive(Debug)]
pub struct Expert {
    swiglu: Swiglu,
}

impl Expert {
    /// Finds the expert's tensors in the checkpoint. Nothing is read from disk before the first use, unless the
    /// mapping is not aligned for the dtype.
    ///
    /// # Errors
    /// `NoSuchExpert` for a dense layer or a number out of range.
    pub fn load(checkpoint: &Checkpoint, layer: usize, expert: usize) -> Result<Self, LoadError> {
        Ok(Self { swiglu: checkpoint.expert(layer, expert)? })
    }

    /// Bytes of its weights as stored.
    pub fn bytes(&self) -> u64 {
        let Swiglu { gate_proj, up_proj, down_proj } = &self.swiglu;
        gate_proj.bytes() + up_proj.bytes() + down_proj.bytes()
    }

    /// Values in a row of its input and output.
    pub fn hidden_size(&self) -> usize {
        self.swiglu.gate_proj.inputs()
    }
}

/// One expert applied to some rows.
#[derive(Debug)]
pub struct ExpertJob<'a> {
    /// The expert.
    pub expert: &'a Expert,
    /// `[rows, hidden_size]`
    pub hidden: &'a [f32],
    /// `[rows, hidden_size]`: overwritten with the result, not weighted.
    pub output: &'a mut [f32],
}

/// Computes all jobs as one piece of work over the pool. A row's bits do not depend on the other rows, on the order
/// of the jobs or on the number of threads.
///
/// # Panics
/// If the input of a job is not a whole number of rows, or its output has another length.
pub fn run_experts(jobs: &mut [ExpertJob<'_>], pool: &ThreadPool) {
    let mut swiglus: Vec<_> = jobs
        .iter_mut()
        .map(|job| SwigluJob { swiglu: &job.expert.swiglu, hidden: job.hidden, output: job.output })
        .collect();
    run_swiglus(&mut swiglus, pool);
}

/// A [`Swiglu`] applied to rows of `hidden_size` values.
pub(crate) struct SwigluJob<'a> {
    pub(crate) swiglu: &'a Swiglu,
    pub(crate) hidden: &'a [f32],
    pub(crate) output: &'a mut [f32],
}

/// Pointers of one job, good for as long as `run_swiglus` runs.
#[derive(Clone, Copy)]
struct Pointers<'a> {
    swiglu: &'a Swiglu,
    hidden: &'a [f32],
    rows: usize,
    gate: SharedMut,
    up: SharedMut,
    output: SharedMut,
}

/// See [`run_experts`].
pub(crate) fn run_swiglus(jobs: &mut [SwigluJob<'_>], pool: &ThreadPool) {
    let isa = Isa::detect();
    let threads = pool.current_num_threads();
    let mut buffers: Vec<(Vec<f32>, Vec<f32>)> = jobs
        .iter()
        .map(|job| {
            let (hidden_size, width) = (job.swiglu.gate_proj.inputs(), job.swiglu.gate_proj.outputs());
            let rows = job.hidden.len() / hidden_size;
            assert_eq!(job.hidden.len(), rows * hidden_size, "input in rows of {hidden_size}");
            assert_eq!(job.output.len(), job.hidden.len(), "output as long as the input");
            (vec![0.0; rows * width], vec![0.0; rows * width])
        })
        .collect();
    let pointers: Vec<Pointers<'_>> = jobs
        .iter_mut()
        .zip(&mut buffers)
        .map(|(job, (gate, up))| Pointers {
            swiglu: job.swiglu,
            hidden: job.hidden,
            rows: job.hidden.len() / job.swiglu.gate_proj.inputs(),
            gate: SharedMut(gate.as_mut_ptr()),
            up: SharedMut(up.as_mut_ptr()),
            output: SharedMut(job.output.as_mut_ptr()),
        })
        .collect();
    let tasks = |columns_of: fn(&Swiglu) -> usize, inputs_of: fn(&Swiglu) -> usize| -> Vec<_> {
        pointers
            .iter()
            .flat_map(|job| {
                let work = job.rows * inputs_of(job.swiglu);
                column_ranges(columns_of(job.swiglu), work, threads).map(move |columns| (*job, columns))
            })
            .collect()
    };
    let work: usize =
        pointers.iter().map(|job| job.rows * job.swiglu.down_proj.outputs() * job.swiglu.down_proj.inputs()).sum();
    // SAFETY: the lengths asserted above; tasks write to columns of their own, and the second step starts when the
    // first is done.
    run_tasks(
        tasks(|s| s.gate_proj.outputs(), |s| 2 * s.gate_proj.inputs()),
        2 * work,
        pool,
        |(job, columns)| unsafe {
            let (x, gate, up) = (job.hidden.as_ptr(), job.gate.pointer(), job.up.pointer());
            job.swiglu.gate_proj.multiply(isa, x, gate, job.rows, columns);
            job.swiglu.up_proj.multiply(isa, x, up, job.rows, columns);
            for row in 0..job.rows {
                let at = row * job.swiglu.gate_proj.outputs() + columns.0;
                kernel::silu_mul(isa, gate.add(at), up.add(at), columns.1 - columns.0);
            }
        },
    );
    // SAFETY: as above.
    run_tasks(tasks(|s| s.down_proj.outputs(), |s| s.down_proj.inputs()), work, pool, |(job, columns)| unsafe {
        job.swiglu.down_proj.multiply(isa, job.gate.pointer(), job.output.pointer(), job.rows, columns);
    });
}

/// A pool of `threads` threads for computing; 0 takes as many as there are cores.
///
/// # Errors
/// If the system refuses to start the threads.
pub fn compute_pool(threads: usize) -> Result<ThreadPool, ThreadPoolBuildError> {
    ThreadPoolBuilder::new().num_threads(threads).thread_name(|number| format!("compute-{number}")).build()
}
