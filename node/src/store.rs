//! The experts that this volunteer holds.

use std::collections::BTreeMap;

use hanse_model::{Checkpoint, Expert, LoadError};
use hanse_protocol::{HostedError, HostedExperts};

/// Loaded experts by layer and number. Immutable while it serves.
#[derive(Debug)]
pub struct ExpertStore {
    experts: BTreeMap<(u32, u32), Expert>,
    hidden_size: usize,
}

impl ExpertStore {
    /// Loads `wanted` (layer, expert) pairs; `progress` is told after each how many are loaded.
    ///
    /// # Errors
    /// The first tensor that is missing or has a wrong shape.
    pub fn load(
        checkpoint: &Checkpoint,
        wanted: &[(u32, u32)],
        mut progress: impl FnMut(usize),
    ) -> Result<Self, LoadError> {
        let mut experts = BTreeMap::new();
        for (done, &(layer, expert)) in wanted.iter().enumerate() {
            experts.insert((layer, expert), Expert::load(checkpoint, layer as usize, expert as usize)?);
            progress(done + 1);
        }
        Ok(Self { experts, hidden_size: checkpoint.spec().hidden_size })
    }

    /// The expert, if it is here.
    #[must_use]
    pub fn expert(&self, layer: u32, expert: u32) -> Option<&Expert> {
        self.experts.get(&(layer, expert))
    }

    /// Length of one row of hidden states.
    #[must_use]
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// Number of experts held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.experts.len()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.experts.is_empty()
    }

    /// Bytes of all weights held.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.experts.values().map(Expert::bytes).sum()
    }

    /// The layers with at least one expert here, ascending.
    pub fn layers(&self) -> impl Iterator<Item = u32> {
        let layers: std::collections::BTreeSet<u32> = self.experts.keys().map(|(layer, _)| *layer).collect();
        layers.into_iter()
    }

    /// What to say in the advert.
    ///
    /// # Errors
    /// A layer or expert number beyond what an advert can say.
    pub fn hosted(&self) -> Result<HostedExperts, HostedError> {
        let mut hosted = HostedExperts::new();
        for &(layer, expert) in self.experts.keys() {
            hosted.insert(layer, expert)?;
        }
        Ok(hosted)
    }
}
