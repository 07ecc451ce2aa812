//! Keys and values of the tokens that a sequence has so far.

use std::ops::Range;

/// Positions for which a head that is full makes room, at least.
const GROWTH: usize = 32;

/// The key/value cache of one sequence. It never leaves the client.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    /// What the LM head reads, where somebody else wants it too.
    hidden: Option<LayerCache>,
    len: usize,
}

/// Keys and values of one layer. A head's positions lie one behind the other, so that attention reads straight on and
/// growing a head copies nothing but, now and then, that head.
#[derive(Debug, Clone)]
pub(crate) struct LayerCache {
    key_dim: usize,
    value_dim: usize,
    /// By key/value head: `[positions, key_dim]`
    keys: Vec<Vec<f32>>,
    /// `[positions, value_dim]`; none where values are a part of the keys.
    values: Vec<Vec<f32>>,
}

impl LayerCache {
    pub(crate) fn new(kv_heads: usize, head_dim: usize) -> Self {
        let heads = vec![Vec::new(); kv_heads];
        Self { key_dim: head_dim, value_dim: head_dim, keys: heads.clone(), values: heads }
    }

    /// Of latent attention: one vector of `width` a position, which is key and value of all heads; and where an indexer chooses positions its
    /// key, of `index_dim` values, in the place of the value.
    pub(crate) fn latent(width: usize, index_dim: usize) -> Self {
        let values = vec![Vec::new(); usize::from(index_dim > 0)];
        Self { key_dim: width, value_dim: index_dim, keys: vec![Vec::new()], values }
    }

    /// Appends one position; `key` is `[kv_heads, key_dim]` and `value` `[kv_heads, value_dim]`, empty where it is a part of the key.
    pub(crate) fn push(&mut self, key: &[f32], value: &[f32]) {
        let (keys, values) = (key.chunks_exact(self.key_dim), value.chunks_exact(self.value_dim.max(1)));
        for (head, part) in self.keys.iter_mut().zip(keys).chain(self.values.iter_mut().zip(values)) {
            if head.len() + part.len() > head.capacity() {
                // Doubling would take up to twice the memory that the positions need.
                head.reserve_exact(part.len().max(head.len() / 8).max(GROWTH * part.len()));
            }
            head.extend_from_slice(part);
        }
    }

    fn shape(&self) -> [(usize, usize); 2] {
        [(self.key_dim, self.keys.len()), (self.value_dim, self.values.len())]
    }

    fn heads(&self) -> impl Iterator<Item = &Vec<f32>> {
        self.keys.iter().chain(&self.values)
    }

    /// Of one position.
    fn stored_values(&self) -> usize {
        self.key_dim * self.keys.len() + self.value_dim * self.values.len()
    }

    /// A copy of the first positions.
    fn prefix(&self, positions: usize) -> Self {
        let first = |heads: &Vec<Vec<f32>>, dim: usize| -> Vec<Vec<f32>> {
            heads.iter().map(|head| head[..head.len().min(positions * dim)].to_vec()).collect()
        };
        Self { keys: first(&self.keys, self.key_dim), values: first(&self.values, self.value_dim), ..*self }
    }

    /// Keys and values of one head, `[positions, key_dim]` and `[positions, value_dim]`; no values where they are a part of the keys.
    pub(crate) fn head(&self, head: usize) -> (&[f32], &[f32]) {
        (&self.keys[head], self.values.get(head).map(Vec::as_slice).unwrap_or_default())
    }
}

impl KvCache {
    pub(crate) fn new(layers: Vec<LayerCache>) -> Self {
        Self { layers, hidden: None, len: 0 }
    }

    /// It also keeps each position's last hidden state, of `hidden_size` values.
    pub(crate) fn keeping_hidden(self, hidden_size: usize) -> Self {
        Self { hidden: Some(LayerCache::latent(hidden_size, 0)), ..self }
    }

    /// The last hidden states of some positions, `[positions, hidden_size]`; `None` if they are not kept.
    pub fn hidden(&self, positions: Range<usize>) -> Option<&[f32]> {
        let hidden = self.hidden.as_ref()?;
        hidden.head(0).0.get(positions.start * hidden.key_dim..positions.end * hidden.key_dim)
    }

    pub(crate) fn keeps_hidden(&self) -> bool {
        self.hidden.is_some()
    }

    /// Appends the last hidden state of one position, if they are kept.
    pub(crate) fn push_hidden(&mut self, row: &[f32]) {
        if let Some(hidden) = &mut self.hidden {
            hidden.push(row, &[]);
        }
    }

    fn all(&self) -> impl Iterator<Item = &LayerCache> {
        self.layers.iter().chain(&self.hidden)
    }

    /// Positions in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing is in the cache.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of memory that the positions take at present, with the room that was made for more.
    pub fn bytes(&self) -> usize {
        let values: usize = self.all().flat_map(LayerCache::heads).map(Vec::capacity).sum();
        values * size_of::<f32>()
    }

    /// Bytes that one more position takes.
    pub fn bytes_per_position(&self) -> usize {
        let values: usize = self.all().map(LayerCache::stored_values).sum();
        values * size_of::<f32>()
    }

    /// A cache of the first `len` positions, or of all if there are fewer: what another sequence that begins alike can go on
    /// from.
    #[must_use]
    pub fn prefix(&self, len: usize) -> Self {
        let len = len.min(self.len);
        let layers = self.layers.iter().map(|layer| layer.prefix(len)).collect();
        Self { layers, hidden: self.hidden.as_ref().map(|hidden| hidden.prefix(len)), len }
    }

    /// Forgets all positions from `len` on; does nothing if there are no more than `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        for layer in self.layers.iter_mut().chain(&mut self.hidden) {
            layer.keys.iter_mut().for_each(|head| head.truncate(self.len * layer.key_dim));
            layer.values.iter_mut().for_each(|head| head.truncate(self.len * layer.value_dim));
        }
    }

    /// The cache has the shape that the layers of a model need.
    pub(crate) fn fits(&self, layers: &[LayerCache]) -> bool {
        self.layers.len() == layers.len()
            && self.layers.iter().zip(layers).all(|(mine, theirs)| mine.shape() == theirs.shape())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(positions: usize) -> KvCache {
        let mut cache = KvCache::new(vec![LayerCache::new(2, 4), LayerCache::new(1, 8)]);
        for position in 0..positions {
            let row = [position as f32; 8];
            cache.layer_mut(0).push(&row, &row);
            cache.layer_mut(1).push(&row, &row);
            cache.advance(1);
        }
        cache
    }

    #[test]
    fn a_prefix_has_the_first_positions_and_a_longer_one_has_all() {
        let cache = filled(10);
        let prefix = cache.prefix(7);
        assert_eq!(prefix.len(), 7);
        assert_eq!(prefix.layer(0).head(1).0, &cache.layer(0).head(1).0[..28]);
        assert_eq!(prefix.layer(1).head(0).1.last(), Some(&6.0));
        assert_eq!(cache.prefix(99).len(), 10);
        assert_eq!(cache.prefix(0).bytes(), 0);
    }

    #[test]
    fn what_is_truncated_is_as_if_it_had_never_been() {
        let mut cache = filled(10);
        cache.truncate(6);
        assert_eq!(cache.len(), 6);
        let heads = |cache: &KvCache| cache.layers.iter().flat_map(LayerCache::heads).cloned().collect::<Vec<_>>();
        assert_eq!(heads(&cache), heads(&filled(6)));
        cache.truncate(8);
        assert_eq!(cache.len(), 6);
    }

    #[test]
    fn hidden_states_come_and_go_with_their_positions() {
        let mut cache = KvCache::new(vec![LayerCache::latent(2, 0)]).keeping_hidden(3);
        assert_eq!(cache.bytes_per_position(), (2 + 3) * 4);
        for position in 0..5 {
            cache.layer_mut(0).push(&[0.0; 2], &[]);
            cache.push_hidden(&[position as f32; 3]);
            cache.advance(1);
        }
        assert_eq!(cache.hidden(3..5), Some(&[3.0, 3.0, 3.0, 4.0, 4.0, 4.0][..]));
        cache.truncate(4);
        assert_eq!((cache.hidden(3..4), cache.hidden(3..5)), (Some(&[3.0; 3][..]), None));
        assert_eq!(cache.prefix(2).hidden(0..2), Some(&[0.0, 0.0, 0.0, 1.0, 1.0, 1.0][..]));
        let mut plain = KvCache::new(vec![LayerCache::latent(2, 0)]);
        plain.push_hidden(&[1.0; 3]);
        assert_eq!((plain.hidden(0..0), plain.bytes()), (None, 0));
        assert!(plain.fits(&[LayerCache::latent(2, 0)]) && cache.fits(&[LayerCache::latent(2, 0)]));
    }

    #[test]
    fn a_latent_position_is_kept_once_with_the_key_of_its_indexer() {
        let mut cache = KvCache::new(vec![LayerCache::latent(6, 0), LayerCache::latent(6, 2)]);
        for position in 0..5 {
            cache.layer_mut(0).push(&[position as f32; 6], &[]);
            cache.layer_mut(1).push(&[position as f32; 6], &[10.0 + position as f32; 2]);
            cache.advance(1);
        }
        assert_eq!(cache.bytes_per_position(), (6 + 6 + 2) * 4);
        let prefix = cache.prefix(3);
        let (keys, values) = prefix.layer(0).head(0);
        assert_eq!((keys.len(), keys[17], values.len()), (18, 2.0, 0));
        assert_eq!(prefix.layer(1).head(0).1, [10.0, 10.0, 11.0, 11.0, 12.0, 12.0]);
        let like = |index_dim| [LayerCache::latent(6, 0), LayerCache::latent(6, index_dim)];
        assert!(!cache.fits(&like(0)) && !cache.fits(&like(3)) && cache.fits(&like(2)));
        cache.truncate(1);
        assert_eq!(cache.layer(0).head(0).0, [0.0; 6]);
        assert_eq!(cache.layer(1).head(0).1, [10.0; 2]);
    }

    #[test]
    fn memory_is_little_more_than_the_positions_need() {
        assert_eq!(filled(0).bytes_per_position(), 2 * (2 * 4 + 8) * 4);
        for positions in [1000, 5000] {
            let cache = filled(positions);
            let needed = positions * cache.bytes_per_position();
            assert!((needed..needed * 9 / 8 + 64).contains(&cache.bytes()), "{} of {needed}", cache.bytes());
        }
    }
}
