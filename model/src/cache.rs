//! Keys and values of the tokens that a sequence has so far.

/// The key/value cache of one sequence. It never leaves the client.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    len: usize,
}

/// Keys and values of one layer. A head's positions lie one behind the other, so that attention reads straight on and
/// growing a head copies nothing but, now and then, that head.
#[derive(Debug, Clone)]
pub(crate) struct LayerCache {
    head_dim: usize,
    /// By key/value head: `[positions, head_dim]`
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl LayerCache {
    pub(crate) fn new(kv_heads: usize, head_dim: usize) -> Self {
        Self { head_dim, keys: vec![Vec::new(); kv_heads], values: vec![Vec::new(); kv_heads] }
    }

    /// Appends one position; `key` and `value` are `[kv_heads, head_dim]`.
    pub(crate) fn push(&mut self, key: &[f32], value: &[f32]) {
        for (head, part) in self.keys.iter_mut().zip(key.chunks_exact(self.head_dim)) {
            head.extend_from_slice(part);
        }
        for (head, part) in self.values.iter_mut().zip(value.chunks_exact(self.head_dim)) {
            head.extend_from_slice(part);
        }
    }

    /// Keys and values of one head.
    pub(crate) fn head(&self, head: usize) -> (&[f32], &[f32]) {
        (&self.keys[head], &self.values[head])
    }
}

impl KvCache {
    pub(crate) fn new(layers: Vec<LayerCache>) -> Self {
        Self { layers, len: 0 }
    }

    /// Positions in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing is in the cache.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all positions from `len` on; does nothing if there are no more than `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        for layer in &mut self.layers {
            let values = self.len * layer.head_dim;
            layer.keys.iter_mut().chain(&mut layer.values).for_each(|head| head.truncate(values));
        }
    }

    /// The cache has the shape that the layers of a model need.
    pub(crate) fn fits(&self, layers: &[LayerCache]) -> bool {
        self.layers.len() == layers.len()
            && self
                .layers
                .iter()
                .zip(layers)
                .all(|(mine, theirs)| mine.head_dim == theirs.head_dim && mine.keys.len() == theirs.keys.len())
    }

    pub(crate) fn layer(&self, layer: usize) -> &LayerCache {
        &self.layers[layer]
    }

    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut LayerCache {
        &mut self.layers[layer]
    }

    /// Counts positions that have been pushed to every layer.
    pub(crate) fn advance(&mut self, positions: usize) {
        self.len += positions;
    }
}
