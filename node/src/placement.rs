//! What to host, decided from what the network says: pure functions of a [`View`], a seed and the time.
//!
//! Every expert has a [`value`] that one more replica of it would have: very high while it has fewer than [`TARGET_REPLICAS`],
//! and above that the saving of load, which falls with the number of replicas and rises with demand. [`choose`] fills an empty
//! memory with the most valuable blocks of experts; [`rebalance`] gives a block up for another that is worth clearly more.
//!
//! Each move raises the sum of all values by a stated factor of what it costs, so that moves come to an end: without churn
//! nothing moves any more (Petals issue 389 is what happens otherwise).

mod choose;
mod explain;
mod rebalance;
mod table;
mod turns;
mod view;

pub use choose::choose;
pub use explain::{Part, Reason, explain};
pub use rebalance::{HYSTERESIS, Move, rebalance};
pub use table::ExpertTable;
pub use turns::{Pace, Step, Turns};
pub use view::View;

/// Below so many replicas an expert is in danger: one of its peers leaving must not make the model incomplete.
pub const TARGET_REPLICAS: u32 = 2;
/// A pack is a layer's experts divided by this: what a rebalancing node moves at a time.
const PACKS_PER_LAYER: u32 = 8;
/// How much more a block is worth to a node that then has the whole layer: a token meets fewer peers.
const WHOLE_LAYER_BONUS: f64 = 0.5;

/// What one more replica of an expert is worth that has `replicas`, at `demand` times the average expert's demand.
///
/// Each replica bears `demand / replicas` of the load: this is what one more replica saves of it. Below the target, safety
/// counts far more than load.
#[must_use]
pub fn value(replicas: u32, demand: f64) -> f64 {
    let safety = match replicas {
        0 => 1000.0,
        few if few < TARGET_REPLICAS => 100.0,
        _ => 0.0,
    };
    let saved = f64::from(replicas.max(1)) * f64::from(replicas + 1);
    safety + demand / saved
}

/// A number in 0..1 that depends on all of `parts` and on nothing else.
fn lot(parts: [u64; 3]) -> f64 {
    let mut mixed = 0x9e37_79b9_7f4a_7c15u64;
    for part in parts {
        // The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of the input changes half of the output's.
        mixed = mixed.wrapping_add(part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
    }
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests;
