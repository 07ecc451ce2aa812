//! Who hosts what in a network of known size.

use hanse_router::ExpertLayout;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// The largest part over the smallest, in [`weights`].
const UNEQUAL: u32 = 4;

/// `--experts` specs for `nodes` volunteers such that every expert has `replicas` hosts and, unless `replicas` equals `nodes` or a
/// layer has few experts, no volunteer has a whole layer. Each gets contiguous runs of experts, so that a token meets few of them. A
/// spec is empty only where there are more volunteers than replicas of all experts together.
#[must_use]
pub fn split(layout: &ExpertLayout, nodes: usize, replicas: usize) -> Vec<String> {
    split_unequally(layout, &vec![1; nodes], replicas)
}

/// As [`split`], one volunteer per weight: the layer is cut into parts in proportion to the weights, and each part is hosted by
/// the volunteer with its number and the `replicas - 1` after it.
#[must_use]
pub fn split_unequally(layout: &ExpertLayout, weights: &[u32], replicas: usize) -> Vec<String> {
    let nodes = weights.len();
    let total = weights.iter().map(|&weight| u64::from(weight)).sum::<u64>().max(1);
    let mut specs = vec![Vec::new(); nodes];
    let mut next = 0;
    for (&layer, &experts) in &layout.layers {
        let mut before = 0;
        let parts = weights.iter().map(|&weight| {
            let first = u64::from(experts) * before / total;
            before += u64::from(weight);
            first..u64::from(experts) * before / total
        });
        let parts: Vec<_> = parts.filter(|part| !part.is_empty()).collect();
        // Where there are fewer parts than volunteers, the next layer goes on with those that got none.
        let start = if parts.len() < nodes { next } else { 0 };
        next = start + parts.len();
        for (at, part) in parts.into_iter().enumerate() {
            for replica in 0..replicas.min(nodes) {
                if let Some(spec) = specs.get_mut((start + at + replica) % nodes) {
                    spec.push(format!("{layer}:{}-{}", part.start, part.end - 1));
                }
            }
        }
    }
    specs.into_iter().map(|spec| spec.join(",")).collect()
}

/// Weights for volunteers of unequal size; the same seed gives the same.
#[must_use]
pub fn weights(seed: u64, nodes: usize) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..nodes).map(|_| rng.random_range(1..=UNEQUAL)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExpertsSpec;

    fn hosts(layout: &ExpertLayout, specs: &[String]) -> Vec<Vec<(u32, u32)>> {
        let resolve = |spec: &String| spec.parse::<ExpertsSpec>().unwrap().resolve(layout, 9).unwrap();
        specs.iter().filter(|spec| !spec.is_empty()).map(resolve).collect()
    }

    #[test]
    fn every_expert_has_its_replicas_and_nobody_has_a_whole_layer() {
        let layout = ExpertLayout { hidden_size: 8, layers: [(0, 16), (2, 16)].into() };
        let specs = split(&layout, 4, 2);
        assert_eq!(specs[0], "0:0-3,0:12-15,2:0-3,2:12-15");
        for held in hosts(&layout, &specs) {
            assert_eq!(held.len(), 16, "half of 32");
        }
    }

    #[test]
    fn a_layer_with_fewer_experts_than_nodes_is_still_covered() {
        let layout = ExpertLayout { hidden_size: 8, layers: [(0, 2)].into() };
        let specs = split(&layout, 3, 1);
        assert_eq!(specs.iter().filter(|spec| !spec.is_empty()).count(), 2);
        assert_eq!(hosts(&layout, &specs).concat().len(), 2, "every expert once");
    }

    #[test]
    fn more_volunteers_than_experts_in_a_layer_share_the_layers() {
        let layout = ExpertLayout { hidden_size: 8, layers: (0..6).map(|layer| (layer, 4)).collect() };
        for (nodes, replicas) in [(5, 1), (10, 2), (24, 1), (24, 2)] {
            let held = hosts(&layout, &split(&layout, nodes, replicas));
            assert_eq!((held.len(), held.concat().len()), (nodes, 24 * replicas), "everybody has some");
        }
        assert_eq!(hosts(&layout, &split(&layout, 30, 1)).len(), 24);
    }

    #[test]
    fn volunteers_of_unequal_size_also_host_every_expert_so_often() {
        let layout = ExpertLayout { hidden_size: 8, layers: [(0, 16), (1, 60), (3, 7)].into() };
        for (seed, nodes, replicas) in (0..50).map(|seed| (seed, 2 + seed as usize % 7, 1 + seed as usize % 2)) {
            let held = hosts(&layout, &split_unequally(&layout, &weights(seed, nodes), replicas));
            let all: Vec<(u32, u32)> = held.iter().flatten().copied().collect();
            for (&layer, &experts) in &layout.layers {
                for expert in 0..experts {
                    let count = all.iter().filter(|&&at| at == (layer, expert)).count();
                    assert_eq!(count, replicas, "seed {seed}, layer {layer}, expert {expert}");
                }
            }
        }
        let sizes: Vec<usize> =
            hosts(&layout, &split_unequally(&layout, &[1, 1, 6, 2], 1)).iter().map(Vec::len).collect();
        assert!(sizes[2] > 3 * sizes[0], "{sizes:?}");
    }
}
