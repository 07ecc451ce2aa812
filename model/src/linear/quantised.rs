//! Matrices whose weights are in few bits: where they lie, and which kernel reads them.

use std::sync::Arc;

use super::combine::{Combination, combine};
use super::formats::{FP8_TILE, Fp8, Mxfp4, Q4K, Q8_0};
use super::inputs::Inputs;
use super::kernel::Shape;
use super::packed::{GROUP, Row, Rows, multiply, widen};
use crate::checkpoint::{Mapping, StoredDtype};
use crate::lanes::Isa;

/// Some bytes of a mapping.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    map: Arc<Mapping>,
    start: usize,
}

impl Place {
    /// `len` bytes from byte `start` on. Panics if they do not lie in the mapping.
    fn new(map: &Arc<Mapping>, start: usize, len: usize) -> Self {
        assert!(map.get(start..start + len).is_some(), "{len} bytes from {start} on are in the mapping");
        Self { map: Arc::clone(map), start }
    }

    /// `len` bytes from its byte `at` on.
    #[cfg(any(cards, test))]
    fn bytes(&self, at: usize, len: usize) -> &[u8] {
        &self.map[self.start + at..][..len]
    }

    fn pointer(&self) -> *const u8 {
        self.map.as_ptr().wrapping_add(self.start)
    }
}

/// A matrix in one of the formats of [`super::formats`].
pub(super) struct Quantised {
    dtype: StoredDtype,
    values: Place,
    /// Those that lie by themselves.
    scales: Option<Place>,
    outputs: usize,
    inputs: usize,
    /// See [`Rows`].
    stride: usize,
    scale_stride: usize,
    rows_per_scale: usize,
}

impl Quantised {
    /// Rows of blocks, one after another. `None` for another dtype, and if a row is no whole number of blocks.
    pub(super) fn blocks(
        (map, start): (&Arc<Mapping>, usize),
        dtype: StoredDtype,
        outputs: usize,
        inputs: usize,
    ) -> Option<Self> {
        if !matches!(dtype, StoredDtype::Q8_0 | StoredDtype::Q4K) {
            return None;
        }
        let stride = dtype.bytes(inputs)?;
        let values = Place::new(map, start, outputs * stride);
        Some(Self { dtype, values, scales: None, outputs, inputs, stride, scale_stride: 0, rows_per_scale: 1 })
    }

    /// Floats of eight bits, and their scales, f32 `[outputs / 128, inputs / 128]`, both rounded up.
    pub(super) fn fp8(
        (map, start): (&Arc<Mapping>, usize),
        scales: (&Arc<Mapping>, usize),
        outputs: usize,
        inputs: usize,
    ) -> Self {
        let scale_stride = inputs.div_ceil(FP8_TILE) * size_of::<f32>();
        Self {
            dtype: StoredDtype::F8E4m3,
            values: Place::new(map, start, outputs * inputs),
            scales: Some(Place::new(scales.0, scales.1, outputs.div_ceil(FP8_TILE) * scale_stride)),
            outputs,
            inputs,
            stride: inputs,
            scale_stride,
            rows_per_scale: FP8_TILE,
        }
    }

    /// Every `step`th row of floats of four bits, from the first on, and their scales, a byte for each 32. `None` if a row is no whole
    /// number of blocks.
    pub(super) fn mxfp4(
        (map, start): (&Arc<Mapping>, usize),
        scales: (&Arc<Mapping>, usize),
        step: usize,
        outputs: usize,
        inputs: usize,
    ) -> Option<Self> {
        let blocks = (inputs / GROUP).max(1);
        if !inputs.is_multiple_of(GROUP) || outputs == 0 {
            return None;
        }
        let (row, rows) = (blocks * Mxfp4::BYTES, (outputs - 1) * step + 1);
        Some(Self {
            dtype: StoredDtype::F4E2m1,
            values: Place::new(map, start, rows * row),
            scales: Some(Place::new(scales.0, scales.1, rows * blocks)),
            outputs,
            inputs,
            stride: step * row,
            scale_stride: step * blocks,
            rows_per_scale: 1,
        })
    }

    pub(super) fn dtype(&self) -> StoredDtype {
        self.dtype
    }

    /// Bytes as stored, scales included.
    pub(super) fn bytes(&self) -> usize {
        let values = self.outputs * self.inputs;
        let scales = match self.dtype {
            StoredDtype::F8E4m3 => self.outputs.div_ceil(FP8_TILE) * self.scale_stride,
            StoredDtype::F4E2m1 => values / GROUP,
            _ => 0,
        };
        self.dtype.bytes(values).unwrap_or(0) + scales
    }

    fn rows(&self) -> Rows {
        let values = self.values.pointer();
        let first = Row { values, scales: self.scales.as_ref().map_or(values, Place::pointer) };
        let Self { stride, scale_stride, rows_per_scale, .. } = *self;
        Rows { first, stride, scale_stride, rows_per_scale }
    }

    /// # Safety
    /// As for [`multiply`].
    pub(super) unsafe fn multiply(&self, x: &Inputs, y: *mut f32, shape: Shape) {
        let (isa, rows) = (x.isa, self.rows());
        unsafe {
            match self.dtype {
                StoredDtype::Q8_0 => multiply::<Q8_0>(isa, x, rows, y, shape),
                StoredDtype::Q4K => multiply::<Q4K>(isa, x, rows, y, shape),
                StoredDtype::F8E4m3 => multiply::<Fp8>(isa, x, rows, y, shape),
                _ => multiply::<Mxfp4>(isa, x, rows, y, shape),
            }
        }
    }

    /// See [`super::Matrix::stored_row`].
    #[cfg(any(cards, test))]
    pub(super) fn stored_row(&self, row: usize) -> (&[u8], &[u8]) {
        assert!(row < self.outputs, "a row of the matrix");
        let scale_bytes = match self.dtype {
            StoredDtype::F8E4m3 => self.inputs.div_ceil(FP8_TILE) * size_of::<f32>(),
            StoredDtype::F4E2m1 => self.inputs / GROUP,
            _ => 0,
        };
        let values = self.values.bytes(row * self.stride, self.dtype.bytes(self.inputs).unwrap_or(0));
        let scales = self
            .scales
            .as_ref()
            .map_or(&[][..], |scales| scales.bytes(row / self.rows_per_scale * self.scale_stride, scale_bytes));
        (values, scales)
    }

    /// Copies one row, widened to f32; `to` is `[inputs]`.
    pub(super) fn widen_row(&self, row: usize, to: &mut [f32]) {
        assert!(row < self.outputs && to.len() == self.inputs, "a row of {} values", self.inputs);
        let (isa, from, to) = (Isa::detect(), self.rows().row(row), to.as_mut_ptr());
        // SAFETY: the row is one of those that the constructors found in the mapping, and `to` is as long.
        unsafe {
            match self.dtype {
                StoredDtype::Q8_0 => widen::<Q8_0>(isa, from, self.inputs, to),
                StoredDtype::Q4K => widen::<Q4K>(isa, from, self.inputs, to),
                StoredDtype::F8E4m3 => widen::<Fp8>(isa, from, self.inputs, to),
                _ => widen::<Mxfp4>(isa, from, self.inputs, to),
            }
        }
    }

    /// See [`super::Matrix::combine`]: of rows that are widened first.
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn combine(&self, isa: Isa, first: usize, x: *const f32, y: *mut f32, shape: Combination) {
        let mut wide = vec![0.0; shape.inputs * self.inputs];
        for (row, to) in wide.chunks_exact_mut(self.inputs).enumerate() {
            self.widen_row(first + row, to);
        }
        unsafe { combine(isa, x, wide.as_ptr(), y, shape) };
    }
}

#[cfg(test)]
mod tests;
