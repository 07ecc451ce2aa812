//! The keys of provider records in the DHT.
//!
//! Records are kept per model and range of layers, not per expert: a model of 58 layers with 256 experts each
//! costs 8 keys and not 14,848. A member with experts in any layer of a range provides that range's key, and
//! every volunteer provides the network's own key, so that a network can be listed without knowing its models.

use crate::ModelId;

/// How many layers share one provider record.
pub const LAYERS_PER_RECORD: u32 = 8;
/// The longest network name, in characters.
pub const MAX_NETWORK_NAME: usize = 32;
/// The network that members join who name none.
pub const DEFAULT_NETWORK: &str = "main";

/// Whether `name` can be a network's name.
#[must_use]
pub fn is_network_name(name: &str) -> bool {
    (1..=MAX_NETWORK_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// The key of a provider record: 32 bytes, BLAKE3 in key-derivation mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProviderKey([u8; 32]);

impl ProviderKey {
    /// The key of all volunteers of the network, whatever they host.
    #[must_use]
    pub fn volunteers() -> Self {
        Self(blake3::derive_key("hanse/provider/1 volunteers", &[]))
    }

    /// The key of those who host experts of `model` in the range of layers that `layer` falls into.
    #[must_use]
    pub fn layers(model: ModelId, layer: u32) -> Self {
        let mut material = [0; 36];
        material[..32].copy_from_slice(&model.0);
        material[32..].copy_from_slice(&(layer / LAYERS_PER_RECORD).to_le_bytes());
        Self(blake3::derive_key("hanse/provider/1 layers", &material))
    }

    /// The key of those who give out the manifest of `model` and the weights that they have.
    #[must_use]
    pub fn weights(model: ModelId) -> Self {
        Self(blake3::derive_key("hanse/provider/1 weights", &model.0))
    }

    /// The key of those among them who have the whole trunk and the tokenizer.
    #[must_use]
    pub fn trunk(model: ModelId) -> Self {
        Self(blake3::derive_key("hanse/provider/1 trunk", &model.0))
    }

    /// The keys that cover `layers` of `model`, each once.
    pub fn covering(model: ModelId, layers: impl IntoIterator<Item = u32>) -> Vec<Self> {
        let ranges: std::collections::BTreeSet<u32> =
            layers.into_iter().map(|layer| layer / LAYERS_PER_RECORD).collect();
        ranges.into_iter().map(|range| Self::layers(model, range * LAYERS_PER_RECORD)).collect()
    }

    /// The key's bytes, as the DHT sees them.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_of_one_range_share_a_key_and_others_do_not() {
        let model = ModelId([7; 32]);
        assert_eq!(ProviderKey::layers(model, 0), ProviderKey::layers(model, 7));
        assert_ne!(ProviderKey::layers(model, 7), ProviderKey::layers(model, 8));
        assert_ne!(ProviderKey::layers(model, 0), ProviderKey::layers(ModelId([8; 32]), 0));
        assert_eq!(ProviderKey::covering(model, 0..58).len(), 8);
    }

    #[test]
    fn network_names_are_short_and_plain() {
        assert!(is_network_name(DEFAULT_NETWORK));
        assert!(is_network_name("lab-7"));
        for bad in ["", "Lab", "a/b", "ä", "a b", &"a".repeat(MAX_NETWORK_NAME + 1)] {
            assert!(!is_network_name(bad), "{bad:?}");
        }
    }
}
