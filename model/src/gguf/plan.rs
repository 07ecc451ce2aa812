//! Which tensors a model has, and what of the file each is made of.

use std::collections::BTreeSet;

use safetensors::Dtype;
use serde_json::Value;

use super::architectures::Model;
use super::blocks::Storage;
use super::error::GgufError;
use super::file::{Entry, Gguf};
use super::names::{self, Place};
use super::source::{Form, Order, Piece, Source};
use crate::checkpoint::tensor_shapes;
use crate::folder::NewTensor;
use crate::linear::GROUP;

/// What is to be written.
pub(super) struct Plan<'g> {
    pub(super) tensors: Vec<NewTensor>,
    /// What each of them is made of.
    pub(super) sources: Vec<Source<'g>>,
    /// Tensors of layers that predict further tokens, which the model does without.
    pub(super) left_out: usize,
}

/// Makes the plan: values that are stored in blocks become `to`; if that is `None`, those that the model can be computed with in their
/// blocks stay so, and others become f16. All tensors of the file must have a place.
pub(super) fn plan<'g>(gguf: &'g Gguf<'g>, model: &Model, to: Option<Dtype>) -> Result<Plan<'g>, GgufError> {
    let mut planner = Planner { gguf, model, to, used: BTreeSet::new(), tensors: Vec::new(), sources: Vec::new() };
    for (name, shape) in tensor_shapes(&Value::from(model.config.clone()).to_string())? {
        planner.add(name, shape)?;
    }
    let mut left_out = 0;
    for name in gguf.tensors.keys().filter(|name| !planner.used.contains(*name) && !names::is_derived(name)) {
        if names::layer(name).is_none_or(|layer| !model.further.contains(&layer)) {
            return Err(GgufError::UnknownTensor { tensor: (*name).to_owned() });
        }
        left_out += 1;
    }
    Ok(Plan { tensors: planner.tensors, sources: planner.sources, left_out })
}

struct Planner<'g, 'm> {
    gguf: &'g Gguf<'g>,
    model: &'m Model,
    to: Option<Dtype>,
    /// Names of tensors that have a place.
    used: BTreeSet<&'g str>,
    tensors: Vec<NewTensor>,
    sources: Vec<Source<'g>>,
}

impl<'g> Planner<'g, '_> {
    /// A tensor of the file, which thereby has a place.
    fn take(&mut self, tensor: &str) -> Result<&'g Entry<'g>, GgufError> {
        let found = self.gguf.tensors.get_key_value(tensor);
        let (stored, entry) = found.ok_or_else(|| GgufError::MissingTensor { tensor: tensor.to_owned() })?;
        self.used.insert(stored);
        Ok(entry)
    }

    fn has(&self, tensor: &str) -> bool {
        self.gguf.tensors.contains_key(tensor)
    }

    /// A size that the config has.
    fn size(&self, key: &str) -> usize {
        self.model.config.get(key).and_then(Value::as_u64).map_or(0, |size| size as usize)
    }

    /// Adds a tensor of the model.
    fn add(&mut self, name: String, shape: Vec<usize>) -> Result<(), GgufError> {
        let architecture = self.model.architecture;
        match names::place(&name, architecture.names)
            .ok_or_else(|| GgufError::MissingTensor { tensor: name.clone() })?
        {
            Place::Whole(tensor) => self.rows(name, shape, &tensor, None),
            Place::Expert { alone, .. } if self.has(&alone) => self.rows(name, shape, &alone, None),
            Place::Expert { together, expert, .. } => self.rows(name, shape, &together, Some(expert)),
            Place::Latent { whole, keys, values } if !self.has(&whole) && (self.has(&keys) || self.has(&values)) => {
                self.latent(name, shape, [&keys, &values])
            }
            Place::Latent { whole, .. } => self.rows(name, shape, &whole, None),
            Place::Experts { turns, layer } => self.experts(name, &shape, &turns, &layer),
            Place::Biases { turns } => self.biases(name, shape, &turns),
        }
    }

    /// A tensor whose rows lie in the file one after another: all of a tensor there, or those of one expert.
    fn rows(&mut self, name: String, shape: Vec<usize>, tensor: &str, expert: Option<usize>) -> Result<(), GgufError> {
        let entry = self.take(tensor)?;
        check_shape(tensor, entry, &shape, expert)?;
        let (columns, rows) = shape.split_last().map_or((1, 1), |(columns, rows)| (*columns, rows.iter().product()));
        let head_dim = Some(self.size("head_dim"));
        let neighbours = head_dim.filter(|_| self.model.architecture.neighbours && names::is_rotated(&name));
        let order = neighbours.map_or(Order::AsIs, |head_dim| Order::Neighbours { head_dim });
        // A bias is a row for each value.
        let (rows, columns) = if neighbours.is_some() && shape.len() == 1 { (columns, 1) } else { (rows, columns) };
        let first = expert.map_or(0, |expert| expert * rows);
        let piece = Piece { turns: vec![entry], first, rows, columns, order };
        let kept = entry.kind.kept().filter(|_| self.to.is_none() && shape.len() == 2);
        match kept.and_then(|kept| Some((kept, NewTensor::stored(&name, kept, shape.clone())?))) {
            Some((kept, tensor)) => self.push(tensor, Source { name, pieces: vec![piece], form: Form::Kept(kept) }),
            None => self.values(name, shape, vec![piece]),
        }
    }

    /// What makes keys and values of latents, which newer files have in two tensors: for each head `[rank, keys]`, and `[values, rank]`.
    fn latent(&mut self, name: String, shape: Vec<usize>, tensors: [&str; 2]) -> Result<(), GgufError> {
        let [heads, keys, values, rank] =
            ["num_attention_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank"].map(|key| self.size(key));
        let [key_entry, value_entry] = [self.take(tensors[0])?, self.take(tensors[1])?];
        check_shape(tensors[0], key_entry, &[heads, rank, keys], None)?;
        check_shape(tensors[1], value_entry, &[heads, values, rank], None)?;
        let pieces = (0..heads).flat_map(|head| {
            let transposed = Order::Transposed;
            [
                Piece { turns: vec![key_entry], first: head * rank, rows: rank, columns: keys, order: transposed },
                Piece {
                    turns: vec![value_entry],
                    first: head * values,
                    rows: values,
                    columns: rank,
                    order: Order::AsIs,
                },
            ]
        });
        let pieces = pieces.collect();
        self.values(name, shape, pieces)
    }

    /// The matrices of all experts of a layer, whose rows take turns where there are two tensors: in their blocks and as the file has them,
    /// or else with inputs first.
    fn experts(&mut self, name: String, shape: &[usize], turns: &[String], layer: &str) -> Result<(), GgufError> {
        let &[experts, inputs, outputs] = shape else { return Err(GgufError::MissingTensor { tensor: name }) };
        let rows = outputs / turns.len();
        let mut entries = Vec::new();
        for tensor in turns {
            let entry = self.take(tensor)?;
            check_shape(tensor, entry, &[experts, rows, inputs], None)?;
            entries.push(entry);
        }
        let is_microscaled = |tensor: &String| {
            self.gguf.tensors.get(tensor.as_str()).is_some_and(|entry| entry.kind.storage == Storage::Mxfp4)
        };
        if self.to.is_none() && names::experts(layer).iter().all(is_microscaled) {
            let groups = inputs / GROUP;
            for (end, form, row) in [
                ("_blocks", Form::MicroscaledValues, vec![groups, GROUP / 2]),
                ("_scales", Form::MicroscaledScales, vec![groups]),
            ] {
                let name = format!("{name}{end}");
                let (turns, rows) = (entries.clone(), experts * rows);
                let piece = Piece { turns, first: 0, rows, columns: inputs, order: Order::AsIs };
                let shape = [&[experts, outputs], &row[..]].concat();
                let tensor = NewTensor { name: name.clone(), dtype: Dtype::U8, shape };
                self.push(tensor, Source { name, pieces: vec![piece], form })?;
            }
            return Ok(());
        }
        let piece = |expert: usize| Piece {
            turns: entries.clone(),
            first: expert * rows,
            rows,
            columns: inputs,
            order: Order::Transposed,
        };
        self.values(name, shape.to_vec(), (0..experts).map(piece).collect())
    }

    /// The biases of two matrices of all experts, whose values take turns.
    fn biases(&mut self, name: String, shape: Vec<usize>, turns: &[String]) -> Result<(), GgufError> {
        let &[experts, outputs] = &shape[..] else { return Err(GgufError::MissingTensor { tensor: name }) };
        let rows = outputs / turns.len();
        let mut entries = Vec::new();
        for tensor in turns {
            let entry = self.take(tensor)?;
            check_shape(tensor, entry, &[experts, rows], None)?;
            entries.push(entry);
        }
        let piece = |expert: usize| Piece {
            turns: entries.clone(),
            first: expert * rows,
            rows,
            columns: 1,
            order: Order::Transposed,
        };
        self.values(name, shape, (0..experts).map(piece).collect())
    }

    /// A tensor of plain values.
    fn values(&mut self, name: String, shape: Vec<usize>, pieces: Vec<Piece<'g>>) -> Result<(), GgufError> {
        let entries = pieces.iter().flat_map(|piece| &piece.turns);
        let dtypes = entries.map(|entry| dtype(&entry.kind.storage, self.to.unwrap_or(Dtype::F16)));
        // What holds the values of all.
        let dtype = dtypes.reduce(|a, b| if a == b { a } else { Dtype::F32 }).unwrap_or(Dtype::F32);
        let tensor = NewTensor { name: name.clone(), dtype, shape };
        self.push(tensor, Source { name, pieces, form: Form::Values(dtype) })
    }

    fn push(&mut self, tensor: NewTensor, source: Source<'g>) -> Result<(), GgufError> {
        for piece in &source.pieces {
            if let Some(entry) = piece.turns.iter().find(|entry| !piece.columns.is_multiple_of(entry.kind.values)) {
                let reason = format!("values stored as {} cannot be put in another order", entry.kind.name);
                return Err(GgufError::Tensor { tensor: source.name, reason });
            }
        }
        self.tensors.push(tensor);
        self.sources.push(source);
        Ok(())
    }
}

/// Whether a tensor of the file holds what has `shape`, or as many such as there are experts; dimensions of 1 do not count.
fn check_shape(tensor: &str, entry: &Entry<'_>, shape: &[usize], expert: Option<usize>) -> Result<(), GgufError> {
    let sizes = |shape: &[usize]| shape.iter().copied().filter(|size| *size > 1).collect::<Vec<_>>();
    let found = match expert {
        None => sizes(&entry.shape),
        // The number of experts comes first, and may be one.
        Some(expert) if entry.shape.len() == shape.len() + 1 && expert < entry.shape[0] => sizes(&entry.shape[1..]),
        Some(_) => Vec::new(),
    };
    if found == sizes(shape) {
        return Ok(());
    }
    let (found, which) = (&entry.shape, if expert.is_some() { " for each expert" } else { "" });
    let reason = format!("it has shape {found:?}, expected {shape:?}{which}");
    Err(GgufError::Tensor { tensor: tensor.to_owned(), reason })
}

fn dtype(storage: &Storage, to: Dtype) -> Dtype {
    match storage {
        Storage::F32 => Dtype::F32,
        Storage::F16 => Dtype::F16,
        Storage::Bf16 => Dtype::BF16,
        Storage::Blocks(_) | Storage::Mxfp4 => to,
    }
}
