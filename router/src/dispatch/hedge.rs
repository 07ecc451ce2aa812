//! How many calls may be sent twice.

use std::sync::atomic::{AtomicI64, Ordering};

/// Calls that earn one hedge: at most one call in twenty is sent twice while all peers are well.
const CALLS_PER_HEDGE: i64 = 20;
/// Hedges that can be saved up for a bad moment.
const SAVED_HEDGES: i64 = 10;

/// A budget that all requests of a client share.
#[derive(Debug, Default)]
pub(crate) struct HedgeBudget {
    credit: AtomicI64,
}

impl HedgeBudget {
    /// Notes a call that was sent in the ordinary way.
    pub(crate) fn earn(&self) {
        if self.credit.load(Ordering::Relaxed) < CALLS_PER_HEDGE * SAVED_HEDGES {
            self.credit.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes one hedge from the budget; `false` if there is none.
    pub(crate) fn spend(&self) -> bool {
        let enough = |credit: i64| (credit >= CALLS_PER_HEDGE).then(|| credit - CALLS_PER_HEDGE);
        self.credit.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enough).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_call_in_twenty_may_be_sent_twice() {
        let budget = HedgeBudget::default();
        let mut hedges = 0;
        for _ in 0..1000 {
            budget.earn();
            hedges += usize::from(budget.spend());
        }
        assert_eq!(hedges, 50);
    }

    #[test]
    fn a_long_peace_saves_only_so_much() {
        let budget = HedgeBudget::default();
        (0..100_000).for_each(|_| budget.earn());
        assert_eq!((0..100).filter(|_| budget.spend()).count(), SAVED_HEDGES as usize);
    }
}
