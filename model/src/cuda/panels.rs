//! How weights lie in a card's memory: so that each thread reads sixteen bytes beside its neighbour's. Values keep their dtype.
//!
//! A matrix `[columns, width]` (a column is an output) is cut into panels of sixteen columns, two halves of eight. A panel holds its
//! columns by octets of 128 values: for each of the eight columns of a half the values of 32 threads, sixteen for either half. Thread *t*
//! of a half has value *16 c + t* of each chunk *c* of the octet. Widths are padded to whole octets with zeros that are never read.

use crate::checkpoint::{StoredDtype, Swiglu};
use crate::linear::Matrix;

/// Values that the sixteen threads of a half warp take at a time.
pub(super) const CHUNK: usize = 16;
/// Chunks whose weights a thread reads at a time.
const OCTET: usize = 8;
/// Columns of a half of a panel.
const HALF: usize = 8;
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
    pub(super) up_dtype: StoredDtype,
    pub(super) down_dtype: StoredDtype,
}

impl Layout {
    /// How `swiglu` lies. A gate_proj and an up_proj of different dtypes are widened to f32, which changes no value, and so is what is
    /// quantised.
    pub(super) fn of(swiglu: &Swiglu) -> Self {
        let Swiglu { gate_proj, up_proj, down_proj, .. } = swiglu;
        let plain = |matrix: &Matrix| if matrix.dtype().is_quantised() { StoredDtype::F32 } else { matrix.dtype() };
        let same = gate_proj.dtype() == up_proj.dtype();
        Self {
            hidden_size: gate_proj.inputs(),
            inner_size: gate_proj.outputs().next_multiple_of(CHUNK),
            inner_unpadded: gate_proj.outputs(),
            up_dtype: if same { plain(gate_proj) } else { StoredDtype::F32 },
            down_dtype: plain(down_proj),
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
        (
            panel_values(self.hidden_size) * self.up_dtype.block().1,
            panel_values(self.inner_size) * self.down_dtype.block().1,
        )
    }

    /// Where down begins.
    pub(super) fn down_at(&self) -> usize {
        self.panels().0 * self.panel_bytes().0
    }

    /// Bytes in all.
    pub(super) fn bytes(&self) -> usize {
        self.down_at() + self.panels().1 * self.panel_bytes().1
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

    /// Ranges of bytes of at most `most` each, of whole panels, in order: what to hand over one after the other.
    /// A single panel that is larger is a piece of its own.
    pub(super) fn pieces(&self, most: usize) -> Vec<Piece> {
        let ((up, down), (up_bytes, down_bytes)) = (self.panels(), self.panel_bytes());
        let mut pieces: Vec<Piece> = Vec::new();
        let mut at = 0;
        for panel in 0..up + down {
            let bytes = if panel < up { up_bytes } else { down_bytes };
            match pieces.last_mut().filter(|piece| piece.bytes + bytes <= most) {
                Some(piece) => {
                    piece.bytes += bytes;
                    piece.panels.end = panel + 1;
                }
                None => pieces.push(Piece { at, bytes, panels: panel..panel + 1 }),
            }
            at += bytes;
        }
        pieces
    }

    /// Writes a piece of `swiglu` to `to`, which is as long as it.
    pub(super) fn write(&self, swiglu: &Swiglu, piece: &Piece, to: &mut [u8]) {
        let ((up, _), (up_bytes, down_bytes)) = (self.panels(), self.panel_bytes());
        let mut rest = to;
        for panel in piece.panels.clone() {
            let (bytes, dtype) = if panel < up { (up_bytes, self.up_dtype) } else { (down_bytes, self.down_dtype) };
            let (panel_bytes, others) = rest.split_at_mut(bytes);
            rest = others;
            panel_bytes.fill(0);
            for (number, column) in self.columns(panel).into_iter().enumerate() {
                let Some((source, row)) = column else { continue };
                let matrix = match source {
                    Source::Gate => &swiglu.gate_proj,
                    Source::Up => &swiglu.up_proj,
                    Source::Down => &swiglu.down_proj,
                };
                write_column(matrix, row, dtype, number, panel_bytes);
            }
        }
    }
}

/// A part of an expert's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it begins.
    pub(super) at: usize,
    pub(super) bytes: usize,
    pub(super) panels: std::ops::Range<usize>,
}

/// Values of a panel of columns of `width` values.
pub(super) fn panel_values(width: usize) -> usize {
    width.div_ceil(CHUNK * OCTET) * CHUNK * OCTET * PANEL
}

pub(super) fn write_column(matrix: &Matrix, row: usize, dtype: StoredDtype, column: usize, panel: &mut [u8]) {
    match matrix.half_row(row).filter(|_| dtype != StoredDtype::F32) {
        Some(values) => scatter::<2>(values.iter().map(|value| value.to_le_bytes()), column, panel),
        None => {
            let mut values = vec![0.0; matrix.inputs()];
            matrix.widen_row(row, &mut values);
            scatter::<4>(values.iter().map(|value| value.to_le_bytes()), column, panel);
        }
    }
}

/// Puts the values of a column, of `SIZE` bytes each, into a panel.
fn scatter<const SIZE: usize>(values: impl Iterator<Item = [u8; SIZE]>, column: usize, panel: &mut [u8]) {
    // Values of a thread that lie side by side, and how many such vectors it reads of an octet.
    let (vector, vectors) = (16 / SIZE, OCTET * SIZE / 16);
    let (half, place) = (column / HALF, column % HALF);
    for (number, value) in values.enumerate() {
        let (chunk, lane) = (number / CHUNK, number % CHUNK);
        let (octet, chunk) = (chunk / OCTET, chunk % OCTET);
        let row = (octet * HALF + place) * vectors + chunk / vector;
        let at = ((row * 2 * CHUNK + half * CHUNK + lane) * vector + chunk % vector) * SIZE;
        if let Some(to) = panel.get_mut(at..at + SIZE) {
            to.copy_from_slice(&value);
        }
    }
}
