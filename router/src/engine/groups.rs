//! Whether the sequences of a pass advance in one group or in two: while one of two waits for peers, the other computes. Pure.
//!
//! Two groups cost a second frame per peer and layer, and peers read the weights of experts that both need twice. So what is faster is
//! measured: now and then a few passes are made the other way, the less often the more often that has lost.

use std::collections::BTreeMap;
use std::time::Duration;

/// Fewer sequences are not worth two frames.
const LEAST: usize = 4;
/// Passes of one trial.
const TRIAL: u32 = 4;
/// Passes before the first trial, and after a trial that won.
const FIRST_TRIAL: u32 = 12;
/// Passes before a trial after many that lost.
const LAST_TRIAL: u32 = 1536;
/// A pass must take this much less to be worth a change.
const WORTH: f64 = 0.97;
/// The weight of the latest pass in the mean.
const LATEST: f64 = 0.25;

/// What passes of about the same number of rows took.
#[derive(Debug)]
struct Size {
    /// Seconds per row in one group and in two, smoothed; none where no pass was measured.
    took: [Option<f64>; 2],
    /// What is faster by all that is known: 1 or 2.
    best: usize,
    /// Passes until the other is tried, or of the trial that is on.
    left: u32,
    trying: bool,
    /// How long to wait for the next trial.
    wait: u32,
}

impl Default for Size {
    fn default() -> Self {
        Self { took: [None; 2], best: 1, left: FIRST_TRIAL, trying: false, wait: FIRST_TRIAL }
    }
}

/// Chooses, by what passes have taken.
#[derive(Debug, Default)]
pub(super) struct Groups {
    /// By the binary logarithm of the number of rows.
    sizes: BTreeMap<u32, Size>,
}

impl Groups {
    /// How many groups a pass with these rows, by sequence, is made in.
    pub(super) fn choose(&mut self, rows: &[usize]) -> usize {
        if rows.len() < LEAST {
            return 1;
        }
        let size = self.size(rows);
        if size.trying { 3 - size.best } else { size.best }
    }

    /// A pass that was made in `groups` has taken so long.
    pub(super) fn measured(&mut self, rows: &[usize], groups: usize, took: Duration) {
        if rows.len() < LEAST {
            return;
        }
        let per_row = took.as_secs_f64() / rows.iter().sum::<usize>().max(1) as f64;
        let size = self.size(rows);
        let mean = &mut size.took[groups - 1];
        *mean = Some(mean.map_or(per_row, |mean| mean + LATEST * (per_row - mean)));
        size.left -= 1;
        if size.left > 0 {
            return;
        }
        if size.trying {
            let of = |groups: usize| size.took[groups - 1].unwrap_or(f64::INFINITY);
            let other = 3 - size.best;
            if of(other) < WORTH * of(size.best) {
                (size.best, size.wait) = (other, FIRST_TRIAL);
            } else {
                size.wait = (size.wait * 2).min(LAST_TRIAL);
            }
        } else {
            // What the network was like at the last trial is not known to be so now.
            size.took[2 - size.best] = None;
        }
        size.trying = !size.trying;
        size.left = if size.trying { TRIAL } else { size.wait };
    }

    fn size(&mut self, rows: &[usize]) -> &mut Size {
        self.sizes.entry(rows.iter().sum::<usize>().max(1).ilog2()).or_default()
    }
}

/// The group of each sequence, so that each of `groups` has about as many rows.
pub(super) fn assign(rows: &[usize], groups: usize) -> Vec<usize> {
    let mut loads = vec![0; groups.max(1)];
    let lightest = |loads: &[usize]| (0..loads.len()).min_by_key(|&group| loads[group]).unwrap_or(0);
    let assigned = rows.iter().map(|rows| {
        let group = lightest(&loads);
        loads[group] += rows;
        group
    });
    assigned.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of 1,000 passes with 16 rows, how many were made in two groups, if one of them takes `one` and two take `two` seconds.
    fn in_two(one: f64, two: f64) -> usize {
        let (mut groups, rows) = (Groups::default(), [1; 16]);
        let chosen = (0..1000).map(|_| {
            let chosen = groups.choose(&rows);
            groups.measured(&rows, chosen, Duration::from_secs_f64(if chosen == 1 { one } else { two }));
            chosen
        });
        chosen.filter(|&chosen| chosen == 2).count()
    }

    #[test]
    fn what_is_faster_is_done_and_the_other_tried_now_and_then() {
        assert!(in_two(0.2, 0.15) > 950, "{}", in_two(0.2, 0.15));
        assert!((4..=30).contains(&in_two(0.2, 0.25)), "{}", in_two(0.2, 0.25));
        assert!(in_two(0.2, 0.199) <= 30, "a difference that is not worth it");
    }

    #[test]
    fn a_change_of_the_network_is_noticed() {
        let (mut groups, rows) = (Groups::default(), [2; 8]);
        let mut run = |passes: usize, one: u64, two: u64| {
            for _ in 0..passes {
                let chosen = groups.choose(&rows);
                groups.measured(&rows, chosen, Duration::from_millis(if chosen == 1 { one } else { two }));
            }
            groups.choose(&rows)
        };
        assert_eq!(run(100, 20, 10), 2);
        assert_eq!(run(1600, 10, 20), 1);
    }

    #[test]
    fn few_sequences_stay_together_and_groups_are_about_as_large() {
        let mut groups = Groups::default();
        for _ in 0..100 {
            assert_eq!(groups.choose(&[1; 3]), 1);
            groups.measured(&[1; 3], 1, Duration::from_millis(1));
        }
        assert_eq!(assign(&[1; 5], 2), [0, 1, 0, 1, 0]);
        assert_eq!(assign(&[64, 1, 1, 1], 2), [0, 1, 1, 1]);
        assert_eq!(assign(&[1, 2], 1), [0, 0]);
    }
}
