//! Moving capacity: blocks given up for others that are worth clearly more.

use hanse_protocol::HostedExperts;

use super::table::{Layer, previous_power_of_two};
use super::{ExpertTable, View, WHOLE_LAYER_BONUS, lot, value};

/// What is taken must be worth this many times what is given up for it.
///
/// Adverts say demand in steps of a factor 2, so what they say together is between 0.75 and 1.5 times the truth, and jumps within these
/// bounds when replicas come and go. Four times in adverts therefore is at least twice in truth: every move makes the network
/// truly better, and moves come to an end.
pub const HYSTERESIS: f64 = 4.0;
/// Of the blocks most worth taking, so many are weighed against what would be given up.
const WEIGHED: usize = 8;
/// The most exchanges of a move: looking for each takes milliseconds in a large network.
const EXCHANGES: usize = 16;
/// What an expert is worth less than if it has enough replicas: see [`value`].
const SAFE: f64 = 100.0;
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
    /// How many moves are about as good as this one: as many members may move at the same time.
    pub openings: usize,
}

impl Move {
    /// Whether it is still worth making, now that `others` is the network without this member.
    #[must_use]
    pub fn still_gains(&self, others: &View) -> bool {
        let (hosted, demand) = (others.hosted(), others.demand());
        // Not what others are about to load: two who are about to load the same would both leave it.
        let worth = |pairs: &[(u32, u32)]| -> f64 {
            let places = pairs.iter().filter_map(|(layer, expert)| others.table().index(*layer, *expert));
            places.map(|at| value(hosted[at], demand[at])).sum()
        };
        let kept_by_others = |(layer, expert): &(u32, u32)| others.replicas(*layer, *expert) > 0;
        self.give.iter().all(kept_by_others) && worth(&self.take) >= HYSTERESIS * worth(&self.give)
    }
}

/// A candidate: a block of one layer with the experts of it that matter.
struct Block {
    layer: u32,
    start: u32,
    len: u32,
    experts: Vec<(u32, u32)>,
    /// What each of them is worth.
    each: Vec<f64>,
    /// Of all of them.
    bytes: u64,
    worth: f64,
    score: f64,
}

/// The best move for a member that hosts `own` (and is counted in `view`) and has `budget_bytes` for experts in all: the best
/// exchange of one block, and those that are best after it, at most sixteen, until a quarter of what it hosts has moved.
///
/// `None` when no exchange gains [`HYSTERESIS`] times what it costs. Only experts that another member hosts now are given up. `seed`
/// decides among exchanges that are about as good, so that members with different seeds do not all make the same.
#[must_use]
pub fn rebalance(view: &View, own: &HostedExperts, budget_bytes: u64, seed: u64) -> Option<Move> {
    let mut mine = view.table().mask(own);
    let most = mine.iter().filter(|mine| **mine).count() / 4;
    let mut found = exchange(view, &mine, budget_bytes, seed)?;
    let (mut after, mut last, mut exchanges) = (view.clone(), found.clone(), 1);
    while found.take.len() < most && exchanges < EXCHANGES {
        after.exchange(&mut mine, &last);
        let Some(next) = exchange(&after, &mine, budget_bytes, seed) else { break };
        let undoes = next.take.iter().any(|pair| found.give.contains(pair))
            || next.give.iter().any(|pair| found.take.contains(pair));
        if undoes || found.take.len() + next.take.len() > most {
            break;
        }
        found.take.extend(&next.take);
        found.give.extend(&next.give);
        found.gain += next.gain;
        found.loss += next.loss;
        exchanges += 1;
        last = next;
    }
    found.take.sort_unstable();
    found.give.sort_unstable();
    found.openings = (found.openings / exchanges).max(1);
    Some(found)
}

/// The best exchange of one block for another, for a member that hosts what is marked in `mine`: see [`rebalance`].
fn exchange(view: &View, mine: &[bool], budget_bytes: u64, seed: u64) -> Option<Move> {
    let table = view.table();
    let demand = view.demand();
    // What an expert is worth to this member: with as many replicas as there are without it.
    let worth: Vec<f64> = (0..table.len())
        .map(|i| value((view.hosted()[i] + view.coming()[i]).saturating_sub(mine[i].into()), demand[i]))
        .collect();
    let own_count = mine.iter().filter(|mine| **mine).count();
    let used: u64 = table.layers().iter().map(|layer| layer.bytes * count_in(layer, mine) as u64).sum();
    let free = budget_bytes.saturating_sub(used);
    let small = previous_power_of_two(u32::try_from(own_count / 4).unwrap_or(u32::MAX));

    let (mut takes, mut gives) = (Vec::new(), Vec::new());
    for layer in table.layers() {
        let size = layer.pack().min(small);
        let share = count_in(layer, mine) as f64 / f64::from(layer.experts);
        for start in (0..layer.experts).step_by(size as usize) {
            let block = |is_in: &dyn Fn(usize) -> bool| {
                let places =
                    (start..(start + size).min(layer.experts)).map(|expert| (expert, layer.first + expert as usize));
                let (experts, each): (Vec<(u32, u32)>, Vec<f64>) =
                    places.filter(|(_, at)| is_in(*at)).map(|(expert, at)| ((layer.layer, expert), worth[at])).unzip();
                let sum: f64 = each.iter().sum();
                let bytes = layer.bytes * experts.len() as u64;
                Block {
                    layer: layer.layer,
                    start,
                    len: size,
                    experts,
                    each,
                    bytes,
                    worth: sum,
                    score: sum / bytes as f64,
                }
            };
            let mut take = block(&|at| !mine[at]);
            if !take.experts.is_empty() {
                let whim = 0.5 + 0.5 * lot([seed, u64::from(layer.layer) << 32 | u64::from(start), 0]);
                take.score *= (1.0 + WHOLE_LAYER_BONUS * share) * whim;
                takes.push(take);
            }
            // Nothing leaves the network: what nobody else hosts stays.
            let mut give = block(&|at| mine[at] && view.hosted()[at] >= 2);
            if !give.experts.is_empty() {
                // Scattered blocks go before those of a layer that is mostly here; and not the same ones everywhere.
                let whim = 0.5 + 0.5 * lot([seed, u64::from(layer.layer) << 32 | u64::from(start), 1]);
                give.score *= (1.0 + WHOLE_LAYER_BONUS * share) * whim;
                gives.push(give);
            }
        }
    }
    let per_byte = |block: &Block| block.worth / block.bytes as f64;
    let best_worth = takes.iter().map(per_byte).fold(0.0, f64::max);
    let openings = takes.iter().filter(|block| per_byte(block) >= best_worth * ABOUT_AS_GOOD).count();
    takes.sort_by(|a, b| b.score.total_cmp(&a.score));
    gives.sort_by(|a, b| a.score.total_cmp(&b.score));
    takes.truncate(WEIGHED);
    let spare = spare_experts(&gives);
    let urgent = takes.iter().filter_map(|take| take.without(|at| worth[at] < SAFE, table));
    let scattered: Vec<Block> = urgent.collect();
    // Whole blocks for whole blocks if that pays. Otherwise single experts, but only to save some that are in danger: the finest
    // network that can be made safe is made safe, and no layer is scattered for less.
    let whole = takes.iter().map(|take| (take, false));
    let single = scattered.iter().map(|take| (take, true));
    whole.chain(single).find_map(|(take, singly)| {
        let found = |give: Vec<(u32, u32)>, loss| {
            let (take, gain) = (take.experts.clone(), take.worth);
            (gain >= HYSTERESIS * loss).then_some(Move { take, give, gain, loss, openings })
        };
        if take.bytes <= free {
            return found(Vec::new(), 0.0);
        }
        let needed = take.bytes - free;
        if singly {
            let elsewhere = spare.iter().filter(|spare| !take.has(spare.layer, spare.start));
            return given(elsewhere, needed).and_then(|(give, loss)| found(give, loss));
        }
        let elsewhere = gives.iter().filter(|give| (give.layer, give.start) != (take.layer, take.start));
        elsewhere.take(WEIGHED).find_map(|give| {
            let singles = spare_experts(std::slice::from_ref(give));
            given(singles.iter(), needed).and_then(|(give, loss)| found(give, loss))
        })
    })
}

impl Block {
    /// The block without the experts at some places of the table; `None` if nothing is left.
    fn without(&self, is_out: impl Fn(usize) -> bool, table: &ExpertTable) -> Option<Self> {
        let out = |(layer, expert): &(u32, u32)| table.index(*layer, *expert).is_none_or(&is_out);
        let experts: Vec<(u32, u32)> = self.experts.iter().copied().filter(|pair| !out(pair)).collect();
        if experts.is_empty() {
            return None;
        }
        let each: Vec<f64> =
            self.experts.iter().zip(&self.each).filter(|(pair, _)| !out(pair)).map(|(_, w)| *w).collect();
        let bytes = self.bytes / self.experts.len() as u64 * experts.len() as u64;
        Some(Self { experts, worth: each.iter().sum(), each, bytes, ..*self })
    }

    fn has(&self, layer: u32, expert: u32) -> bool {
        self.layer == layer && (self.start..self.start + self.len).contains(&expert)
    }
}

/// The experts of some blocks one by one, the least valuable first.
fn spare_experts(blocks: &[Block]) -> Vec<Block> {
    let mut singles: Vec<Block> = Vec::new();
    for block in blocks {
        let bytes = block.bytes / block.experts.len().max(1) as u64;
        singles.extend(block.experts.iter().zip(&block.each).map(|(&(layer, expert), &worth)| Block {
            layer,
            start: expert,
            len: 1,
            experts: vec![(layer, expert)],
            each: vec![worth],
            bytes,
            worth,
            score: worth / bytes as f64,
        }));
    }
    singles.sort_by(|a, b| a.score.total_cmp(&b.score));
    singles
}

/// The first of `spare` that together free `needed` bytes, and what they are worth; `None` if all of them do not.
fn given<'a>(spare: impl Iterator<Item = &'a Block>, needed: u64) -> Option<(Vec<(u32, u32)>, f64)> {
    let (mut freed, mut loss, mut experts) = (0, 0.0, Vec::new());
    for single in spare {
        if freed >= needed {
            break;
        }
        freed += single.bytes;
        loss += single.worth;
        experts.extend(&single.experts);
    }
    experts.sort_unstable();
    (freed >= needed).then_some((experts, loss))
}

fn count_in(layer: &Layer, mine: &[bool]) -> usize {
    mine[layer.first..layer.first + layer.experts as usize].iter().filter(|mine| **mine).count()
}
