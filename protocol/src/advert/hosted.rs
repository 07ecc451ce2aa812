//! The set of experts that a member hosts.

use std::collections::BTreeMap;

/// Layers are numbered below this.
pub const MAX_LAYERS: u32 = 1024;
/// Experts of a layer are numbered below this.
pub const MAX_EXPERTS: u32 = 4096;

/// A set of experts: one bitmap for each layer that has any.
///
/// Layers are counted from 0 over all layers of the model, dense ones included. Never more than 512 bytes for a layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostedExperts {
    /// Bit `e % 8` of byte `e / 8` stands for expert `e`. The last byte of a bitmap is never zero, and no bitmap is empty, so
    /// that equal sets are equal bytes.
    layers: BTreeMap<u32, Vec<u8>>,
}

/// What is wrong with a set of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HostedError {
    /// A layer beyond any model.
    #[error("layer {0} is not below {MAX_LAYERS}")]
    Layer(u32),
    /// An expert beyond any layer.
    #[error("expert {0} is not below {MAX_EXPERTS}")]
    Expert(u32),
    /// The encoded layers are not ascending.
    #[error("layer {0} is not above the one before it")]
    LayerOrder(u32),
    /// The bitmap is empty, too long, or ends in a zero byte.
    #[error("the bitmap of layer {0} is not the shortest one")]
    Bitmap(u32),
}

impl HostedExperts {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an expert.
    ///
    /// # Errors
    /// If `layer` is not below [`MAX_LAYERS`] or `expert` not below [`MAX_EXPERTS`].
    pub fn insert(&mut self, layer: u32, expert: u32) -> Result<(), HostedError> {
        if layer >= MAX_LAYERS {
            return Err(HostedError::Layer(layer));
        }
        if expert >= MAX_EXPERTS {
            return Err(HostedError::Expert(expert));
        }
        let bitmap = self.layers.entry(layer).or_default();
        let byte = expert as usize / 8;
        if bitmap.len() <= byte {
            bitmap.resize(byte + 1, 0);
        }
        bitmap[byte] |= 1 << (expert % 8);
        Ok(())
    }

    /// Whether the expert is in the set.
    pub fn contains(&self, layer: u32, expert: u32) -> bool {
        self.layers
            .get(&layer)
            .and_then(|bitmap| bitmap.get(expert as usize / 8))
            .is_some_and(|byte| byte & (1 << (expert % 8)) != 0)
    }

    /// Experts in the set, over all layers.
    pub fn count(&self) -> usize {
        self.layers.values().flatten().map(|byte| byte.count_ones() as usize).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// The layers that have an expert in the set, ascending.
    pub fn layers(&self) -> impl Iterator<Item = u32> {
        self.layers.keys().copied()
    }

    /// The experts of one layer, ascending.
    pub fn in_layer(&self, layer: u32) -> impl Iterator<Item = u32> {
        self.layers.get(&layer).into_iter().flat_map(|bitmap| bits(bitmap))
    }

    /// All experts as (layer, expert), ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> {
        self.layers.iter().flat_map(|(layer, bitmap)| bits(bitmap).map(|expert| (*layer, expert)))
    }

    /// The highest expert of each layer, as (layer, expert).
    pub(super) fn highest(&self) -> impl Iterator<Item = (u32, u32)> {
        self.layers.iter().filter_map(|(layer, bitmap)| {
            let before = u32::try_from(bitmap.len()).ok()?.checked_sub(1)? * 8;
            Some((*layer, before + bitmap.last()?.checked_ilog2()?))
        })
    }

    /// Layers with their bitmaps, ascending.
    pub(super) fn bitmaps(&self) -> impl ExactSizeIterator<Item = (u32, &[u8])> {
        self.layers.iter().map(|(layer, bitmap)| (*layer, bitmap.as_slice()))
    }

    /// Adds a layer behind all others.
    pub(super) fn push_bitmap(&mut self, layer: u32, bitmap: &[u8]) -> Result<(), HostedError> {
        if layer >= MAX_LAYERS {
            return Err(HostedError::Layer(layer));
        }
        if self.layers.last_key_value().is_some_and(|(last, _)| *last >= layer) {
            return Err(HostedError::LayerOrder(layer));
        }
        if bitmap.len() > MAX_EXPERTS as usize / 8 || bitmap.last().is_none_or(|last| *last == 0) {
            return Err(HostedError::Bitmap(layer));
        }
        self.layers.insert(layer, bitmap.to_vec());
        Ok(())
    }
}

fn bits(bitmap: &[u8]) -> impl Iterator<Item = u32> {
    (0u32..).zip(bitmap).flat_map(|(index, byte)| {
        let byte = *byte;
        (0..8).filter(move |bit| byte & (1 << bit) != 0).map(move |bit| index * 8 + bit)
    })
}
