//! What came of it.

use serde::Serialize;

use super::{Quantiles, Tally};

/// What happened.
#[derive(Debug, Clone, Serialize)]
pub struct ChaosReport {
    /// Runs the same again.
    pub seed: u64,
    /// Experts that each volunteer hosts.
    pub experts: Vec<usize>,
    /// Generations that ended, in peace and in chaos.
    pub generations: usize,
    /// Of which failed.
    pub failed: usize,
    /// Of which gave other tokens than one process.
    pub different: usize,
    /// What the first few that failed said.
    pub failures: Vec<String>,
    /// Time from one token to the next of the same generation, undisturbed.
    pub peace: Quantiles,
    /// The same while things break.
    pub chaos: Quantiles,
    /// Time beyond the usual that the tokens in progress took when a volunteer was killed, up to a second later.
    pub killed: Quantiles,
    /// The same when one hung.
    pub hung: Quantiles,
    /// The same when one left politely or was paused by its owner.
    pub left: Quantiles,
    /// How often what was done.
    pub disturbances: Tally,
    /// What was done, one after the other.
    pub events: Vec<Event>,
    /// Latest time after its death or hang that a volunteer was still sent a call.
    pub longest_in_routes_ms: f64,
    /// Time from a volunteer's return until it answered a call.
    pub return_ms: Quantiles,
    /// Calls sent, in peace and in chaos.
    pub frames: [u64; 2],
    /// Of which because another one was late.
    pub hedged: [u64; 2],
    /// Of which because another one failed.
    pub retries: [u64; 2],
}

/// Something that was done to a volunteer.
#[derive(Debug, Clone, Serialize)]
pub struct Event {
    /// Seconds after the peace ended.
    pub after_s: f64,
    /// Which volunteer.
    pub node: usize,
    /// What.
    pub what: String,
    /// The longest time from token to token within a second of it.
    pub longest_ms: f64,
}

impl ChaosReport {
    /// Whether every generation ended with the right tokens.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.failed == 0 && self.different == 0 && self.generations > 0
    }

    /// Share of the calls in peace that were sent a second time because the first was late.
    #[must_use]
    pub fn hedged_in_peace(&self) -> f64 {
        let [hedged, frames] = [self.hedged[0] as f64, self.frames[0] as f64];
        if frames == 0.0 { 0.0 } else { hedged / (frames - hedged).max(1.0) }
    }
}
