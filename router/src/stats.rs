//! What was measured of each peer, and what a request cost on the network.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use hanse_protocol::Precision;

/// How many of the latest call durations a peer's percentiles are taken over.
const LATENCY_WINDOW: usize = 4096;
/// Weight of the newest sample in smoothed values, as TCP smooths its round trip.
const SMOOTHING: f64 = 1.0 / 8.0;
/// How fast a measured delay is forgotten when no call renews it: a peer that was slow once is tried again soon.
const FORGET_HALF: Duration = Duration::from_secs(2);
/// How fast the estimate of slow calls follows.
const QUANTILE_STEP: f64 = 0.1;
/// The slow factor before anything is measured.
const FIRST_SLOW_FACTOR: f64 = 4.0;
/// Bounds of the slow factor.
const SLOW_FACTORS: std::ops::RangeInclusive<f64> = 1.25..=8.0;
/// No call is slow before this: scheduling on a busy machine takes as long.
const SLOW_AT_LEAST: Duration = Duration::from_millis(20);
/// A call is late at this many times the time at which it is slow ...
const LATE_FACTOR: u32 = 3;
/// ... but not before this.
const LATE_AT_LEAST: Duration = Duration::from_millis(150);
/// A peer's first call, of which little is known, is not slow before this, ...
const FIRST_SLOW_AT_LEAST: Duration = Duration::from_millis(150);
/// ... and not late before this. It is called for the first time perhaps just because another one is gone: a long wait here
/// would come on top of that.
const FIRST_LATE_AT_LEAST: Duration = Duration::from_millis(300);
/// What a failed call costs, for the choice between a fast peer that fails and a slower one that does not.
const FAILURE_COST: Duration = LATE_AT_LEAST;
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
    /// When the last call was sent to it.
    pub last_sent: Option<Instant>,
    /// Duration of each of the latest calls, and how much of it the peer says it computed.
    samples: VecDeque<(Duration, Duration)>,
    smoothed_latency: Option<f64>,
    smoothed_per_assignment: Option<f64>,
    queued_rows: u32,
    pub(crate) last_answer: Option<Instant>,
    last_failure: Option<Instant>,
    /// Share of the latest calls that failed, 0 to 1.
    error_rate: f64,
    /// A call in twenty takes longer than this many times what was expected of it.
    slow_factor: f64,
}

/// One call that was answered.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct AnsweredCall {
    /// From sending to the decoded answer.
    pub latency: Duration,
    /// Of which the peer computed, by its own account.
    pub compute: Duration,
    /// What was expected when it was sent.
    pub usual: Duration,
    /// (row, expert) pairs in it.
    pub assignments: usize,
    /// What waited at the peer when it answered.
    pub queued_rows: u32,
}

/// What a call to a peer should take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Expectation {
    /// On average.
    pub usual: Duration,
    /// One call in twenty takes longer: worth asking another replica if the budget allows.
    pub slow: Duration,
    /// Something is wrong: another replica is asked, and the peer is not used before it has answered a probe.
    pub late: Duration,
}

impl PeerStats {
    /// The same, with the durations of only the latest `calls` calls.
    pub(crate) fn latest(&self, calls: usize) -> Self {
        let skipped = self.samples.len().saturating_sub(calls);
        Self { samples: self.samples.iter().skip(skipped).copied().collect(), ..*self }
    }

    /// Notes a call answered at `now`.
    pub fn answered(&mut self, now: Instant, call: AnsweredCall) {
        let AnsweredCall { latency, compute, usual, assignments, queued_rows } = call;
        self.calls += 1;
        self.error_rate += SMOOTHING * (0.0 - self.error_rate);
        if self.is_known() {
            // Moves up at every call that was slower and down at every other, in balance when one in twenty is slower.
            let step = if latency > usual.mul_f64(self.slow_factor) { 0.95 } else { -0.05 };
            self.slow_factor *= 1.0 + QUANTILE_STEP * step;
        } else {
            self.slow_factor = FIRST_SLOW_FACTOR;
        }
        self.slow_factor = self.slow_factor.clamp(*SLOW_FACTORS.start(), *SLOW_FACTORS.end());
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

    /// Notes a call that failed at `now`.
    pub fn failed(&mut self, now: Instant) {
        self.failures += 1;
        self.last_failure = Some(now);
        self.error_rate += SMOOTHING * (1.0 - self.error_rate);
    }

    /// What a call of `assignments` (row, expert) pairs should take now; before the first answer a guess.
    #[must_use]
    pub fn expectation(&self, now: Instant, round_trip: Duration, assignments: usize) -> Expectation {
        let count = u32::try_from(assignments).unwrap_or(u32::MAX);
        let usual = self.overhead(now, round_trip) + self.per_assignment().saturating_mul(count);
        if !self.is_known() {
            let slow = usual.mul_f64(FIRST_SLOW_FACTOR).max(FIRST_SLOW_AT_LEAST);
            return Expectation { usual, slow, late: (slow * 2).max(FIRST_LATE_AT_LEAST) };
        }
        let slow = usual.mul_f64(self.slow_factor).max(SLOW_AT_LEAST);
        Expectation { usual, slow, late: (slow * LATE_FACTOR).max(LATE_AT_LEAST) }
    }

    /// What failures cost on average, per call. Counts less the longer ago the last one is: a peer that came back would
    /// otherwise not be called while another is as near, and could not show that it is well.
    #[must_use]
    pub fn failure_cost(&self, now: Instant) -> Duration {
        let Some(last) = self.last_failure else { return Duration::ZERO };
        let age = now.saturating_duration_since(last).as_secs_f64() / FORGET_HALF.as_secs_f64();
        FAILURE_COST.mul_f64(self.error_rate * 0.5f64.powf(age))
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
    /// Layers that waited for peers: one per MoE layer, forward pass and group of sequences, but for layers all of whose chosen experts are resident.
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
    /// Experts computed by the client's fallback because no peer could.
    pub fallbacks: u64,
    /// (row, expert) pairs computed by the client itself because it holds these experts.
    pub resident: u64,
    /// Different peers that answered.
    pub peers: usize,
    /// How the experts were stored that peers computed with; empty where only the published ones are accepted.
    pub precisions: BTreeSet<Precision>,
    /// Times that an expert was computed in another precision than before in this request.
    pub mixed: u64,
}

/// What became of the tokens that were drafted for a generation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct DraftUse {
    /// Drafted tokens that were verified.
    pub drafted: u64,
    /// Of which came.
    pub accepted: u64,
    /// Layers that waited for peers after the prompt; of a generation among others, of all of them together.
    pub decode_round_trips: u64,
}

impl NetworkUse {
    /// Counts what another one has counted, too; but for `peers`, of which nobody knows how many are the same.
    pub(crate) fn add(&mut self, other: &Self) {
        self.round_trips += other.round_trips;
        self.frames += other.frames;
        self.bytes_sent += other.bytes_sent;
        self.bytes_received += other.bytes_received;
        self.retries += other.retries;
        self.hedged += other.hedged;
        self.fallbacks += other.fallbacks;
        self.resident += other.resident;
        self.precisions.extend(&other.precisions);
        self.mixed += other.mixed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn took(latency: Duration) -> AnsweredCall {
        AnsweredCall { latency, assignments: 1, ..AnsweredCall::default() }
    }

    #[test]
    fn quantiles_are_those_of_the_latest_calls() {
        let mut stats = PeerStats::default();
        assert_eq!(stats.quantile(0.99), Duration::ZERO);
        assert_eq!(stats.mean(), Duration::ZERO);
        for ms in 1..=100 {
            stats.answered(Instant::now(), took(Duration::from_millis(ms)));
        }
        assert_eq!(stats.quantile(0.99), Duration::from_millis(99));
        assert_eq!(stats.quantile(0.5), Duration::from_millis(50));
        assert_eq!(stats.mean(), Duration::from_micros(50_500));
    }

    #[test]
    fn computing_time_is_told_apart_from_the_way() {
        let (mut stats, now) = (PeerStats::default(), Instant::now());
        let compute = Duration::from_millis(10);
        let call = AnsweredCall { compute, assignments: 5, queued_rows: 3, ..took(Duration::from_millis(30)) };
        stats.answered(now, call);
        assert_eq!(stats.per_assignment(), Duration::from_millis(2));
        assert_eq!(stats.overhead(now, Duration::from_millis(1)), Duration::from_millis(20 + 6), "way and queue");
    }

    #[test]
    fn a_slow_call_is_forgotten_when_no_other_follows() {
        let (mut stats, now) = (PeerStats::default(), Instant::now());
        let round_trip = Duration::from_millis(2);
        assert_eq!(stats.overhead(now, round_trip), round_trip);
        stats.answered(now, took(Duration::from_millis(102)));
        assert_eq!(stats.overhead(now, round_trip), Duration::from_millis(102));
        assert_eq!(stats.overhead(now + FORGET_HALF, round_trip), Duration::from_millis(52));
        assert!(stats.overhead(now + 20 * FORGET_HALF, round_trip) < Duration::from_millis(3));
    }

    #[test]
    fn one_call_in_twenty_is_slow() {
        let (mut stats, now) = (PeerStats::default(), Instant::now());
        // Durations of 100 to 199 ms, each equally often, in a fixed disorder.
        let call = |i: u64| Duration::from_millis(100 + i * 37 % 100);
        let mut slow = 0;
        for i in 0..4000 {
            let expected = stats.expectation(now, Duration::from_millis(1), 1);
            if i >= 1000 && call(i) > expected.slow {
                slow += 1;
            }
            stats.answered(now, AnsweredCall { usual: expected.usual, ..took(call(i)) });
        }
        assert!((50..=450).contains(&slow), "{slow} of 3000");
    }

    #[test]
    fn a_call_is_late_well_after_it_is_slow_and_never_at_once() {
        let (mut stats, now) = (PeerStats::default(), Instant::now());
        let round_trip = Duration::from_micros(100);
        let first = stats.expectation(now, round_trip, 1);
        assert_eq!((first.slow, first.late), (FIRST_SLOW_AT_LEAST, FIRST_LATE_AT_LEAST));
        assert!(stats.expectation(now, round_trip, 10_000).late > 10 * FIRST_LATE_AT_LEAST, "much work takes long");
        stats.answered(now, took(Duration::from_micros(200)));
        let expected = stats.expectation(now, round_trip, 1);
        assert_eq!((expected.slow, expected.late), (SLOW_AT_LEAST, LATE_AT_LEAST));
    }

    #[test]
    fn failures_count_against_a_peer_and_are_forgotten_with_answers_and_with_time() {
        let (mut stats, now) = (PeerStats::default(), Instant::now());
        assert_eq!(stats.failure_cost(now), Duration::ZERO);
        (0..50).for_each(|_| stats.failed(now));
        assert!(stats.failure_cost(now) > FAILURE_COST.mul_f64(0.99));
        assert!(stats.failure_cost(now + 10 * FORGET_HALF) < FAILURE_COST.mul_f64(0.01));
        (0..50).for_each(|_| stats.answered(now, took(Duration::ZERO)));
        assert!(stats.failure_cost(now) < FAILURE_COST.mul_f64(0.01));
    }
}
