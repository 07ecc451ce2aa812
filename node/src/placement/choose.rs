//! Filling a memory: the most valuable blocks first.

use hanse_protocol::HostedExperts;

use super::table::Layer;
use super::{View, WHOLE_LAYER_BONUS, lot, value};

/// How much more a block is worth that need not be fetched: more than all that chance adds, less than any difference in rarity
/// between experts with few replicas.
const AT_HAND_BONUS: f64 = 0.1;

/// A run of experts of one layer, aligned to its length.
#[derive(Debug, Clone, Copy)]
struct Block {
    start: u32,
    len: u32,
    score: f64,
}

/// Chooses (layer, expert) pairs, ascending, that fit into `budget_bytes`, for a member that hosts nothing yet.
///
/// Blocks are whole layers, halves, quarters and so on down to packs (an eighth), and single experts only where no pack fits any
/// more; the block whose experts are worth most on average is taken, larger ones being worth more. `seed` decides among
/// equals: members that join at the same time with different seeds take different experts. But among equals those go first that
/// are `at_hand`, as on the disk of a member that comes back: it takes the same again and fetches nothing.
#[must_use]
pub fn choose(view: &View, at_hand: &HostedExperts, budget_bytes: u64, seed: u64) -> Vec<(u32, u32)> {
    let table = view.table();
    let demand = view.demand();
    let worth: Vec<f64> = view
        .hosted()
        .iter()
        .zip(view.coming())
        .zip(&demand)
        .map(|((hosted, coming), demand)| value(hosted + coming, *demand))
        .collect();
    let at_hand = table.mask(at_hand);
    let mut mine = vec![false; table.len()];
    let mut left = budget_bytes;
    let mut chosen = Vec::new();
    for small in [false, true] {
        let best_of = |layer: &Layer, mine: &[bool], left: u64| {
            let least = if small { 1 } else { layer.pack() };
            best(layer, (&worth, &at_hand), mine, left, least, seed)
        };
        let mut best_blocks: Vec<Option<Block>> =
            table.layers().iter().map(|layer| best_of(layer, &mine, left)).collect();
        loop {
            let ranked = best_blocks.iter().enumerate().filter_map(|(at, block)| Some((at, (*block)?)));
            let Some((at, block)) = ranked.max_by(|(_, a), (_, b)| a.score.total_cmp(&b.score)) else { break };
            let layer = &table.layers()[at];
            let bytes = layer.bytes.saturating_mul(block.len.into());
            if bytes <= left {
                left -= bytes;
                for expert in block.start..block.start + block.len {
                    mine[layer.first + expert as usize] = true;
                    chosen.push((layer.layer, expert));
                }
            }
            // Either a part of the layer is taken now, or its block no longer fits: look at the layer again.
            best_blocks[at] = best_of(layer, &mine, left);
        }
    }
    chosen.sort_unstable();
    chosen
}

/// The best block of a layer that fits into `left` bytes and has nothing taken in it.
fn best(
    layer: &Layer,
    (worth, at_hand): (&[f64], &[bool]),
    mine: &[bool],
    left: u64,
    least: u32,
    seed: u64,
) -> Option<Block> {
    let all = layer.first..layer.first + layer.experts as usize;
    let (worth, at_hand, mine) = (worth.get(all.clone())?, at_hand.get(all.clone())?, mine.get(all)?);
    let own = mine.iter().filter(|mine| **mine).count() as f64;
    let fits = u32::try_from(left / layer.bytes).unwrap_or(u32::MAX).min(layer.experts);
    let taste = 1.0 + 0.05 * lot([seed, 1, layer.layer.into()]);
    let mut found: Option<Block> = None;
    let mut size = layer.experts.next_power_of_two();
    while size >= least.max(1) {
        for start in (0..layer.experts).step_by(size as usize) {
            let len = size.min(layer.experts - start);
            let run = start as usize..(start + len) as usize;
            if len > fits || mine[run.clone()].contains(&true) {
                continue;
            }
            let here = at_hand[run.clone()].iter().filter(|at_hand| **at_hand).count() as f64 / f64::from(len);
            // By the square, so that a block that is all there goes before a larger one that is half there.
            let mean = worth[run].iter().sum::<f64>() / f64::from(len);
            let share = (own + f64::from(len)) / f64::from(layer.experts);
            let whim = 1.0 + 0.02 * lot([seed, u64::from(layer.layer) << 32 | u64::from(start), size.into()]);
            let score = mean * (1.0 + WHOLE_LAYER_BONUS * share) * (1.0 + AT_HAND_BONUS * here * here) * taste * whim;
            if found.is_none_or(|found| score > found.score) {
                found = Some(Block { start, len, score });
            }
        }
        size /= 2;
    }
    found
}
