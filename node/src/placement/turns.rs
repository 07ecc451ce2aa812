//! When a member looks, and when it moves: so that not all move at once for the same reason.

use std::time::Duration;

use hanse_protocol::HostedExperts;

use super::{Move, View, lot, rebalance};

/// How fast a network rebalances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// How often a member looks at the adverts; each wait is up to a quarter shorter or longer.
    pub interval: Duration,
    /// About how long it takes until others see that somebody moves: for each opening, one member moves in this time.
    pub spacing: Duration,
}

impl Default for Pace {
    /// A look every 30 seconds, a move per opening every 10.
    fn default() -> Self {
        Self { interval: Duration::from_secs(30), spacing: Duration::from_secs(10) }
    }
}

/// What to do after a look.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Nothing now: look again at this time.
    LookAt(Duration),
    /// This, now; then look again.
    Move(Move),
}

/// One member's turns. Time is an argument: anything that rises, such as the time since the member started.
#[derive(Debug, Clone)]
pub struct Turns {
    pace: Pace,
    seed: u64,
    round: u64,
    /// This member's turn has been drawn: it moves at its next look.
    drawn: bool,
}

impl Turns {
    /// Members need different seeds.
    #[must_use]
    pub fn new(pace: Pace, seed: u64) -> Self {
        Self { pace, seed, round: 0, drawn: false }
    }

    /// When to look for the first time, or again. The first time comes soon: others may have chosen at the same time as this one, and
    /// alike.
    pub fn next_look(&mut self, now: Duration) -> Duration {
        self.round += 1;
        let interval = if self.round == 1 { self.pace.interval / 6 } else { self.pace.interval };
        now + interval.mul_f64(0.75 + 0.5 * lot([self.seed, self.round, 2]))
    }

    /// What to do, given what the network looks like `now`; the arguments are those of [`rebalance`].
    ///
    /// When there is something to gain, a member draws its place among all members and waits for as long as those before it
    /// need to fill the openings. If that is beyond its next look it leaves the move to others; otherwise it looks again when its
    /// time has come, and moves if there is still something to gain.
    pub fn step(&mut self, view: &View, own: &HostedExperts, budget_bytes: u64, now: Duration) -> Step {
        let seed = self.seed.wrapping_add(self.round);
        let Some(found) = rebalance(view, own, budget_bytes, seed) else {
            self.drawn = false;
            return Step::LookAt(self.next_look(now));
        };
        if std::mem::take(&mut self.drawn) {
            self.round += 1;
            return Step::Move(found);
        }
        let before = lot([self.seed, self.round, 3]) * view.members() as f64;
        let wait = self.pace.spacing.mul_f64(before / found.openings.max(1) as f64);
        if wait < self.pace.interval {
            self.drawn = true;
            return Step::LookAt(now + wait);
        }
        Step::LookAt(self.next_look(now))
    }
}
