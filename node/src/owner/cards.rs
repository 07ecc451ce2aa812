//! Cards that other programs take: when they are given to them, and when they are taken back. The rule is pure; time and readings are
//! arguments.

mod meter;
#[cfg(feature = "cuda")]
mod nvml;
mod watch;

use std::fmt;
use std::time::{Duration, Instant};

pub use meter::{CardProcess, Meter, MeterError, meter};
pub use watch::CardWatch;

use super::gives_way::{COME_BACK_AT, GivesWay};

/// A card of which nothing was heard for so long is given to others: who takes it may be why.
const UNSEEN_FOR: Duration = Duration::from_secs(5);
/// What others hold and have not computed with for so long counts as the machine's own from then on.
const SETTLED_AFTER: Duration = Duration::from_secs(600);
/// Of the limit for computing: with less than this others count as not computing.
const IDLE_AT: f64 = 0.25;

/// What others may do on a card before it is given to them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CardLimits {
    /// Bytes of its memory that they may take beyond what they had when it was opened.
    pub memory_bytes: u64,
    /// The share of time in which they may compute on it, 0 to 1, over about a second.
    pub busy: f64,
    /// So long they have to have taken less than three quarters of that before the card is used again.
    pub quiet: Duration,
}

/// What others do on a card.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    /// Bytes of its memory that are not this process's.
    pub others_bytes: u64,
    /// The share of time in which others compute on it, 0 to 1; `None` if it cannot be told from this process's.
    pub others_busy: Option<f64>,
}

/// Why a card is given to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// They took memory.
    Memory {
        /// So much more than they had.
        bytes: u64,
    },
    /// They compute.
    Busy {
        /// So much of the time.
        percent: u8,
    },
    /// NVML tells nothing of the card any more.
    Unseen,
    /// It could not be opened again.
    NotOpened,
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory { bytes } => write!(f, "another program took {} of the card", bytesize::ByteSize(*bytes)),
            Self::Busy { percent } => write!(f, "another program computes on the card {percent} % of the time"),
            Self::Unseen => f.write_str("NVML does not tell who uses the card"),
            Self::NotOpened => f.write_str("the card could not be opened again"),
        }
    }
}

/// Whether one card is given to others.
#[derive(Debug, Clone)]
pub struct CardRule {
    limits: CardLimits,
    /// Bytes that others hold without wanting the card for themselves: a desktop, programs that do nothing.
    baseline: u64,
    gives_way: GivesWay,
    why: Option<Taken>,
    seen: Instant,
    /// Since when others compute nothing and hold about so much.
    settling: Option<(Instant, u64)>,
}

impl CardRule {
    /// For a card that is opened at `now`, when others hold `baseline` bytes of it.
    #[must_use]
    pub fn new(limits: CardLimits, now: Instant, baseline: u64) -> Self {
        Self { limits, baseline, gives_way: GivesWay::new(limits.quiet), why: None, seen: now, settling: None }
    }

    /// Why the card is given to others at `now`, or is still. `None` as a reading: it could not be made.
    pub fn look(&mut self, now: Instant, reading: Option<Reading>) -> Option<Taken> {
        let (wanted, why) = match reading {
            Some(reading) => {
                self.seen = now;
                self.settle(now, reading);
                self.wanted(reading)
            }
            None if now.saturating_duration_since(self.seen) < UNSEEN_FOR => return self.why,
            None => (f64::INFINITY, Taken::Unseen),
        };
        let gives_way = self.gives_way.look(now, wanted);
        self.why = gives_way.then(|| self.why.unwrap_or(why));
        self.why
    }

    /// It could not be opened again: others have it for another while.
    pub fn stays_away(&mut self, now: Instant) {
        self.gives_way.look(now, f64::INFINITY);
        self.why = Some(Taken::NotOpened);
    }

    /// What others want, where 1 is the limit, and what that would be called.
    fn wanted(&self, reading: Reading) -> (f64, Taken) {
        let bytes = reading.others_bytes.saturating_sub(self.baseline);
        let busy = reading.others_busy.unwrap_or(0.0);
        let memory = bytes as f64 / self.limits.memory_bytes.max(1) as f64;
        let time = busy / self.limits.busy;
        let percent = (busy * 100.0).round().clamp(0.0, 100.0) as u8;
        if memory >= time { (memory, Taken::Memory { bytes }) } else { (time, Taken::Busy { percent }) }
    }

    /// A browser that was opened is no reason to stay away for ever.
    fn settle(&mut self, now: Instant, Reading { others_bytes, others_busy }: Reading) {
        let is_idle = others_busy.is_some_and(|busy| busy <= self.limits.busy * IDLE_AT);
        let near =
            |bytes: u64| bytes.abs_diff(others_bytes) as f64 <= self.limits.memory_bytes as f64 * (1.0 - COME_BACK_AT);
        self.settling =
            self.settling.filter(|(_, bytes)| near(*bytes)).or(Some((now, others_bytes))).filter(|_| is_idle);
        if let Some((since, _)) = self.settling
            && now.saturating_duration_since(since) >= SETTLED_AFTER
        {
            self.baseline = others_bytes;
        }
    }
}

#[cfg(test)]
mod tests;
