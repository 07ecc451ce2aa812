//! Moving capacity: one block given up for another that is worth clearly more.

use hanse_protocol::HostedExperts;

use super::table::{Layer, previous_power_of_two};
use super::{View, WHOLE_LAYER_BONUS, lot, value};

/// What is taken must be worth this many times what is given up for it. Less, and rounding and measured demand would move
/// experts to and fro; much more, and the network would stay uneven.
pub const HYSTERESIS: f64 = 2.0;
/// Of the blocks most worth taking, so many are weighed against what would be given up.
const WEIGHED: usize = 8;
/// A block counts as an opening if it is worth this share of the best.
const ABOUT_AS_GOOD: f64 = 0.5;

/// A change of what a member hosts.
#[derive(Debug, Clone, PartialEq)]
pub struct Move {
    /// Experts to fetch.
    pub take: Vec<(u32, u32)>,
    /// Experts to give up, each hosted by others; empty if the memory has room.
    pub give: Vec<(u32, u32)>,
    /// What the taken ones are worth, and what the given ones were: see [`value`].
    pub gain: f64,
    /// See `gain`.
    pub loss: f64,
    /// How many blocks are about as good as the one taken: as many members may move at the same time.
    pub openings: usize,
}

/// A candidate: a block of one layer with the experts of it that matter.
struct Block {
    layer: u32,
    start: u32,
    experts: Vec<(u32, u32)>,
    bytes: u64,
    worth: f64,
    score: f64,
}

/// The best move for a member that hosts `own` (and is counted in `view`) and has `budget_bytes` for experts in all.
///
/// `None` when no move gains [`HYSTERESIS`] times what it costs. Only experts that another member hosts now are given up. `seed`
/// decides among moves that are about as good, so that members with different seeds do not all make the same.
#[must_use]
pub fn rebalance(view: &View, own: &HostedExperts, budget_bytes: u64, seed: u64) -> Option<Move> {
    let table = view.table();
    let mine = table.mask(own);
    let demand = view.demand();
    // What an expert is worth to this member: with as many replicas as there are without it.
    let worth: Vec<f64> = (0..table.len())
        .map(|i| value((view.hosted()[i] + view.coming()[i]).saturating_sub(mine[i].into()), demand[i]))
        .collect();
    let own_count = mine.iter().filter(|mine| **mine).count();
    let used: u64 = table.layers().iter().map(|layer| layer.bytes * count_in(layer, &mine) as u64).sum();
    let free = budget_bytes.saturating_sub(used);
    let small = previous_power_of_two(u32::try_from(own_count / 4).unwrap_or(u32::MAX));

    let (mut takes, mut gives) = (Vec::new(), Vec::new());
    for layer in table.layers() {
        let size = layer.pack().min(small);
        let share = count_in(layer, &mine) as f64 / f64::from(layer.experts);
        for start in (0..layer.experts).step_by(size as usize) {
            let block = |wanted: bool| {
                let places = start..(start + size).min(layer.experts);
                let places = places.filter(|expert| mine[layer.first + *expert as usize] == wanted);
                let experts: Vec<(u32, u32)> = places.map(|expert| (layer.layer, expert)).collect();
                let worth = experts.iter().map(|(_, expert)| worth[layer.first + *expert as usize]).sum();
                let bytes = layer.bytes * experts.len() as u64;
                Block { layer: layer.layer, start, experts, bytes, worth, score: worth }
            };
            let mut take = block(false);
            if !take.experts.is_empty() {
                let whim = 0.5 + 0.5 * lot([seed, u64::from(layer.layer) << 32 | u64::from(start), 0]);
                let per_byte = take.worth / take.bytes as f64;
                take.score = per_byte * (1.0 + WHOLE_LAYER_BONUS * share) * whim;
                takes.push(take);
            }
            let mut give = block(true);
            // Nothing leaves the network: what nobody else hosts stays.
            give.experts.retain(|(_, expert)| view.hosted()[layer.first + *expert as usize] >= 2);
            if !give.experts.is_empty() {
                give.worth = give.experts.iter().map(|(_, expert)| worth[layer.first + *expert as usize]).sum();
                give.bytes = layer.bytes * give.experts.len() as u64;
                // Scattered blocks go before those of a layer that is mostly here.
                give.score = give.worth / give.bytes as f64 * (1.0 + WHOLE_LAYER_BONUS * share);
                gives.push(give);
            }
        }
    }
    let per_byte = |block: &Block| block.worth / block.bytes as f64;
    let best_worth = takes.iter().map(per_byte).fold(0.0, f64::max);
    let openings = takes.iter().filter(|block| per_byte(block) >= best_worth * ABOUT_AS_GOOD).count();
    takes.sort_by(|a, b| b.score.total_cmp(&a.score));
    gives.sort_by(|a, b| a.score.total_cmp(&b.score));
    takes.into_iter().take(WEIGHED).find_map(|take| {
        if take.bytes <= free {
            let gain = take.worth;
            return Some(Move { take: take.experts, give: Vec::new(), gain, loss: 0.0, openings });
        }
        let needed = take.bytes - free;
        let fits = |give: &&Block| give.bytes >= needed && (give.layer, give.start) != (take.layer, take.start);
        let give =
            gives.iter().filter(fits).find(|give| take.worth >= HYSTERESIS * given(give, needed, &worth, view).1)?;
        let (experts, loss) = given(give, needed, &worth, view);
        Some(Move { take: take.experts, give: experts, gain: take.worth, loss, openings })
    })
}

/// As many experts of the block as free `needed` bytes, and what they are worth.
fn given(block: &Block, needed: u64, worth: &[f64], view: &View) -> (Vec<(u32, u32)>, f64) {
    let each = block.bytes / block.experts.len().max(1) as u64;
    let count = usize::try_from(needed.div_ceil(each.max(1))).unwrap_or(usize::MAX).min(block.experts.len());
    let experts: Vec<(u32, u32)> = block.experts.iter().copied().take(count).collect();
    let of_one = |(layer, expert): &(u32, u32)| view.table().index(*layer, *expert).map_or(f64::MAX, |i| worth[i]);
    let loss = experts.iter().map(of_one).sum();
    (experts, loss)
}

fn count_in(layer: &Layer, mine: &[bool]) -> usize {
    mine[layer.first..layer.first + layer.experts as usize].iter().filter(|mine| **mine).count()
}
