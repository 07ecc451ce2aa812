//! What was measured of each peer, and what a request cost on the network.

use std::collections::VecDeque;
use std::time::Duration;

/// How many of the latest call durations a peer's percentiles are taken over.
const LATENCY_WINDOW: usize = 4096;
/// Weight of the newest sample in smoothed values, as TCP smooths its round trip.
const SMOOTHING: f64 = 1.0 / 8.0;
/// Assumed for a peer that was not called yet.
const FIRST_PER_ASSIGNMENT: Duration = Duration::from_micros(200);

/// Calls to one peer as this client saw them.
#[derive(Debug, Clone, Default)]
pub struct PeerStats {
    /// Calls answered.
    pub calls: u64,
    /// (row, expert) pairs in the answered calls.
    pub rows: u64,
    /// Calls that failed or came too late.
    pub failures: u64,
    /// Duration of each of the latest calls, and how much of it the peer says it computed.
    samples: VecDeque<(Duration, Duration)>,
    smoothed_latency: Option<f64>,
    smoothed_per_assignment: Option<f64>,
    queued_rows: u32,
}

impl PeerStats {
    /// Notes an answered call: `latency` from sending to the decoded answer, `compute` as the peer reports it.
    pub fn answered(&mut self, latency: Duration, compute: Duration, assignments: usize, queued_rows: u32) {
        self.calls += 1;
        self.rows += assignments as u64;
        self.queued_rows = queued_rows;
        if self.samples.len() == LATENCY_WINDOW {
            self.samples.pop_front();
        }
        self.samples.push_back((latency, compute));
        // What is not computing is the way there and back and the queue, whatever the number of rows.
        smooth(&mut self.smoothed_latency, latency.saturating_sub(compute).as_secs_f64());
        smooth(&mut self.smoothed_per_assignment, compute.as_secs_f64() / assignments.max(1) as f64);
    }

    /// Notes a call that failed.
    pub fn failed(&mut self) {
        self.failures += 1;
    }

    /// Expected time of a call apart from its own computing, if the peer was called before.
    #[must_use]
    pub fn overhead(&self) -> Option<Duration> {
        self.smoothed_latency.map(Duration::from_secs_f64)
    }

    /// Expected computing time for one (row, expert) pair, the peer's queue not counted.
    #[must_use]
    pub fn per_assignment(&self) -> Duration {
        self.smoothed_per_assignment.map_or(FIRST_PER_ASSIGNMENT, Duration::from_secs_f64)
    }

    /// Time for what waited at the peer when it last answered.
    #[must_use]
    pub fn queue_delay(&self) -> Duration {
        self.per_assignment() * self.queued_rows
    }

    /// Mean duration of the latest calls; zero without calls.
    #[must_use]
    pub fn mean(&self) -> Duration {
        let sum: Duration = self.samples.iter().map(|(latency, _)| latency).sum();
        sum / (self.samples.len().max(1) as u32)
    }

    /// The duration that `quantile` (0 to 1) of the latest calls did not exceed; zero without calls.
    #[must_use]
    pub fn quantile(&self, quantile: f64) -> Duration {
        quantile_of(self.samples.iter().map(|(latency, _)| *latency).collect(), quantile)
    }

    /// The same for the part of the calls in which the peer computed.
    #[must_use]
    pub fn compute_quantile(&self, quantile: f64) -> Duration {
        quantile_of(self.samples.iter().map(|(_, compute)| *compute).collect(), quantile)
    }
}

/// The smallest value that `quantile` (0 to 1) of `values` do not exceed; the type's default without values.
#[must_use]
pub fn quantile_of<T: Copy + PartialOrd + Default>(mut values: Vec<T>, quantile: f64) -> T {
    values.sort_unstable_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    let rank = (quantile.clamp(0.0, 1.0) * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

fn smooth(value: &mut Option<f64>, sample: f64) {
    *value = Some(value.map_or(sample, |old| old + SMOOTHING * (sample - old)));
}

/// What one request cost on the network so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct NetworkUse {
    /// Layers that waited for peers: one per MoE layer and forward pass.
    pub round_trips: u64,
    /// Calls sent.
    pub frames: u64,
    /// Bytes of hidden states and assignments sent.
    pub bytes_sent: u64,
    /// Bytes of hidden states received.
    pub bytes_received: u64,
    /// Calls sent because another one failed.
    pub retries: u64,
    /// Calls sent because another one was late.
    pub hedged: u64,
    /// Different peers that answered.
    pub peers: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_latest_calls() {
        let mut stats = PeerStats::default();
        assert_eq!(stats.quantile(0.99), Duration::ZERO);
        assert_eq!(stats.mean(), Duration::ZERO);
        for ms in 1..=100 {
            stats.answered(Duration::from_millis(ms), Duration::ZERO, 1, 0);
        }
        assert_eq!(stats.quantile(0.99), Duration::from_millis(99));
        assert_eq!(stats.quantile(0.5), Duration::from_millis(50));
        assert_eq!(stats.mean(), Duration::from_micros(50_500));
    }

    #[test]
    fn computing_time_is_told_apart_from_the_way() {
        let mut stats = PeerStats::default();
        stats.answered(Duration::from_millis(30), Duration::from_millis(10), 5, 3);
        assert_eq!(stats.overhead(), Some(Duration::from_millis(20)));
        assert_eq!(stats.per_assignment(), Duration::from_millis(2));
        assert_eq!(stats.queue_delay(), Duration::from_millis(6));
    }
}
