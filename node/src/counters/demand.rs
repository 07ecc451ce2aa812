//! How wanted each expert is: rows computed with it, the older the less they count.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hanse_protocol::{ExpertRows, HostedExperts, popularity};

/// A step of popularity is left only when the rate is this factor beyond its end: a rate on the edge of two steps would
/// change the advert, and what others conclude from it, all the time.
const STICKY: f64 = 1.2;

#[derive(Debug, Clone, Copy)]
struct Tally {
    rows: f64,
    at: Instant,
    step: u8,
}

/// Rows per expert, with exponential decay. Time is an argument.
#[derive(Debug)]
pub(crate) struct Demand {
    half_life: Duration,
    started: Instant,
    tallies: Mutex<HashMap<(u32, u32), Tally>>,
}

impl Demand {
    /// Nothing was asked for yet; half of what will be is forgotten in `half_life`.
    pub(crate) fn new(half_life: Duration, now: Instant) -> Self {
        Self { half_life: half_life.max(Duration::from_millis(1)), started: now, tallies: Mutex::default() }
    }

    fn kept(&self, since: Instant, now: Instant) -> f64 {
        (-(now.saturating_duration_since(since).as_secs_f64() / self.half_life.as_secs_f64())).exp2()
    }

    /// Counts the rows of one call.
    pub(crate) fn count(&self, layer: u32, assignments: &[ExpertRows], now: Instant) {
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        for assigned in assignments {
            let tally = tallies.entry((layer, assigned.expert)).or_insert(Tally { rows: 0.0, at: now, step: 0 });
            tally.rows = tally.rows * self.kept(tally.at, now) + assigned.rows.len() as f64;
            tally.at = now;
        }
    }

    /// The steps of popularity of the experts hosted, as adverts say them; none if nothing was ever asked for.
    pub(crate) fn steps(&self, hosted: &HostedExperts, now: Instant) -> Vec<u8> {
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        tallies.retain(|(layer, expert), _| hosted.contains(*layer, *expert));
        if tallies.is_empty() {
            return Vec::new();
        }
        // A sum over all time would be the rate times half_life / ln 2; a young member has seen a part of that only.
        let seen = (1.0 - self.kept(self.started, now)).max(0.05);
        let minutes = self.half_life.as_secs_f64() / 60.0 / std::f64::consts::LN_2 * seen;
        let mut step_of = |pair| {
            let Some(tally) = tallies.get_mut(&pair) else { return 0 };
            let rate = tally.rows * self.kept(tally.at, now) / minutes;
            if popularity(rate / STICKY) > tally.step || popularity(rate * STICKY) < tally.step {
                tally.step = popularity(rate);
            }
            tally.step
        };
        hosted.iter().map(&mut step_of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosted() -> HostedExperts {
        let mut hosted = HostedExperts::new();
        hosted.insert(1, 2).and_then(|()| hosted.insert(1, 3)).unwrap();
        hosted
    }

    fn rows(expert: u32, count: u32) -> ExpertRows {
        ExpertRows { expert, rows: (0..count).collect(), weights: Vec::new() }
    }

    #[test]
    fn popularity_is_rows_a_minute_and_is_forgotten() {
        let start = Instant::now();
        let demand = Demand::new(Duration::from_secs(600), start);
        assert!(demand.steps(&hosted(), start).is_empty());
        let after = |seconds| start + Duration::from_secs(seconds);
        for second in 0..3600 {
            demand.count(1, &[rows(2, 1)], after(second));
        }
        // 60 a minute is in the step from 32 to 64.
        assert_eq!(demand.steps(&hosted(), after(3600)), [6, 0]);
        // After ten minutes half is left, which is too near to the step's end to leave it; soon after it is not. Nothing to speak
        // of is left after three hours.
        assert_eq!(demand.steps(&hosted(), after(4200)), [6, 0]);
        assert_eq!(demand.steps(&hosted(), after(4500)), [5, 0]);
        assert_eq!(demand.steps(&hosted(), after(3600 * 4)), [0, 0]);
    }

    #[test]
    fn a_young_member_knows_the_rate_as_well() {
        let start = Instant::now();
        let demand = Demand::new(Duration::from_secs(600), start);
        for second in 0..60 {
            demand.count(1, &[rows(3, 12)], start + Duration::from_secs(second));
        }
        // 720 a minute is in the step from 512 to 1024.
        assert_eq!(demand.steps(&hosted(), start + Duration::from_secs(60)), [0, 10]);
    }
}
