//! Giving way to others, and coming back when they have been quiet.

use std::time::{Duration, Instant};

/// Others must want no more than this share of the limit before one who gave way comes back.
pub(super) const COME_BACK_AT: f64 = 0.75;

/// Whether way is given to others. Time is an argument.
#[derive(Debug, Clone, Default)]
pub struct GivesWay {
    quiet: Duration,
    gave_way: bool,
    quiet_since: Option<Instant>,
}

impl GivesWay {
    /// Comes back when others have been quiet for so long.
    #[must_use]
    pub fn new(quiet: Duration) -> Self {
        Self { quiet, ..Self::default() }
    }

    /// Whether way is given now. `wanted` is what others want, where 1 is the limit.
    pub fn look(&mut self, now: Instant, wanted: f64) -> bool {
        if wanted > 1.0 {
            self.gave_way = true;
        }
        if wanted > COME_BACK_AT {
            self.quiet_since = None;
        } else if self.gave_way {
            let since = *self.quiet_since.get_or_insert(now);
            if now.saturating_duration_since(since) >= self.quiet {
                self.gave_way = false;
                self.quiet_since = None;
            }
        }
        self.gave_way
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_have_to_be_quiet_for_a_while_without_a_break() {
        let start = Instant::now();
        let mut gives_way = GivesWay::new(Duration::from_secs(3));
        let looks = [0.9, 1.1, 0.7, 0.7, 0.8, 0.5, 0.5, 0.5, 0.5, 0.9, 1.1];
        let given: Vec<bool> =
            (0..).zip(looks).map(|(n, wanted)| gives_way.look(start + Duration::from_secs(n), wanted)).collect();
        assert_eq!(given, [false, true, true, true, true, true, true, true, false, false, true]);
    }
}
