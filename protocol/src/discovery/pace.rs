//! When provider records are published again.

use std::time::Duration;

use tokio::time::Instant;

/// Provider records are published again this often; well below their life time.
const INTERVAL: Duration = Duration::from_secs(120);
/// New peers often come in bursts: publishing waits this long after one, so that a burst is one publication.
const LEAST_DELAY: Duration = Duration::from_millis(200);
/// Where new peers come all the time, as in a network that grows, publications follow each other no faster than this.
const MOST_DELAY: Duration = Duration::from_secs(16);
/// A network counts as calm after so many delays without a new peer.
const CALM_AFTER: u32 = 4;

/// After a move records go out so often, so far apart: the first may be lost on connections that are dead.
const REPEATS: u32 = 4;
const REPEAT_DELAY: Duration = Duration::from_secs(1);

/// Publishing costs a look-up per key and a record to each of the twenty members nearest to it, so that peers that come one after another
/// must not each cause it: the delay doubles each time, until no new peer has come for a while.
#[derive(Debug)]
pub(super) struct PublishPace {
    /// When to publish next.
    at: Instant,
    delay: Duration,
    /// When the last new peer came.
    last_new: Instant,
    is_hurried: bool,
    /// How many more times to publish in quick succession.
    repeats: u32,
}

impl PublishPace {
    pub(super) fn new(now: Instant) -> Self {
        Self { at: now + INTERVAL, delay: LEAST_DELAY, last_new: now, is_hurried: false, repeats: 0 }
    }

    pub(super) fn at(&self) -> Instant {
        self.at
    }

    /// The records are being published.
    pub(super) fn published(&mut self, now: Instant) {
        if std::mem::take(&mut self.is_hurried) {
            self.delay = (self.delay * 2).min(MOST_DELAY);
        }
        self.at = now + if self.repeats > 0 { REPEAT_DELAY } else { INTERVAL };
        self.repeats = self.repeats.saturating_sub(1);
    }

    /// There is a new peer in the routing table, which may be among those that should keep the records.
    pub(super) fn new_peer(&mut self, now: Instant) {
        if now.saturating_duration_since(self.last_new) >= self.delay * CALM_AFTER {
            self.delay = LEAST_DELAY;
        }
        self.last_new = now;
        self.is_hurried = true;
        self.at = self.at.min(now + self.delay);
    }

    /// What the records say has changed.
    pub(super) fn news(&mut self, now: Instant) {
        self.at = self.at.min(now + LEAST_DELAY);
    }

    /// This member's own addresses have changed.
    pub(super) fn moved(&mut self, now: Instant) {
        self.repeats = REPEATS;
        self.news(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Publications in `time` when a new peer comes every `gap`.
    fn publications(pace: &mut PublishPace, begin: Instant, gap: Duration, time: Duration) -> usize {
        let (mut now, mut next_peer, mut count) = (begin, begin, 0);
        while now < begin + time {
            if next_peer <= pace.at() {
                now = next_peer;
                pace.new_peer(now);
                next_peer += gap;
            } else {
                now = pace.at();
                pace.published(now);
                count += 1;
            }
        }
        count
    }

    #[test]
    fn a_burst_of_peers_is_one_publication_and_a_steady_stream_is_few() {
        let begin = Instant::now();
        let mut pace = PublishPace::new(begin);
        for peer in 0..20 {
            pace.new_peer(begin + Duration::from_millis(5 * peer));
        }
        assert_eq!(pace.at(), begin + LEAST_DELAY);
        let mut pace = PublishPace::new(begin);
        let count = publications(&mut pace, begin, Duration::from_millis(100), Duration::from_secs(60));
        assert!((6..12).contains(&count), "{count} in a minute");
    }

    #[test]
    fn after_calm_a_new_peer_is_told_at_once() {
        let begin = Instant::now();
        let mut pace = PublishPace::new(begin);
        publications(&mut pace, begin, Duration::from_millis(100), Duration::from_secs(60));
        let later = begin + Duration::from_secs(60) + MOST_DELAY * CALM_AFTER;
        pace.published(later);
        pace.new_peer(later);
        assert_eq!(pace.at(), later + LEAST_DELAY);
    }

    #[test]
    fn without_peers_and_news_it_is_time_again_after_the_interval() {
        let begin = Instant::now();
        let mut pace = PublishPace::new(begin);
        assert_eq!(pace.at(), begin + INTERVAL);
        pace.news(begin);
        assert_eq!(pace.at(), begin + LEAST_DELAY);
        pace.published(begin + LEAST_DELAY);
        assert_eq!(pace.at(), begin + LEAST_DELAY + INTERVAL);
    }

    #[test]
    fn after_a_move_records_go_out_several_times() {
        let begin = Instant::now();
        let mut pace = PublishPace::new(begin);
        pace.moved(begin);
        let mut times = Vec::new();
        while pace.at() < begin + INTERVAL {
            times.push(pace.at() - begin);
            pace.published(pace.at());
        }
        assert_eq!(times.len() as u32, 1 + REPEATS, "{times:?}");
        assert!(*times.last().unwrap() < Duration::from_secs(5));
    }
}
