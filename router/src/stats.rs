//! What was measured of each peer, and what a request cost on the network.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How many of the latest call durations a peer's percentiles are taken over.
const LATENCY_WINDOW: usize = 4096;
/// Weight of the newest sample in smoothed values, as TCP smooths its round trip.
const SMOOTHING: f64 = 1.0 / 8.0;
/// How fast a measured delay is forgotten when no call renews it: a peer that was slow once is tried again soon.
const FORGET_HALF: Duration = Duration::from_secs(2);
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
    last_answer: Option<Instant>,
}

impl PeerStats {
    /// Notes a call answered at `now`: `latency` from sending to the decoded answer, `compute` as the peer reports it.
    pub fn answered(
        &mut self,
        now: Instant,
        latency: Duration,
        compute: Duration,
        assignments: usize,
        queued_rows: u32,
    ) {
        self.calls += 1;
        self.rows += assignments as u64;
        self.queued_rows = queued_rows;
        self.last_answer = Some(now);
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

    /// Expected time of a call apart from its own computing: way and queue. `round_trip` is what the connection measures; what
    /// calls took beyond it counts less the longer ago the last answer is.
    #[must_use]
    pub fn overhead(&self, now: Instant, round_trip: Duration) -> Duration {
        let (Some(smoothed), Some(last)) = (self.smoothed_latency, self.last_answer) else { return round_trip };
        let measured = Duration::from_secs_f64(smoothed) + self.queue_delay();
        let age = now.saturating_duration_since(last).as_secs_f64() / FORGET_HALF.as_secs_f64();
        let beyond = measured.as_secs_f64() - round_trip.as_secs_f64();
        Duration::try_from_secs_f64(round_trip.as_secs_f64() + beyond * 0.5f64.powf(age)).unwrap_or(round_trip)
    }

    /// Whether a call was ever answered: before that, nothing is known but the round trip.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.last_answer.is_some()
    }

    /// Expected computing time for one (row, expert) pair, the peer's queue not counted.
    #[must_use]
    pub fn per_assignment(&self) -> Duration {
        self.smoothed_per_assignment.map_or(FIRST_PER_ASSIGNMENT, Duration::from_secs_f64)
    }

    /// Time for what waited at the peer when it last answered.
    fn queue_delay(&self) -> Duration {
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
            stats.answered(Instant::now(), Duration::from_millis(ms), Duration::ZERO, 1, 0);
        }
        assert_eq!(stats.quantile(0.99), Duration::from_millis(99));
        assert_eq!(stats.quantile(0.5), Duration::from_millis(50));
        assert_eq!(stats.mean(), Duration::from_micros(50_500));
    }

    #[test]
    fn computing_time_is_told_apart_from_the_way() {
        let (mut stats, now) = (PeerStats::default(), Instant::now());
        stats.answered(now, Duration::from_millis(30), Duration::from_millis(10), 5, 3);
        assert_eq!(stats.per_assignment(), Duration::from_millis(2));
        assert_eq!(stats.overhead(now, Duration::from_millis(1)), Duration::from_millis(20 + 6), "way and queue");
    }

    #[test]
    fn a_slow_call_is_forgotten_when_no_other_follows() {
        let (mut stats, now) = (PeerStats::default(), Instant::now());
        let round_trip = Duration::from_millis(2);
        assert_eq!(stats.overhead(now, round_trip), round_trip);
        stats.answered(now, Duration::from_millis(102), Duration::ZERO, 1, 0);
        assert_eq!(stats.overhead(now, round_trip), Duration::from_millis(102));
        assert_eq!(stats.overhead(now + FORGET_HALF, round_trip), Duration::from_millis(52));
        assert!(stats.overhead(now + 20 * FORGET_HALF, round_trip) < Duration::from_millis(3));
    }
}
