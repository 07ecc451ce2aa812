//! How often this client has called each expert.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::directory::ExpertLayout;

/// A counter for each expert of a model.
#[derive(Debug)]
pub(crate) struct Tally(BTreeMap<u32, Box<[AtomicU64]>>);

impl Tally {
    pub(crate) fn new(layout: &ExpertLayout) -> Self {
        let counters = |experts: u32| (0..experts).map(|_| AtomicU64::new(0)).collect();
        Self(layout.layers.iter().map(|(&layer, &experts)| (layer, counters(experts))).collect())
    }

    /// Counts the experts of `layer` that a gate has chosen, each as often as it is named.
    pub(crate) fn add(&self, layer: u32, experts: &[u32]) {
        let Some(counters) = self.0.get(&layer) else { return };
        for counter in experts.iter().filter_map(|&expert| counters.get(expert as usize)) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// For each expert of `layer` the number of rows that were sent to it.
    pub(crate) fn of(&self, layer: u32) -> Vec<u64> {
        let counters = self.0.get(&layer).into_iter().flatten();
        counters.map(|counter| counter.load(Ordering::Relaxed)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_an_expert_counts_and_what_the_model_has_not_counts_nowhere() {
        let tally = Tally::new(&ExpertLayout { hidden_size: 1, layers: BTreeMap::from([(2, 4)]) });
        tally.add(2, &[0, 3, 3, 9]);
        tally.add(1, &[0]);
        assert_eq!(tally.of(2), [1, 0, 0, 2]);
        assert!(tally.of(1).is_empty());
    }
}
