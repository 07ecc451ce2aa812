//! Routed experts: loading one, and running many as one piece of work.

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

use crate::activation::{add_bias, clamped_swiglu};
use crate::checkpoint::{Checkpoint, LoadError, Swiglu};
use crate::lanes::{Isa, IsaError, check_isa};
use crate::linear::{Inputs, SharedMut, column_ranges, kernel, run_tasks};
use crate::share::Pending;
use crate::spec::Activation;

/// One routed expert: `down_proj(silu(gate_proj(x)) * up_proj(x))`, or another [`Activation`] of the two, with biases if the model has
/// them. Source: Mixtral, arXiv:2401.04088.
///
/// Weights stay in the checkpoint's mapping in their stored dtype, unless they lie there transposed; arithmetic is f32.
#[derive(Debug)]
pub struct Expert {
    pub(crate) swiglu: Swiglu,
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
        let Swiglu { gate_proj, up_proj, down_proj, biases, .. } = &self.swiglu;
        gate_proj.bytes() + up_proj.bytes() + down_proj.bytes() + biases.as_ref().map_or(0, |biases| biases.bytes)
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
struct Pointers<'a> {
    swiglu: &'a Swiglu,
    hidden: Inputs,
    /// What `gate` is in the end.
    middle: Inputs,
    rows: usize,
    gate: SharedMut,
    up: SharedMut,
    output: SharedMut,
    /// Parts of gate and up that are not done.
    pending: Pending,
}

/// See [`run_experts`].
///
/// One piece of work: first the gates and ups of all jobs, then their downs, each as soon as its own gate and up are there.
pub(crate) fn run_swiglus(jobs: &mut [SwigluJob<'_>], pool: &ThreadPool) {
    let isa = Isa::detect();
    let threads = pool.current_num_threads();
    let middle: usize = jobs
        .iter()
        .map(|job| {
            let hidden_size = job.swiglu.gate_proj.inputs();
            let rows = job.hidden.len() / hidden_size;
            assert_eq!(job.hidden.len(), rows * hidden_size, "input in rows of {hidden_size}");
            assert_eq!(job.output.len(), job.hidden.len(), "output as long as the input");
            rows * job.swiglu.gate_proj.outputs()
        })
        .sum();
    let mut buffer = vec![0.0; 2 * middle];
    let mut rest = buffer.as_mut_slice();
    let (mut first, mut second, mut work) = (Vec::new(), Vec::new(), 0);
    let mut pointers = Vec::with_capacity(jobs.len());
    for (number, job) in jobs.iter_mut().enumerate() {
        let Swiglu { gate_proj, down_proj, .. } = job.swiglu;
        let rows = job.hidden.len() / gate_proj.inputs();
        let (gate, up);
        (gate, rest) = rest.split_at_mut(rows * gate_proj.outputs());
        (up, rest) = rest.split_at_mut(rows * gate_proj.outputs());
        let (gate, up) = (SharedMut(gate.as_mut_ptr()), SharedMut(up.as_mut_ptr()));
        let before = first.len();
        let ranges = column_ranges(gate_proj.outputs(), 2 * rows * gate_proj.inputs(), threads);
        first.extend(ranges.map(|columns| (number, columns)));
        let ranges = column_ranges(down_proj.outputs(), rows * down_proj.inputs(), threads);
        second.extend(ranges.map(|columns| (number, columns)));
        work += 3 * rows * down_proj.outputs() * down_proj.inputs();
        pointers.push(Pointers {
            swiglu: job.swiglu,
            hidden: Inputs::new(isa, job.hidden.as_ptr(), rows, gate_proj.inputs()),
            middle: Inputs::new(isa, gate.pointer(), rows, gate_proj.outputs()),
            rows,
            gate,
            up,
            output: SharedMut(job.output.as_mut_ptr()),
            pending: Pending::new(first.len() - before),
        });
    }
    // SAFETY: the lengths asserted and allocated above; tasks write to columns of their own, and a down waits for its gate.
    run_tasks(first.len() + second.len(), work, pool, |number| unsafe {
        if let Some((job, columns)) = first.get(number) {
            let job = &pointers[*job];
            let _done = job.pending.task();
            gate_and_up(job, isa, *columns);
        } else {
            let (job, columns) = second[number - first.len()];
            let job = &pointers[job];
            job.pending.wait();
            down(job, columns);
        }
    });
}

/// Some columns of `silu(gate_proj(x)) * up_proj(x)`, into `gate`.
///
/// # Safety
/// As for [`Matrix::multiply`](crate::linear::Matrix::multiply).
unsafe fn gate_and_up(job: &Pointers<'_>, isa: Isa, columns: (usize, usize)) {
    let (x, gate, up) = (&job.hidden, job.gate.pointer(), job.up.pointer());
    let swiglu = job.swiglu;
    let (width, len) = (swiglu.gate_proj.outputs(), columns.1 - columns.0);
    unsafe {
        swiglu.gate_proj.multiply(x, gate, columns);
        swiglu.up_proj.multiply(x, up, columns);
        if let Some(biases) = &swiglu.biases {
            add_to_columns(gate, width, job.rows, columns, &biases.gate_proj);
            add_to_columns(up, width, job.rows, columns, &biases.up_proj);
        }
        for row in 0..job.rows {
            let at = row * width + columns.0;
            match swiglu.activation {
                Activation::Swiglu => kernel::silu_mul(isa, gate.add(at), up.add(at), len),
                Activation::ClampedSwiglu { limit, alpha } => {
                    clamped_swiglu(isa, gate.add(at), up.add(at), len, limit, alpha);
                }
            }
        }
    }
}

/// Some columns of `down_proj(gate)`, into `output`.
///
/// # Safety
/// As for [`Matrix::multiply`](crate::linear::Matrix::multiply).
unsafe fn down(job: &Pointers<'_>, columns: (usize, usize)) {
    let (output, down_proj) = (job.output.pointer(), &job.swiglu.down_proj);
    unsafe {
        down_proj.multiply(&job.middle, output, columns);
        if let Some(biases) = &job.swiglu.biases {
            add_to_columns(output, down_proj.outputs(), job.rows, columns, &biases.down_proj);
        }
    }
}

/// Adds a bias to some columns of `y`, which is `[rows, width]`.
///
/// # Safety
/// `y` is valid for all that, and nobody else may touch those columns meanwhile.
unsafe fn add_to_columns(y: *mut f32, width: usize, rows: usize, columns: (usize, usize), bias: &[f32]) {
    for row in 0..rows {
        let to = unsafe { std::slice::from_raw_parts_mut(y.add(row * width + columns.0), columns.1 - columns.0) };
        add_bias(to, &bias[columns.0..columns.1]);
    }
}

/// Why nothing can be computed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ComputeError {
    /// Other instructions are asked for than there are.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// The system refuses to start the threads.
    #[error(transparent)]
    Threads(#[from] ThreadPoolBuildError),
}

/// A pool of `threads` threads for computing; 0 takes as many as there are cores.
///
/// # Errors
/// [`ComputeError`], as its variants say.
pub fn compute_pool(threads: usize) -> Result<ThreadPool, ComputeError> {
    check_isa()?;
    Ok(ThreadPoolBuilder::new().num_threads(threads).thread_name(|number| format!("compute-{number}")).build()?)
}
