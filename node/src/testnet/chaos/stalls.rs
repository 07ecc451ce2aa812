//! Times between tokens, and what is usual among them.

use std::time::Instant;

use hanse_router::stats::quantile_of;
use serde::Serialize;

/// One token's way: from the token before it until it came.
#[derive(Debug, Clone, Copy)]
struct Gap {
    stream: usize,
    from: Instant,
    to: Instant,
}

/// Times between the tokens of many streams.
#[derive(Debug, Clone, Default)]
pub(super) struct Stalls {
    gaps: Vec<Gap>,
}

/// Of some times in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Quantiles {
    /// How many there are.
    pub count: usize,
    /// Half of them are no longer.
    pub p50_ms: f64,
    /// 99 of 100 are no longer.
    pub p99_ms: f64,
    /// None is longer.
    pub max_ms: f64,
}

impl Quantiles {
    /// Of these milliseconds; zeros without any.
    #[must_use]
    pub fn of(millis: impl IntoIterator<Item = f64>) -> Self {
        let millis: Vec<f64> = millis.into_iter().collect();
        Self {
            count: millis.len(),
            p50_ms: quantile_of(millis.clone(), 0.5),
            p99_ms: quantile_of(millis.clone(), 0.99),
            max_ms: quantile_of(millis, 1.0),
        }
    }
}

impl Stalls {
    /// Notes that a token of `stream` came at `to`, the one before it at `from`.
    pub(super) fn push(&mut self, stream: usize, from: Instant, to: Instant) {
        self.gaps.push(Gap { stream, from, to });
    }

    /// Those of other streams too.
    pub(super) fn append(&mut self, mut others: Self) {
        self.gaps.append(&mut others.gaps);
    }

    /// The tokens whose way began within a time.
    pub(super) fn in_time(&self, from: Instant, to: Instant) -> Self {
        Self { gaps: self.gaps.iter().filter(|gap| gap.from >= from && gap.from < to).copied().collect() }
    }

    /// For each stream that has any, the longest of the tokens that were on their way at some moment of a time, in milliseconds.
    pub(super) fn longest_per_stream(&self, from: Instant, to: Instant) -> Vec<f64> {
        let mut longest = std::collections::BTreeMap::new();
        for gap in self.gaps.iter().filter(|gap| gap.from < to && gap.to > from) {
            let entry = longest.entry(gap.stream).or_insert(0.0f64);
            *entry = entry.max(gap.millis());
        }
        longest.into_values().collect()
    }

    /// What is usual among them.
    pub(super) fn quantiles(&self) -> Quantiles {
        Quantiles::of(self.gaps.iter().map(Gap::millis))
    }
}

impl Gap {
    fn millis(&self) -> f64 {
        (self.to - self.from).as_secs_f64() * 1e3
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_longest_token_on_its_way_at_a_disturbance_counts_per_stream() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut stalls = Stalls::default();
        for (stream, from, to) in [(0, 0, 10), (0, 10, 200), (0, 200, 205), (1, 90, 130), (1, 130, 140), (2, 0, 50)] {
            stalls.push(stream, at(from), at(to));
        }
        assert_eq!(stalls.longest_per_stream(at(100), at(150)), [190.0, 40.0], "stream 2 had nothing on its way");
        assert_eq!(stalls.quantiles(), Quantiles { count: 6, p50_ms: 10.0, p99_ms: 190.0, max_ms: 190.0 });
        assert_eq!(stalls.in_time(at(90), at(131)).quantiles().count, 2);
        assert_eq!(Stalls::default().quantiles(), Quantiles::default());
    }
}
