//! What a tensor of the new folder is made of, and the writing of it: a bounded number of values at a time.

use std::io::Write;

use half::{bf16, f16};
use safetensors::Dtype;

use super::error::GgufError;
use super::file::Entry;
use crate::checkpoint::StoredDtype;
use crate::folder::Filling;
use crate::linear::GROUP;

type Written = Result<(), Filling<GgufError>>;

/// Values that are widened at a time.
const STEP: usize = 1 << 20;

/// A tensor of the new folder.
pub(super) struct Source<'g> {
    /// For errors.
    pub(super) name: String,
    /// What it consists of, one after another.
    pub(super) pieces: Vec<Piece<'g>>,
    pub(super) form: Form,
}

/// Some rows of tensors of the file.
pub(super) struct Piece<'g> {
    /// Tensors whose rows take turns.
    pub(super) turns: Vec<&'g Entry<'g>>,
    /// The first row of each.
    pub(super) first: usize,
    /// Rows of each.
    pub(super) rows: usize,
    /// Values of a row.
    pub(super) columns: usize,
    pub(super) order: Order,
}

/// How the rows of a piece are put.
#[derive(Debug, Clone, Copy)]
pub(super) enum Order {
    AsIs,
    /// Rows of a head that rotate against each other lie beside each other in the file, and come apart.
    Neighbours {
        head_dim: usize,
    },
    /// Columns become rows.
    Transposed,
}

/// What is written of them.
#[derive(Debug, Clone, Copy)]
pub(super) enum Form {
    /// Their values.
    Values(Dtype),
    /// Their blocks.
    Kept(StoredDtype),
    /// The values of MXFP4, as model folders have them: two to a byte, those side by side.
    MicroscaledValues,
    /// The scales of MXFP4.
    MicroscaledScales,
}

impl Piece<'_> {
    /// Bytes of a row of one of the tensors.
    fn row_bytes(&self, entry: &Entry<'_>) -> usize {
        self.columns / entry.kind.values * entry.kind.bytes
    }

    /// Passes on whole rows, as the file has them.
    fn stored(&self, each: &mut dyn FnMut(&Entry<'_>, &[u8]) -> Written) -> Written {
        let Some(&entry) = self.turns.first() else { return Ok(()) };
        let (rows, step) = (self.rows * self.turns.len(), (STEP / self.columns).max(1));
        let mut gathered = Vec::with_capacity(step.min(rows) * self.row_bytes(entry));
        for start in (0..rows).step_by(step) {
            gathered.clear();
            for number in start..(start + step).min(rows) {
                let entry = self.turns[number % self.turns.len()];
                let (row, bytes) = (number / self.turns.len(), self.row_bytes(entry));
                let row = match self.order {
                    Order::Neighbours { head_dim } => beside(row, head_dim),
                    Order::AsIs | Order::Transposed => row,
                };
                let row = self.first + row;
                gathered.extend_from_slice(&entry.data[row * bytes..(row + 1) * bytes]);
            }
            each(entry, &gathered)?;
        }
        Ok(())
    }

    /// Passes on the values of columns, one after another: of each those of the first rows, then of the second ones, and so on.
    fn transposed(&self, each: &mut dyn FnMut(&[f32]) -> Written) -> Written {
        let turns = self.turns.len();
        let all = self.rows * turns;
        let block = self.turns.iter().map(|entry| entry.kind.values).max().unwrap_or(1);
        let fit = (STEP / all.max(1)).max(1);
        let width = if fit < block { fit } else { fit - fit % block };
        for first in (0..self.columns).step_by(width) {
            let width = width.min(self.columns - first);
            let mut strip = vec![0.0; width * all];
            for (turn, entry) in self.turns.iter().enumerate() {
                let (values, bytes) = (entry.kind.values, entry.kind.bytes);
                // Whole blocks that hold it.
                let blocks = first / values..(first + width).div_ceil(values);
                let (skipped, cover) = (first - blocks.start * values, blocks.len() * values);
                let step = (STEP / cover).max(1);
                for start in (0..self.rows).step_by(step) {
                    let rows = start..(start + step).min(self.rows);
                    let mut gathered = Vec::with_capacity(rows.len() * blocks.len() * bytes);
                    for row in rows.clone() {
                        let at = (self.first + row) * self.row_bytes(entry);
                        gathered.extend_from_slice(&entry.data[at + blocks.start * bytes..at + blocks.end * bytes]);
                    }
                    let widened = entry.kind.widen(&gathered).map_err(Filling::Other)?;
                    for (row, values) in rows.zip(widened.chunks_exact(cover)) {
                        for (column, value) in values[skipped..skipped + width].iter().enumerate() {
                            strip[column * all + row * turns + turn] = *value;
                        }
                    }
                }
            }
            each(&strip)?;
        }
        Ok(())
    }
}

impl Source<'_> {
    /// Bytes of the file that it is made of.
    pub(super) fn bytes(&self) -> u64 {
        let of = |piece: &Piece<'_>| {
            let rows = piece.turns.iter().map(|entry| piece.row_bytes(entry) * piece.rows).sum::<usize>();
            let groups = piece.columns / GROUP * piece.rows * piece.turns.len();
            match self.form {
                Form::Values(_) | Form::Kept(_) => rows,
                Form::MicroscaledValues => rows - groups,
                Form::MicroscaledScales => groups,
            }
        };
        self.pieces.iter().map(of).sum::<usize>() as u64
    }

    /// It is written as MXFP4.
    pub(super) fn is_microscaled(&self) -> bool {
        matches!(self.form, Form::MicroscaledValues)
    }

    /// Writes it.
    pub(super) fn write(&self, out: &mut dyn Write) -> Written {
        let mut written = Vec::new();
        for piece in &self.pieces {
            match (self.form, piece.order) {
                (Form::Values(dtype), Order::Transposed) => {
                    piece.transposed(&mut |values| self.put_all(values, dtype, &mut written, out))?;
                }
                (Form::Values(dtype), _) => piece.stored(&mut |entry, bytes| {
                    let values = entry.kind.widen(bytes).map_err(Filling::Other)?;
                    self.put_all(&values, dtype, &mut written, out)
                })?,
                (Form::Kept(kept), _) => piece.stored(&mut |_, bytes| {
                    self.check(kept, bytes)?;
                    Ok(out.write_all(bytes)?)
                })?,
                (Form::MicroscaledValues, _) => piece.stored(&mut |entry, bytes| {
                    written.clear();
                    bytes.chunks_exact(entry.kind.bytes).for_each(|block| written.extend(side_by_side(&block[1..])));
                    Ok(out.write_all(&written)?)
                })?,
                (Form::MicroscaledScales, _) => piece.stored(&mut |entry, bytes| {
                    written.clear();
                    written.extend(bytes.iter().step_by(entry.kind.bytes));
                    self.check(StoredDtype::F8E8m0, &written)?;
                    Ok(out.write_all(&written)?)
                })?,
            }
        }
        Ok(())
    }

    /// Writes values; `written` is for use in between.
    fn put_all(&self, values: &[f32], dtype: Dtype, written: &mut Vec<u8>, out: &mut dyn Write) -> Written {
        written.clear();
        for value in values {
            let finite = match dtype {
                Dtype::F32 => put(written, *value, value.to_le_bytes()),
                Dtype::F16 => put(written, f16::from_f32(*value).to_f32(), f16::from_f32(*value).to_le_bytes()),
                _ => put(written, bf16::from_f32(*value).to_f32(), bf16::from_f32(*value).to_le_bytes()),
            };
            if !finite {
                return Err(Filling::Other(self.not_finite(*value)));
            }
        }
        Ok(out.write_all(written)?)
    }

    /// Refuses blocks whose values are not finite.
    fn check(&self, stored: StoredDtype, bytes: &[u8]) -> Written {
        match stored.not_finite(bytes) {
            Some((_, value)) => Err(Filling::Other(self.not_finite(value))),
            None => Ok(()),
        }
    }

    fn not_finite(&self, value: f32) -> GgufError {
        let reason = if value.is_finite() {
            format!("it holds {value}, which the chosen dtype cannot: f32 can")
        } else {
            format!("it holds {value}: the file is damaged")
        };
        GgufError::Tensor { tensor: self.name.clone(), reason }
    }
}

/// Appends a value's bytes and says whether it is finite.
fn put<const N: usize>(out: &mut Vec<u8>, rounded: f32, bytes: [u8; N]) -> bool {
    out.extend_from_slice(&bytes);
    rounded.is_finite()
}

/// Where a row of queries or keys lies in files in which rows that rotate against each other are neighbours: in a model folder a
/// head's first half rotates against its second.
fn beside(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + within % half * 2 + within / half
}

/// The values of a block of MXFP4: GGUF files have the first half in the lower four bits and the rest in the upper ones, model folders two
/// that follow each other in each byte, the lower first.
fn side_by_side(values: &[u8]) -> impl Iterator<Item = u8> + use<'_> {
    let lower = values.iter().map(|byte| byte & 15);
    let mut all = lower.chain(values.iter().map(|byte| byte >> 4));
    std::iter::from_fn(move || Some(all.next()? | (all.next()? << 4)))
}

#[cfg(test)]
mod tests {
    use super::super::blocks::BlockType;
    use super::*;

    #[test]
    fn rows_that_rotate_against_each_other_come_apart() {
        // Two heads of four rows: the file has a0 b0 a1 b1, the folder a0 a1 b0 b1.
        let order: Vec<usize> = (0..8).map(|row| beside(row, 4)).collect();
        assert_eq!(order, [0, 2, 1, 3, 4, 6, 5, 7]);
    }

    /// More rows than there may be values of a block of columns at a time, in blocks that strips begin in the middle of.
    #[test]
    fn columns_become_rows_however_many_there_are() {
        let (rows, columns) = (STEP / 32 + 7000, 64);
        let kind = BlockType::of(8).unwrap();
        let data: Vec<u8> = (0..rows * columns / 32)
            .flat_map(|block| [&[0, 0x20][..], &[0; 32].map(|_: u8| (block % 251) as u8)].concat())
            .collect();
        let entry = Entry { kind, shape: vec![rows, columns], data: &data };
        let (expected, mut found) = (kind.widen(&data).unwrap(), Vec::new());
        let piece = Piece { turns: vec![&entry; 2], first: 0, rows, columns, order: Order::Transposed };
        let mut strips = 0;
        piece
            .transposed(&mut |values| {
                assert!(values.len() <= STEP);
                strips += 1;
                found.extend_from_slice(values);
                Ok(())
            })
            .unwrap();
        assert_eq!(strips, 5);
        assert_eq!(found.len(), 2 * rows * columns);
        for (number, both) in found.chunks_exact(2).enumerate() {
            let (column, row) = (number / rows, number % rows);
            assert_eq!(both, [expected[row * columns + column]; 2]);
        }
    }

    #[test]
    fn values_of_a_block_come_side_by_side() {
        // Values 0 to 7: the file has 40 51 62 73.
        assert_eq!(side_by_side(&[0x40, 0x51, 0x62, 0x73]).collect::<Vec<_>>(), [0x10, 0x32, 0x54, 0x76]);
    }
}
