//! `--max-bandwidth`: a token bucket that answers and weights share, answers first.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug)]
struct Bucket {
    /// Bytes of answers that may go at once; below zero, bytes that have gone ahead of their time.
    answers: f64,
    /// The same for answers and weights together.
    all: f64,
    at: Instant,
}

/// Lets bytes go at a steady rate, with a second's worth at once after a pause.
///
/// Answers wait for other answers only. Weights take what answers leave of the rate. So both together keep to it, apart from a
/// second's worth of answers that may follow upon weights.
#[derive(Debug)]
pub struct Bandwidth {
    rate: f64,
    bucket: Mutex<Bucket>,
}

impl Bandwidth {
    /// `bytes_per_second` on average.
    #[must_use]
    pub fn new(bytes_per_second: u64, now: Instant) -> Self {
        let rate = bytes_per_second.max(1) as f64;
        Self { rate, bucket: Mutex::new(Bucket { answers: rate, all: rate, at: now }) }
    }

    fn filled(&self, now: Instant) -> std::sync::MutexGuard<'_, Bucket> {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let saved = now.saturating_duration_since(bucket.at).as_secs_f64() * self.rate;
        bucket.at = now.max(bucket.at);
        bucket.answers = (bucket.answers + saved).min(self.rate);
        bucket.all = (bucket.all + saved).min(self.rate);
        bucket
    }

    /// The time in which so many bytes may go.
    fn time(&self, bytes: f64) -> Duration {
        // A day is as good as for ever, and never overflows.
        Duration::from_secs_f64((bytes / self.rate).clamp(0.0, 86_400.0))
    }

    /// Takes the `bytes` of an answer out; they may go after the time returned. The answer that comes next waits longer.
    pub fn take(&self, bytes: usize, now: Instant) -> Duration {
        let mut bucket = self.filled(now);
        bucket.answers -= bytes as f64;
        bucket.all -= bytes as f64;
        self.time(-bucket.answers)
    }

    /// Takes `bytes` of weights out, which may go at once.
    ///
    /// # Errors
    /// Nothing is taken: there will not be room for them before the time returned, or later if answers come first.
    pub fn take_spare(&self, bytes: usize, now: Instant) -> Result<(), Duration> {
        let mut bucket = self.filled(now);
        // No more than a second's worth is saved up, and answers nibble at it: what is larger than half of that goes ahead of its
        // time, and what follows waits.
        let needed = (bytes as f64).min(self.rate / 2.0);
        if bucket.all < needed {
            return Err(self.time(needed - bucket.all));
        }
        bucket.all -= bytes as f64;
        Ok(())
    }

    /// Waits until the `bytes` of an answer may go. Dropped, they count as gone.
    pub async fn wait(&self, bytes: usize) {
        let wait = self.take(bytes, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// Waits until `bytes` of weights may go, for `longest` at most.
    ///
    /// # Errors
    /// They may not go within that time: when to ask again, at the earliest.
    pub async fn wait_spare(&self, bytes: usize, longest: Duration) -> Result<(), Duration> {
        let last = Instant::now() + longest;
        loop {
            let now = Instant::now();
            match self.take_spare(bytes, now) {
                Ok(()) => return Ok(()),
                Err(wait) if now + wait > last => return Err(wait),
                Err(wait) => tokio::time::sleep(wait).await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_rate_goes_over_time() {
        let start = Instant::now();
        let bandwidth = Bandwidth::new(1000, start);
        let mut now = start;
        for _ in 0..100 {
            now += bandwidth.take(500, now);
        }
        // 50,000 bytes, of which the first 1000 went at once.
        let took = now.duration_since(start).as_secs_f64();
        assert!((48.5..=49.5).contains(&took), "{took}");
    }

    #[test]
    fn a_pause_saves_up_one_second_and_no_more() {
        let start = Instant::now();
        let bandwidth = Bandwidth::new(1000, start);
        assert_eq!(bandwidth.take(1000, start + Duration::from_secs(60)), Duration::ZERO);
        let wait = bandwidth.take(1000, start + Duration::from_secs(60));
        assert_eq!(wait, Duration::from_secs(1));
    }

    #[test]
    fn answers_and_weights_together_keep_to_the_rate_and_answers_do_not_wait_for_weights() {
        const RATE: usize = 100_000;
        let start = Instant::now();
        let bandwidth = Bandwidth::new(RATE as u64, start);
        let (mut answers, mut weights) = (0, 0);
        for millis in 0..60_000 {
            let now = start + Duration::from_millis(millis);
            // Answers take a quarter of the rate in the first half of the minute, and all of it in the second.
            let answer = if millis < 30_000 { RATE / 4000 } else { RATE / 1000 };
            assert_eq!(bandwidth.take(answer, now), Duration::ZERO, "at {millis} ms");
            answers += answer;
            // Weights are asked for all the time, a megabyte at once.
            if bandwidth.take_spare(1_000_000, now).is_ok() {
                weights += 1_000_000;
            }
        }
        assert_eq!(answers, 15 * RATE / 2 + 30 * RATE);
        // Of three quarters of 30 seconds, and what goes ahead of its time.
        assert!((2_000_000..=3_500_000).contains(&weights), "{weights}");
        assert!(answers + weights <= 61 * RATE + 1_000_000, "{answers} and {weights}");
    }

    #[test]
    fn weights_have_the_whole_rate_while_there_are_no_answers() {
        let start = Instant::now();
        let bandwidth = Bandwidth::new(1000, start);
        let mut now = start;
        for _ in 0..100 {
            while let Err(wait) = bandwidth.take_spare(500, now) {
                now += wait;
            }
        }
        let took = now.duration_since(start).as_secs_f64();
        assert!((48.5..=49.5).contains(&took), "{took}");
    }
}
