//! All experts of a model in one row, with their sizes.

use std::collections::BTreeMap;

use hanse_model::Checkpoint;
use hanse_protocol::HostedExperts;
use hanse_router::client::layout_of;

use super::PACKS_PER_LAYER;

/// One MoE layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layer {
    pub(super) layer: u32,
    pub(super) experts: u32,
    /// The place of its first expert among all experts.
    pub(super) first: usize,
    /// Bytes of one expert.
    pub(super) bytes: u64,
}

impl Layer {
    /// Experts in one pack: a power of two.
    pub(super) fn pack(&self) -> u32 {
        previous_power_of_two(self.experts / PACKS_PER_LAYER)
    }
}

pub(super) fn previous_power_of_two(number: u32) -> u32 {
    1 << number.max(1).ilog2()
}

/// The experts of a model, numbered over all layers, ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertTable {
    layers: Vec<Layer>,
    len: usize,
}

impl ExpertTable {
    /// `layers` gives, by layer number, how many experts it has and the bytes of one of them.
    #[must_use]
    pub fn new(layers: &BTreeMap<u32, (u32, u64)>) -> Self {
        let mut first = 0;
        let layers = layers.iter().map(|(&layer, &(experts, bytes))| {
            let entry = Layer { layer, experts, first, bytes: bytes.max(1) };
            first += experts as usize;
            entry
        });
        let layers = layers.collect();
        Self { layers, len: first }
    }

    /// The experts of a checkpoint.
    #[must_use]
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let bytes = checkpoint.sizes().bytes_per_expert;
        let layers = layout_of(checkpoint.spec()).layers;
        let of_one = |layer: u32| bytes.get(layer as usize).copied().unwrap_or(0);
        Self::new(&layers.into_iter().map(|(layer, experts)| (layer, (experts, of_one(layer)))).collect())
    }

    /// Number of experts.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the model has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The size of the smallest expert.
    #[must_use]
    pub fn smallest(&self) -> u64 {
        self.layers.iter().map(|layer| layer.bytes).min().unwrap_or(0)
    }

    /// The size of the largest expert.
    #[must_use]
    pub fn largest(&self) -> u64 {
        self.layers.iter().map(|layer| layer.bytes).max().unwrap_or(0)
    }

    /// Bytes of some experts; those that the model does not have count nothing.
    #[must_use]
    pub fn bytes(&self, experts: &[(u32, u32)]) -> u64 {
        experts.iter().filter_map(|(layer, _)| self.layer(*layer)).map(|layer| layer.bytes).sum()
    }

    /// The model's MoE layers, ascending.
    pub(crate) fn layer_numbers(&self) -> impl Iterator<Item = u32> + '_ {
        self.layers.iter().map(|layer| layer.layer)
    }

    pub(super) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    pub(super) fn layer(&self, layer: u32) -> Option<&Layer> {
        let at = self.layers.binary_search_by_key(&layer, |entry| entry.layer).ok()?;
        self.layers.get(at)
    }

    /// The place of an expert among all.
    pub(super) fn index(&self, layer: u32, expert: u32) -> Option<usize> {
        self.layer(layer).filter(|entry| expert < entry.experts).map(|entry| entry.first + expert as usize)
    }

    /// For each expert whether it is in the set.
    pub(super) fn mask(&self, set: &HostedExperts) -> Vec<bool> {
        let mut mask = vec![false; self.len];
        for layer in &self.layers {
            for expert in set.in_layer(layer.layer).take_while(|expert| *expert < layer.experts) {
                mask[layer.first + expert as usize] = true;
            }
        }
        mask
    }
}
