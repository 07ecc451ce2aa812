//! How weights lie in a card's memory: so that each thread reads sixteen bytes beside its neighbour's. Values keep their dtype.
//!
//! A matrix `[columns, width]` (a column is an output) is cut into panels of sixteen columns, two halves of eight. A panel holds its
//! columns by octets of 128 values: for each of the eight columns of a half the values of 32 threads, sixteen for either half. Thread *t*
//! of a half has value *16 c + t* of each chunk *c* of the octet. Values of eight or four bits of two or four columns lie together in a
//! thread's sixteen bytes. Scales follow behind the values of all octets of a panel, in the order in which they are used; a half reads them
//! all together. Widths are padded to whole octets with zeros that are never read.
//!
//! An expert is its panels of gate and up, those of down, and its biases if it has any, in f32.

use super::columns;
use super::dtype::Dtype;
use crate::checkpoint::{Biases, Swiglu};

/// Values that the sixteen threads of a half warp take at a time.
pub(super) const CHUNK: usize = 16;
/// Chunks whose weights a thread reads at a time.
pub(super) const CHUNKS: usize = 8;
/// Values of so many chunks.
pub(super) const OCTET: usize = CHUNKS * CHUNK;
/// Columns of a half of a panel.
pub(super) const HALF: usize = 8;
/// Columns of a panel.
pub(super) const PANEL: usize = 2 * HALF;
/// Columns of gate_proj, and as many of up_proj, in a panel that has both.
pub(super) const GATES: usize = PANEL / 2;

/// A column of a panel: which row of which matrix; `None` where there is none, which counts as zeros.
type Columns = [Option<(Source, usize)>; PANEL];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Gate,
    Up,
    Down,
}

/// One expert as a card holds it: which values lie where in its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) hidden_size: usize,
    /// Outputs of gate_proj, padded to whole chunks.
    pub(super) inner_size: usize,
    inner_unpadded: usize,
    /// Of gate_proj and up_proj.
    pub(super) up_dtype: Dtype,
    pub(super) down_dtype: Dtype,
    has_biases: bool,
}

impl Layout {
    /// How `swiglu` lies. A gate_proj and an up_proj of different dtypes are widened to f32, which changes no value.
    pub(super) fn of(swiglu: &Swiglu) -> Self {
        let Swiglu { gate_proj, up_proj, down_proj, biases, .. } = swiglu;
        let same = gate_proj.dtype() == up_proj.dtype();
        Self {
            hidden_size: gate_proj.inputs(),
            inner_size: gate_proj.outputs().next_multiple_of(CHUNK),
            inner_unpadded: gate_proj.outputs(),
            up_dtype: if same { gate_proj.dtype().into() } else { Dtype::F32 },
            down_dtype: down_proj.dtype().into(),
            has_biases: biases.is_some(),
        }
    }

    /// Width of a row of hidden states, padded to whole chunks.
    pub(super) fn x_size(&self) -> usize {
        self.hidden_size.next_multiple_of(CHUNK)
    }

    /// Panels of gate and up, then panels of down.
    fn panels(&self) -> (usize, usize) {
        (self.inner_size / GATES, self.hidden_size.div_ceil(PANEL))
    }

    /// Bytes of one panel of gate and up, and of one of down.
    fn panel_bytes(&self) -> (usize, usize) {
        (panel_bytes(self.hidden_size, self.up_dtype), panel_bytes(self.inner_size, self.down_dtype))
    }

    /// Where down begins.
    pub(super) fn down_at(&self) -> usize {
        self.panels().0 * self.panel_bytes().0
    }

    /// Where the panels end, and the biases begin: of gate_proj and of up_proj, as many as there are outputs with their padding, and of
    /// down_proj.
    fn panels_end(&self) -> usize {
        self.down_at() + self.panels().1 * self.panel_bytes().1
    }

    /// Where the biases begin, if there are any.
    pub(super) fn biases_at(&self) -> Option<usize> {
        self.has_biases.then(|| self.panels_end())
    }

    fn bias_bytes(&self) -> usize {
        if self.has_biases { (2 * self.inner_size + self.hidden_size) * size_of::<f32>() } else { 0 }
    }

    /// Bytes in all.
    pub(super) fn bytes(&self) -> usize {
        self.panels_end() + self.bias_bytes()
    }

    /// The columns of a panel, counted over gate and up and then down.
    fn columns(&self, panel: usize) -> Columns {
        let first_down = self.panels().0;
        std::array::from_fn(|column| {
            let (half, place) = (column / HALF, column % HALF);
            if panel >= first_down {
                let number = (panel - first_down) * PANEL + column;
                return (number < self.hidden_size).then_some((Source::Down, number));
            }
            let (source, place) = if place < HALF / 2 { (Source::Gate, place) } else { (Source::Up, place - HALF / 2) };
            let number = panel * GATES + half * (HALF / 2) + place;
            (number < self.inner_unpadded).then_some((source, number))
        })
    }

    /// Bytes of a panel, counted over gate and up and then down; behind the last one are the biases.
    fn part_bytes(&self, part: usize) -> usize {
        let ((up, down), (up_bytes, down_bytes)) = (self.panels(), self.panel_bytes());
        match part {
            _ if part < up => up_bytes,
            _ if part < up + down => down_bytes,
            _ => self.bias_bytes(),
        }
    }

    /// Ranges of bytes of at most `most` each, of whole panels, in order: what to hand over one after the other.
    /// A single panel that is larger is a piece of its own, and so may the biases be.
    pub(super) fn pieces(&self, most: usize) -> Vec<Piece> {
        let (up, down) = self.panels();
        let mut pieces: Vec<Piece> = Vec::new();
        let mut at = 0;
        for part in 0..up + down + usize::from(self.has_biases) {
            let bytes = self.part_bytes(part);
            match pieces.last_mut().filter(|piece| piece.bytes + bytes <= most) {
                Some(piece) => {
                    piece.bytes += bytes;
                    piece.parts.end = part + 1;
                }
                None => pieces.push(Piece { at, bytes, parts: part..part + 1 }),
            }
            at += bytes;
        }
        pieces
    }

    /// Writes a piece of `swiglu` to `to`, which is as long as it.
    pub(super) fn write(&self, swiglu: &Swiglu, piece: &Piece, to: &mut [u8]) {
        let (up, down) = self.panels();
        let mut rest = to;
        for part in piece.parts.clone() {
            let (bytes, others) = rest.split_at_mut(self.part_bytes(part));
            rest = others;
            bytes.fill(0);
            if part == up + down {
                self.write_biases(swiglu.biases.as_ref(), bytes);
                continue;
            }
            let (width, dtype) =
                if part < up { (self.hidden_size, self.up_dtype) } else { (self.inner_size, self.down_dtype) };
            for (number, column) in self.columns(part).into_iter().enumerate() {
                let Some((source, row)) = column else { continue };
                let matrix = match source {
                    Source::Gate => &swiglu.gate_proj,
                    Source::Up => &swiglu.up_proj,
                    Source::Down => &swiglu.down_proj,
                };
                columns::write(matrix, row, dtype, number, width.div_ceil(OCTET), bytes);
            }
        }
    }

    fn write_biases(&self, biases: Option<&Biases>, to: &mut [u8]) {
        let Some(Biases { gate_proj, up_proj, down_proj, .. }) = biases else { return };
        for (first, values) in [(0, gate_proj), (self.inner_size, up_proj), (2 * self.inner_size, down_proj)] {
            let to = to.as_chunks_mut().0.iter_mut().skip(first);
            to.zip(values).for_each(|(to, value)| *to = value.to_le_bytes());
        }
    }
}

/// A part of an expert's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it begins.
    pub(super) at: usize,
    pub(super) bytes: usize,
    pub(super) parts: std::ops::Range<usize>,
}

/// Bytes of a panel of columns of `width` values. Scales take whole lines of 128 bytes.
pub(super) fn panel_bytes(width: usize, dtype: Dtype) -> usize {
    let octets = width.div_ceil(OCTET);
    octets * dtype.value_bytes() + (octets * dtype.scale_bytes()).next_multiple_of(128)
}
