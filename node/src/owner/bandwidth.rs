//! `--max-bandwidth`: a token bucket.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug)]
struct Bucket {
    /// Bytes that may go at once; below zero, bytes that have gone ahead of their time.
    bytes: f64,
    at: Instant,
}

/// Lets bytes go at a steady rate, with a second's worth at once after a pause.
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
        Self { rate, bucket: Mutex::new(Bucket { bytes: rate, at: now }) }
    }

    /// Takes `bytes` out; they may go after the time returned. Who comes next waits longer.
    pub fn take(&self, bytes: usize, now: Instant) -> Duration {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(bucket.at).as_secs_f64();
        bucket.at = now.max(bucket.at);
        bucket.bytes = (bucket.bytes + passed * self.rate).min(self.rate) - bytes as f64;
        // A day is as good as for ever, and never overflows.
        Duration::from_secs_f64((-bucket.bytes / self.rate).clamp(0.0, 86_400.0))
    }

    /// Waits until `bytes` may go. Dropped, they count as gone.
    pub async fn wait(&self, bytes: usize) {
        let wait = self.take(bytes, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
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
}
