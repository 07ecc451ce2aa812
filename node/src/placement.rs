//! Which experts to take when only a size of memory was given: those with the fewest replicas first, in contiguous packs.

use std::collections::BTreeMap;

use hanse_protocol::HostedExperts;
use hanse_router::ExpertLayout;

/// Chooses (layer, expert) pairs, ascending, that fit into `budget_bytes`.
///
/// `hosted` is what each other peer hosts, `expert_bytes` the size of one expert of a layer. Rarest experts come first; among equally
/// rare ones whole runs of a layer, so that a token meets few peers. `seed` decides with which layer to begin among equals:
/// members that join at the same time with different seeds do not all take the same.
#[must_use]
pub fn choose(
    layout: &ExpertLayout,
    hosted: &[&HostedExperts],
    expert_bytes: &BTreeMap<u32, u64>,
    budget_bytes: u64,
    seed: u64,
) -> Vec<(u32, u32)> {
    let layers: Vec<u32> = layout.layers.keys().copied().collect();
    let first = if layers.is_empty() { 0 } else { (seed % layers.len() as u64) as usize };
    let mut ranked = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        let turn = (index + layers.len() - first) % layers.len();
        for expert in 0..layout.layers[layer] {
            let replicas = hosted.iter().filter(|h| h.contains(*layer, expert)).count();
            ranked.push((replicas, turn, *layer, expert));
        }
    }
    ranked.sort_unstable();
    let mut left = budget_bytes;
    let mut chosen = Vec::new();
    for (_, _, layer, expert) in ranked {
        let bytes = expert_bytes.get(&layer).copied().unwrap_or(u64::MAX);
        if bytes <= left {
            left -= bytes;
            chosen.push((layer, expert));
        }
    }
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> ExpertLayout {
        ExpertLayout { hidden_size: 8, layers: [(0, 4), (1, 4)].into() }
    }

    fn sizes() -> BTreeMap<u32, u64> {
        [(0, 10), (1, 10)].into()
    }

    #[test]
    fn the_rarest_experts_are_taken_first() {
        let mut hosted = HostedExperts::new();
        for expert in 0..4 {
            hosted.insert(0, expert).unwrap();
        }
        hosted.insert(1, 1).unwrap();
        assert_eq!(choose(&layout(), &[&hosted], &sizes(), 30, 0), [(1, 0), (1, 2), (1, 3)]);
    }

    #[test]
    fn the_budget_is_never_exceeded_and_everything_is_taken_when_it_fits() {
        assert_eq!(choose(&layout(), &[], &sizes(), 39, 0).len(), 3);
        assert_eq!(choose(&layout(), &[], &sizes(), 1000, 1).len(), 8);
        assert!(choose(&layout(), &[], &sizes(), 9, 0).is_empty());
    }

    #[test]
    fn members_with_different_seeds_begin_with_different_layers() {
        assert_eq!(choose(&layout(), &[], &sizes(), 40, 0), [(0, 0), (0, 1), (0, 2), (0, 3)]);
        assert_eq!(choose(&layout(), &[], &sizes(), 40, 1), [(1, 0), (1, 1), (1, 2), (1, 3)]);
    }
}
