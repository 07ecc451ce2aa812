//! The owner's comfort: when a node pauses, what it may use, and how it is told.

pub mod bandwidth;
pub mod cards;
pub mod control;
pub mod gives_way;
pub mod load;
pub mod lock;
pub mod quiet_hours;

use std::time::Instant;

pub use bandwidth::Bandwidth;
pub use cards::{CardLimits, CardWatch, Taken};
pub use gives_way::GivesWay;
use hanse_protocol::Draining;
pub use lock::{DataDirLock, LockError};
pub use quiet_hours::QuietHours;

/// Why a node is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// `hanse pause`.
    Asked,
    /// It is night, or whatever hours the owner named.
    QuietHours(QuietHours),
    /// Other programs want the machine.
    Load,
    /// Other programs have all the cards.
    Cards(Taken),
}

impl Reason {
    /// What others are told of it.
    #[must_use]
    pub fn announced(self) -> Draining {
        match self {
            Self::Asked => Draining::Asked,
            Self::QuietHours(_) => Draining::QuietHours,
            Self::Load => Draining::Load,
            Self::Cards(_) => Draining::Cards,
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Asked => write!(f, "asked to"),
            Self::QuietHours(hours) => write!(f, "quiet hours {hours}"),
            Self::Load => write!(f, "other programs want the machine"),
            Self::Cards(taken) => write!(f, "{taken}"),
        }
    }
}

/// What the owner wants. Time and load are arguments.
#[derive(Debug, Clone, Default)]
pub struct Comfort {
    /// Hours of the local day without calls.
    pub quiet_hours: Option<QuietHours>,
    /// Pause when other programs keep more than so many cores busy.
    pub yield_above: Option<f64>,
    asked: bool,
    load: GivesWay,
}

impl Comfort {
    /// Never paused.
    #[must_use]
    pub fn new(quiet_hours: Option<QuietHours>, yield_above: Option<f64>) -> Self {
        Self { quiet_hours, yield_above, asked: false, load: GivesWay::default() }
    }

    /// Pauses, or takes that back. What else speaks for a pause still does.
    pub fn ask(&mut self, pause: bool) {
        self.asked = pause;
    }

    /// Whether to be paused at `now`, and why. `minute` is that of the local day, `others` the cores that other programs keep busy,
    /// if that is known, and `cards` why the last card was given to others, if none is left.
    pub fn reason(&mut self, now: Instant, minute: u32, others: Option<f64>, cards: Option<Taken>) -> Option<Reason> {
        let wanted = self.yield_above.zip(others).map(|(limit, others)| others / limit);
        let gives_way = wanted.is_some_and(|wanted| self.load.look(now, wanted));
        if self.asked {
            return Some(Reason::Asked);
        }
        if let Some(hours) = self.quiet_hours.filter(|hours| hours.contains(minute)) {
            return Some(Reason::QuietHours(hours));
        }
        cards.map(Reason::Cards).or(gives_way.then_some(Reason::Load))
    }
}

/// The minute of the day by the system's local time.
#[must_use]
pub fn minute_of_day() -> u32 {
    let now = jiff::ZonedDateTime::now();
    u32::try_from(i32::from(now.hour()) * 60 + i32::from(now.minute())).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_gives_way_and_comes_back_when_the_machine_is_calm() {
        let mut comfort = Comfort::new(None, Some(2.0));
        let reasons: Vec<bool> = [1.9, 2.1, 1.9, 1.6, 1.4, 1.9]
            .map(|load| comfort.reason(Instant::now(), 0, Some(load), None).is_some())
            .into();
        assert_eq!(reasons, [false, true, true, true, false, false]);
    }

    #[test]
    fn resuming_by_hand_does_not_overrule_quiet_hours() {
        let hours: QuietHours = "22:00-07:00".parse().unwrap();
        let (mut comfort, now) = (Comfort::new(Some(hours), None), Instant::now());
        assert_eq!(comfort.reason(now, 12 * 60, None, None), None);
        comfort.ask(true);
        assert_eq!(comfort.reason(now, 12 * 60, None, None), Some(Reason::Asked));
        comfort.ask(false);
        assert_eq!(comfort.reason(now, 23 * 60, None, None), Some(Reason::QuietHours(hours)));
        assert_eq!(comfort.reason(now, 7 * 60, None, None), None);
    }
}
