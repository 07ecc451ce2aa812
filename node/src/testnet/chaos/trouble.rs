//! What is done to whom and when. Pure but for the generator of random numbers, which is seeded.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use hanse_router::ExpertLayout;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use crate::ExpertsSpec;

/// How long a volunteer stays away: within these bounds, in seconds.
const AWAY: std::ops::RangeInclusive<f64> = 2.5..=4.0;

/// What may happen to a volunteer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Killed, and started again after a while.
    Kill,
    /// Killed, and started again at once.
    Restart,
    /// It keeps its connections and does nothing.
    Hang,
    /// Nothing comes through to it.
    Deaf,
    /// Nothing comes through from it.
    Mute,
    /// It leaves as it should, and comes back after a while.
    Leave,
    /// Its owner pauses it for a while.
    Rest,
}

impl Kind {
    const ALL: [Self; 7] = [Self::Kill, Self::Hang, Self::Restart, Self::Mute, Self::Leave, Self::Rest, Self::Deaf];

    /// Whether it answers nothing until its trouble is over. One whose data plane is cut off one way can still be reached
    /// through the control plane.
    pub(super) fn is_silent(self) -> bool {
        matches!(self, Self::Kill | Self::Hang)
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kill => "killed",
            Self::Restart => "killed and started again",
            Self::Hang => "hangs",
            Self::Deaf => "hears nothing",
            Self::Mute => "is not heard",
            Self::Leave => "leaves",
            Self::Rest => "is paused by its owner",
        })
    }
}

/// A volunteer's trouble.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trouble {
    pub(super) kind: Kind,
    pub(super) since: Instant,
    pub(super) until: Instant,
}

/// How often what was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Tally {
    /// Killed, and started again later.
    pub killed: usize,
    /// Killed, and started again at once.
    pub restarted: usize,
    /// Stopped in its tracks for a while.
    pub hung: usize,
    /// Left politely, and started again later.
    pub left: usize,
    /// Paused by its owner for a while.
    pub rested: usize,
    /// Path cut one way for a while.
    pub cut: usize,
    /// Slowed down for the rest of the time.
    pub slowed: usize,
}

impl Tally {
    pub(super) fn count(&mut self, kind: Kind) {
        match kind {
            Kind::Kill => self.killed += 1,
            Kind::Restart => self.restarted += 1,
            Kind::Hang => self.hung += 1,
            Kind::Deaf | Kind::Mute => self.cut += 1,
            Kind::Leave => self.left += 1,
            Kind::Rest => self.rested += 1,
        }
    }
}

/// Which experts each volunteer hosts.
#[derive(Debug)]
pub(super) struct Hosts {
    held: Vec<BTreeSet<(u32, u32)>>,
    all: BTreeSet<(u32, u32)>,
}

impl Hosts {
    /// From `--experts` specs that fit the layout; one that does not hosts nothing.
    pub(super) fn new(layout: &ExpertLayout, specs: &[String]) -> Self {
        let layers = layout.layers.keys().next_back().map_or(0, |last| last + 1);
        let held = specs.iter().map(|spec| {
            let experts = spec.parse::<ExpertsSpec>().ok().and_then(|spec| spec.resolve(layout, layers).ok());
            experts.unwrap_or_default().into_iter().collect()
        });
        let all = layout.layers.iter().flat_map(|(&layer, &experts)| (0..experts).map(move |expert| (layer, expert)));
        Self { held: held.collect(), all: all.collect() }
    }

    /// Whether the `usable` volunteers together host every expert.
    pub(super) fn covered_by(&self, usable: impl Fn(usize) -> bool) -> bool {
        let held = self.held.iter().enumerate().filter(|(index, _)| usable(*index));
        let hosted: BTreeSet<_> = held.flat_map(|(_, experts)| experts).collect();
        self.all.iter().all(|expert| hosted.contains(expert))
    }
}

/// What comes next: each kind of trouble once, then by chance.
#[derive(Debug)]
pub(super) struct Schedule {
    rng: StdRng,
    pause: Duration,
    count: usize,
}

impl Schedule {
    pub(super) fn new(rng: StdRng, pause: Duration) -> Self {
        Self { rng, pause, count: 0 }
    }

    /// One of the volunteers that may be disturbed.
    pub(super) fn pick(&mut self, able: &[usize]) -> Option<usize> {
        able.choose(&mut self.rng).copied()
    }

    /// The next trouble and how long it lasts.
    pub(super) fn trouble(&mut self) -> (Kind, Duration) {
        let kind = Kind::ALL.get(self.count).copied();
        self.count += 1;
        let kind = kind.or_else(|| Kind::ALL.choose(&mut self.rng).copied()).unwrap_or(Kind::Kill);
        let lasts = if kind == Kind::Restart { 0.0 } else { self.rng.random_range(AWAY) };
        (kind, Duration::from_secs_f64(lasts))
    }

    /// The time until the next trouble: the stated pause on average.
    pub(super) fn pause(&mut self) -> Duration {
        self.pause.mul_f64(self.rng.random_range(0.5..=1.5))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testnet::split;
    use rand::SeedableRng;

    #[test]
    fn neighbours_that_share_experts_are_not_taken_away_together() {
        let layout = ExpertLayout { hidden_size: 8, layers: [(0, 16), (1, 16)].into() };
        let hosts = Hosts::new(&layout, &split(&layout, 8, 2));
        assert!(hosts.covered_by(|_| true));
        assert!(hosts.covered_by(|i| i != 3));
        assert!(hosts.covered_by(|i| i != 3 && i != 5));
        assert!(!hosts.covered_by(|i| i != 3 && i != 4));
        assert!(!hosts.covered_by(|_| false));
    }

    #[test]
    fn every_kind_of_trouble_comes_within_the_first_seven() {
        let mut schedule = Schedule::new(StdRng::seed_from_u64(1), Duration::from_secs(1));
        let kinds: Vec<Kind> = (0..7).map(|_| schedule.trouble().0).collect();
        assert!(Kind::ALL.iter().all(|kind| kinds.contains(kind)));
        let mut tally = Tally::default();
        kinds.into_iter().for_each(|kind| tally.count(kind));
        assert_eq!(tally, Tally { killed: 1, restarted: 1, hung: 1, left: 1, rested: 1, cut: 2, slowed: 0 });
    }

    #[test]
    fn the_same_seed_makes_the_same_trouble() {
        let run = |seed| {
            let mut schedule = Schedule::new(StdRng::seed_from_u64(seed), Duration::from_secs(1));
            (0..20).map(|_| (schedule.pick(&[1, 2, 3]), schedule.trouble(), schedule.pause())).collect::<Vec<_>>()
        };
        assert_eq!(run(5), run(5));
        assert_ne!(run(5), run(6));
    }
}
