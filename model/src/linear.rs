//! Matrices in their stored dtype, and `y = x W^T` with results that do not depend on batch, threads or machine.

mod combine;
mod formats;
mod halves;
mod inputs;
pub(crate) mod kernel;
mod packed;
mod quantised;
#[cfg(test)]
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use half::{bf16, f16};
use rayon::ThreadPool;

pub(crate) use self::combine::Combination;
pub(crate) use self::formats::{FP8_TILE, Mxfp4, Q4K, Q8_0};
pub(crate) use self::inputs::Inputs;
pub(crate) use self::packed::{GROUP, Packed};
use self::quantised::Quantised;
use crate::checkpoint::{CheckpointError, Mapping, StoredDtype, finite};
use crate::lanes::Isa;
use crate::share::share;

/// A matrix `[outputs, inputs]`, row-major, in its stored dtype.
pub(crate) struct Matrix {
    values: Values,
    outputs: usize,
    inputs: usize,
}

enum Values {
    F32(Slab<f32>),
    F16(Slab<f16>),
    Bf16(Slab<bf16>),
    Quantised(Box<Quantised>),
}

/// Values in the mapping, or a copy where the mapping is not aligned for them.
enum Slab<T: 'static> {
    /// `values` points into `_map`, which keeps it alive.
    Mapped {
        values: &'static [T],
        _map: Arc<Mapping>,
    },
    Owned(Vec<T>),
}

impl<T> Slab<T> {
    fn values(&self) -> &[T] {
        match self {
            Self::Mapped { values, .. } => values,
            Self::Owned(values) => values,
        }
    }
}

impl<T: Copy + Default> Slab<T> {
    /// `len` values from byte `start` of the mapping. Panics if they do not lie in it.
    fn new(map: &Arc<Mapping>, start: usize, len: usize) -> Self {
        let bytes = &map[start..start + len * size_of::<T>()];
        // SAFETY: T is f32, f16 or bf16, for which every bit pattern is a value.
        let (before, values, after) = unsafe { bytes.align_to::<T>() };
        if before.is_empty() && after.is_empty() {
            // SAFETY: the slice lies in the mapping, whose address does not change and which lives in the same value.
            let values = unsafe { std::slice::from_raw_parts(values.as_ptr(), values.len()) };
            return Self::Mapped { values, _map: Arc::clone(map) };
        }
        let mut copy = vec![T::default(); len];
        // SAFETY: `copy` has room for `len` values, and bytes are valid values of T.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), copy.as_mut_ptr().cast(), bytes.len()) };
        Self::Owned(copy)
    }
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Matrix({:?} [{}, {}])", self.dtype(), self.outputs, self.inputs)
    }
}

impl Matrix {
    /// Values from byte `start` of the mapping on. `None` for a dtype whose scales lie elsewhere, and if a row is no whole number of
    /// blocks. The caller has checked that the values lie in the mapping.
    pub(crate) fn new(
        map: &Arc<Mapping>,
        start: usize,
        dtype: StoredDtype,
        outputs: usize,
        inputs: usize,
    ) -> Option<Self> {
        let len = outputs * inputs;
        let values = match dtype {
            StoredDtype::F32 => Values::F32(Slab::new(map, start, len)),
            StoredDtype::F16 => Values::F16(Slab::new(map, start, len)),
            StoredDtype::Bf16 => Values::Bf16(Slab::new(map, start, len)),
            _ => Values::Quantised(Box::new(Quantised::blocks((map, start), dtype, outputs, inputs)?)),
        };
        Some(Self { values, outputs, inputs })
    }

    /// Floats of eight bits, and their scales, f32 `[outputs / 128, inputs / 128]`, both rounded up: each a mapping and a byte of it. The
    /// caller has checked that they lie in the mappings, and the scales.
    pub(crate) fn fp8(
        values: (&Arc<Mapping>, usize),
        scales: (&Arc<Mapping>, usize),
        outputs: usize,
        inputs: usize,
    ) -> Self {
        Self { values: Values::Quantised(Box::new(Quantised::fp8(values, scales, outputs, inputs))), outputs, inputs }
    }

    /// Every `step`th row of MXFP4, from the first on, and the scales of all rows. `None` if a row is no whole number of blocks. The
    /// caller has checked that they lie in the mappings, and the scales.
    pub(crate) fn mxfp4(
        values: (&Arc<Mapping>, usize),
        scales: (&Arc<Mapping>, usize),
        step: usize,
        outputs: usize,
        inputs: usize,
    ) -> Option<Self> {
        let values = Values::Quantised(Box::new(Quantised::mxfp4(values, scales, step, outputs, inputs)?));
        Some(Self { values, outputs, inputs })
    }

    /// A copy of values that lie apart: output *o* and input *i* is value `of(o, i)` from byte `start` of the mapping on. The caller has
    /// checked that those are in the mapping. `None` if the dtype is not f32, f16 or bf16.
    pub(crate) fn gathered(
        map: &Arc<Mapping>,
        start: usize,
        dtype: StoredDtype,
        (outputs, inputs): (usize, usize),
        of: impl Fn(usize, usize) -> usize,
    ) -> Option<Self> {
        let (bytes, shape) = (&map[start..], (outputs, inputs));
        let values = match dtype {
            StoredDtype::F32 => Values::F32(Slab::Owned(gather(bytes, f32::from_le_bytes, shape, of))),
            StoredDtype::F16 => Values::F16(Slab::Owned(gather(bytes, f16::from_le_bytes, shape, of))),
            StoredDtype::Bf16 => Values::Bf16(Slab::Owned(gather(bytes, bf16::from_le_bytes, shape, of))),
            _ => return None,
        };
        Some(Self { values, outputs, inputs })
    }

    /// Rows: values of an output.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns: values of an input.
    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes as stored.
    pub(crate) fn bytes(&self) -> u64 {
        let values = self.outputs * self.inputs;
        (match &self.values {
            Values::F32(_) => values * 4,
            Values::F16(_) | Values::Bf16(_) => values * 2,
            Values::Quantised(quantised) => quantised.bytes(),
        }) as u64
    }

    /// The stored dtype.
    pub(crate) fn dtype(&self) -> StoredDtype {
        match &self.values {
            Values::F32(_) => StoredDtype::F32,
            Values::F16(_) => StoredDtype::F16,
            Values::Bf16(_) => StoredDtype::Bf16,
            Values::Quantised(quantised) => quantised.dtype(),
        }
    }

    /// The bits of one row of a matrix in f16 or bf16; `None` in others.
    #[cfg(any(cards, test))]
    pub(crate) fn half_row(&self, row: usize) -> Option<&[u16]> {
        use half::slice::HalfFloatSliceExt;
        let range = row * self.inputs..(row + 1) * self.inputs;
        match &self.values {
            Values::F32(_) | Values::Quantised(_) => None,
            Values::F16(slab) => Some(slab.values()[range].reinterpret_cast()),
            Values::Bf16(slab) => Some(slab.values()[range].reinterpret_cast()),
        }
    }

    /// The bytes of one row of a matrix in few bits, and of its scales where they lie by themselves; `None` in others.
    #[cfg(any(cards, test))]
    pub(crate) fn stored_row(&self, row: usize) -> Option<(&[u8], &[u8])> {
        match &self.values {
            Values::F32(_) | Values::F16(_) | Values::Bf16(_) => None,
            Values::Quantised(quantised) => Some(quantised.stored_row(row)),
        }
    }

    /// Copies one row, widened to f32; `to` is `[inputs]`.
    pub(crate) fn widen_row(&self, row: usize, to: &mut [f32]) {
        let range = row * self.inputs..(row + 1) * self.inputs;
        match &self.values {
            Values::F32(slab) => to.copy_from_slice(&slab.values()[range]),
            Values::F16(slab) => to.iter_mut().zip(&slab.values()[range]).for_each(|(to, v)| *to = v.to_f32()),
            Values::Bf16(slab) => to.iter_mut().zip(&slab.values()[range]).for_each(|(to, v)| *to = v.to_f32()),
            Values::Quantised(quantised) => quantised.widen_row(row, to),
        }
    }

    /// Refuses a matrix that has a value which is infinite or no number. Reads all of it.
    pub(crate) fn check_finite(&self, name: &str) -> Result<(), CheckpointError> {
        let mut row = vec![0.0; self.inputs];
        (0..self.outputs).try_for_each(|number| {
            self.widen_row(number, &mut row);
            finite(&row, number * self.inputs, || format!("tensor `{name}`"))
        })
    }

    /// Computes some columns of `y = x W^T` in this thread.
    ///
    /// # Safety
    /// The values of `x` are there, whose rows are as long as those of the matrix; `y` must be valid for `rows * outputs`, `columns` lie within
    /// `outputs`, and nobody else may touch those columns of `y` meanwhile.
    pub(crate) unsafe fn multiply(&self, x: &Inputs, y: *mut f32, columns: (usize, usize)) {
        unsafe { self.multiply_to(x, y, self.outputs, columns) };
    }

    /// [`Matrix::multiply`] where rows of `y` are `y_stride` apart. Column *c* of row *r* is at `y + r * y_stride + c`, so that `y` itself
    /// may lie outside of what is written.
    ///
    /// # Safety
    /// As there, for what is written of `y`.
    pub(crate) unsafe fn multiply_to(&self, x: &Inputs, y: *mut f32, y_stride: usize, columns: (usize, usize)) {
        debug_assert_eq!(x.inputs, self.inputs, "rows as long as those of the matrix");
        let (isa, shape) = (x.isa, kernel::Shape { rows: x.rows, inputs: self.inputs, outputs: y_stride, columns });
        unsafe {
            match &self.values {
                Values::F32(slab) => kernel::multiply(isa, x, slab.values().as_ptr(), y, shape),
                Values::F16(slab) => kernel::multiply(isa, x, slab.values().as_ptr(), y, shape),
                Values::Bf16(slab) => kernel::multiply(isa, x, slab.values().as_ptr(), y, shape),
                Values::Quantised(quantised) => quantised.multiply(x, y, shape),
            }
        }
    }

    /// Adds up `inputs` rows of the matrix from `first` on, each times a value of `x`, in this thread: `y = x W[first..]`.
    ///
    /// # Safety
    /// The rows are there; `x` and `y` must be valid for what `shape` says, and nobody else may touch `y` meanwhile.
    pub(crate) unsafe fn combine(&self, isa: Isa, first: usize, x: *const f32, y: *mut f32, shape: Combination) {
        debug_assert_eq!(shape.outputs, self.inputs, "rows as long as those of the matrix");
        let at = first * self.inputs;
        unsafe {
            match &self.values {
                Values::F32(slab) => combine::combine(isa, x, slab.values().as_ptr().add(at), y, shape),
                Values::F16(slab) => combine::combine(isa, x, slab.values().as_ptr().add(at), y, shape),
                Values::Bf16(slab) => combine::combine(isa, x, slab.values().as_ptr().add(at), y, shape),
                Values::Quantised(quantised) => quantised.combine(isa, first, x, y, shape),
            }
        }
    }
}

/// Rows and columns that [`gather`] copies at a time, so that what it reads of a transposed matrix stays in a cache.
const GATHERED: usize = 32;

/// Values of `SIZE` bytes: output *o* and input *i* is number `of(o, i)`.
fn gather<T: Copy + Default, const SIZE: usize>(
    bytes: &[u8],
    value: impl Fn([u8; SIZE]) -> T,
    (outputs, inputs): (usize, usize),
    of: impl Fn(usize, usize) -> usize,
) -> Vec<T> {
    let (all, _) = bytes.as_chunks::<SIZE>();
    let mut copy = vec![T::default(); outputs * inputs];
    for first in (0..outputs).step_by(GATHERED) {
        for begin in (0..inputs).step_by(GATHERED) {
            for output in first..outputs.min(first + GATHERED) {
                for input in begin..inputs.min(begin + GATHERED) {
                    copy[output * inputs + input] = value(all[of(output, input)]);
                }
            }
        }
    }
    copy
}

/// Ranges of columns are multiples of this, so that few columns are left over by tiles.
const TILE_COLUMNS: usize = 12;

/// Multiplications of a task at least: about 10 microseconds of one core.
const MIN_TASK: usize = 1 << 17;

/// Multiplications in all below which another thread is not worth waking: about 50 microseconds of one core.
const MIN_SHARED: usize = 1 << 19;

/// Splits `outputs` into ranges of columns such that a task has about [`MIN_TASK`] multiplications or more, and there
/// are not many more tasks than it takes to keep `threads` busy.
pub(crate) fn column_ranges(
    outputs: usize,
    work_per_column: usize,
    threads: usize,
) -> impl Iterator<Item = (usize, usize)> {
    let smallest = MIN_TASK.div_ceil(work_per_column.max(1));
    let step = outputs.div_ceil(threads * 4).max(smallest).next_multiple_of(TILE_COLUMNS);
    (0..outputs).step_by(step).map(move |first| (first, outputs.min(first + step)))
}

/// A pointer that tasks share; each writes to columns of its own.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut(pub(crate) *mut f32);

// SAFETY: whoever sends it promises that tasks write to disjoint places.
unsafe impl Send for SharedMut {}
// SAFETY: as above.
unsafe impl Sync for SharedMut {}

impl SharedMut {
    /// A method, so that closures capture the whole value and not the bare pointer.
    pub(crate) fn pointer(self) -> *mut f32 {
        self.0
    }
}

/// `y = x W^T` for several matrices of the same input, as one piece of work. `x` is `[rows, inputs]`; each result is
/// `[rows, outputs]`. The same row gives the same bits alone and in any batch, on any number of threads.
pub(crate) fn linears<const N: usize>(x: &[f32], matrices: [&Matrix; N], pool: &ThreadPool) -> [Vec<f32>; N] {
    let inputs = matrices[0].inputs();
    let rows = x.len() / inputs;
    assert!(x.len() == rows * inputs && matrices.iter().all(|m| m.inputs() == inputs), "rows of {inputs} values");
    let isa = Isa::detect();
    let threads = pool.current_num_threads();
    let mut results = matrices.map(|matrix| vec![0.0; rows * matrix.outputs()]);
    let mut tasks = Vec::new();
    let mut work = 0;
    for (matrix, y) in matrices.into_iter().zip(&mut results) {
        work += rows * inputs * matrix.outputs();
        let y = SharedMut(y.as_mut_ptr());
        tasks.extend(column_ranges(matrix.outputs(), rows * inputs, threads).map(|columns| (matrix, y, columns)));
    }
    let x = Inputs::new(isa, x.as_ptr(), rows, inputs);
    // SAFETY: the lengths asserted and allocated above, and ranges that do not overlap.
    run_tasks(tasks.len(), work, pool, |number| unsafe {
        let (matrix, y, columns) = tasks[number];
        matrix.multiply(&x, y.pointer(), columns);
    });
    results
}

/// `y = x W^T`; see [`linears`].
pub(crate) fn linear(x: &[f32], matrix: &Matrix, pool: &ThreadPool) -> Vec<f32> {
    let [y] = linears(x, [matrix], pool);
    y
}

/// Runs tasks of so many multiplications in all, by number and in ascending order, over the pool, or in this thread where a
/// second one would not help.
pub(crate) fn run_tasks(count: usize, work: usize, pool: &ThreadPool, task: impl Fn(usize) + Sync) {
    if count > 1 && work >= MIN_SHARED {
        share(count, pool, &task);
    } else {
        (0..count).for_each(task);
    }
}
