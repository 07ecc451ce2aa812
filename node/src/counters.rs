//! What a volunteer has done since it started.

mod demand;

use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) use demand::Demand;

/// Counters that every task of the volunteer adds to.
#[derive(Debug, Default)]
pub struct Counters {
    calls: AtomicU64,
    pairs: AtomicU64,
    refused: AtomicU64,
    malformed: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Calls answered.
    pub calls: u64,
    /// (row, expert) pairs computed for them.
    pub pairs: u64,
    /// Calls and hellos refused for other reasons than their form.
    pub refused: u64,
    /// Frames that broke the protocol's rules.
    pub malformed: u64,
}

impl Counters {
    pub(crate) fn answered(&self, pairs: usize) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.pairs.fetch_add(pairs as u64, Ordering::Relaxed);
    }

    pub(crate) fn refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn malformed(&self) {
        self.malformed.fetch_add(1, Ordering::Relaxed);
    }

    /// The counters now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            calls: read(&self.calls),
            pairs: read(&self.pairs),
            refused: read(&self.refused),
            malformed: read(&self.malformed),
        }
    }
}
