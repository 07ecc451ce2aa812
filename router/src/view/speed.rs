//! Tokens per second, from a count that is looked at now and then.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The speed is that of about so long.
const WINDOW: Duration = Duration::from_secs(3);
/// Looks that follow each other closer count as one.
const SPACING: Duration = Duration::from_millis(200);
/// Shorter times say nothing of a speed.
const SHORTEST: Duration = Duration::from_millis(400);

/// The latest counts, oldest first.
#[derive(Debug, Default)]
pub(super) struct Speed(VecDeque<(Instant, u64)>);

impl Speed {
    /// How fast `count` has risen during the last seconds; `None` if nobody looked at it.
    pub(super) fn per_second(&mut self, now: Instant, count: u64) -> Option<f64> {
        // One of those that are too old stays, if it is the only one that there is to compare with.
        while self.0.get(1).is_some_and(|(at, _)| now.saturating_duration_since(*at) >= SHORTEST)
            && self.0.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > WINDOW)
        {
            self.0.pop_front();
        }
        let rate = self.0.front().and_then(|&(at, before)| {
            let passed = now.saturating_duration_since(at);
            (passed >= SHORTEST).then(|| count.saturating_sub(before) as f64 / passed.as_secs_f64())
        });
        if self.0.back().is_none_or(|(at, _)| now.saturating_duration_since(*at) >= SPACING) {
            self.0.push_back((now, count));
        }
        rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_is_that_of_the_last_seconds() {
        let (mut speed, start) = (Speed::default(), Instant::now());
        let at = |ms: u64| start + Duration::from_millis(ms);
        assert_eq!(speed.per_second(at(0), 0), None);
        let halves: Vec<_> = (1..=10).map(|i| speed.per_second(at(i * 500), i * 10).unwrap()).collect();
        assert!(halves.iter().all(|rate| (rate - 20.0).abs() < 1e-9), "{halves:?}");
        let stopped: Vec<_> = (11..=20).map(|i| speed.per_second(at(i * 500), 100).unwrap()).collect();
        assert!(stopped.is_sorted_by(|a, b| a >= b) && stopped[9] == 0.0, "{stopped:?}");
    }

    #[test]
    fn many_looks_keep_few_counts() {
        let (mut speed, start) = (Speed::default(), Instant::now());
        for i in 0..10_000 {
            speed.per_second(start + Duration::from_millis(i), i);
        }
        assert!(speed.0.len() <= 20, "{}", speed.0.len());
    }
}
