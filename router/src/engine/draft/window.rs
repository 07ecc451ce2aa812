//! How many drafted tokens a step verifies: what steps take, what drafts are worth, and what may be lost by trying. Pure; times are
//! in seconds.

/// Weight of the newest step in what steps take.
const NEWEST: f64 = 1.0 / 32.0;
/// A step that takes so many times what was expected counts as so much: one that hung says nothing of others.
const OUTLIER: f64 = 4.0;
/// How much a row's expected cost weighs beside the measured ones, as a variance of rows.
const EXPECTED_ROW: f64 = 0.02;
/// The most that a row is expected to cost before it was measured, as a share of a step.
const DEAREST_GUESS: f64 = 0.25;
/// Steps after which what was lost and spent counts a third.
const MEMORY: f64 = 512.0;
/// The most that trying may cost, as a share of the time that decoding takes.
const LOSS: f64 = 0.03;
/// What may be lost before anything was gained, in steps.
const FIRST_LOSS: f64 = 0.5;
/// What was gained lately and may be lost again, in steps.
const BANK: f64 = 4.0;

/// What a step takes by its rows: a round trip per layer, and something for each row. A line through the latest steps.
#[derive(Debug, Clone, Default)]
pub(super) struct StepTimes {
    steps: u64,
    rows: f64,
    seconds: f64,
    /// Variance of the rows, and covariance of rows and seconds.
    variance: f64,
    covariance: f64,
    /// What a row costs, as far as prompts show.
    expected_row: f64,
}

impl StepTimes {
    /// Notes a step without rows of prompts.
    pub(super) fn add(&mut self, rows: usize, seconds: f64) {
        let rows = rows as f64;
        let seconds = if self.steps < 4 { seconds } else { seconds.min(OUTLIER * self.of(rows)) };
        self.steps += 1;
        let newest = NEWEST.max(1.0 / self.steps as f64);
        let (more_rows, longer) = (rows - self.rows, seconds - self.seconds);
        self.rows += newest * more_rows;
        self.seconds += newest * longer;
        self.variance = (1.0 - newest) * (self.variance + newest * more_rows * more_rows);
        self.covariance = (1.0 - newest) * (self.covariance + newest * more_rows * longer);
    }

    /// Notes a step of many rows, most of them a prompt's: each costs less than one of a few, so this is a first guess only.
    pub(super) fn add_prompt(&mut self, rows: usize, seconds: f64) {
        if rows > 1 {
            let first = if self.steps == 0 { 0.0 } else { self.of(1.0) };
            self.expected_row = ((seconds - first) / (rows as f64 - 1.0)).max(0.0);
        }
    }

    /// Whether steps were measured.
    pub(super) fn is_known(&self) -> bool {
        self.steps > 0
    }

    /// Whether steps with different numbers of rows were measured lately.
    pub(super) fn has_compared(&self) -> bool {
        self.variance > EXPECTED_ROW
    }

    /// What one row more costs.
    pub(super) fn row(&self) -> f64 {
        // If the guess is far too high nothing would ever be measured that could show it.
        let expected = self.expected_row.min(DEAREST_GUESS * self.seconds);
        ((self.covariance + EXPECTED_ROW * expected) / (self.variance + EXPECTED_ROW)).max(0.0)
    }

    /// What a step with so many rows takes; something even if nothing was measured.
    pub(super) fn of(&self, rows: f64) -> f64 {
        (self.seconds + self.row() * (rows - self.rows)).max(1e-6)
    }
}

/// Kinds of drafted tokens that a drafter tells apart by how sure it is, from 0.
pub(super) const CLASSES: usize = 8;

/// How often drafted tokens were right, by class, counting the latest most.
#[derive(Debug, Clone)]
pub(super) struct Rates {
    classes: [(f64, f64); CLASSES],
    kept: f64,
}

impl Rates {
    /// Counts about the latest `memory` tokens of each class.
    pub(super) fn new(memory: f64) -> Self {
        Self { classes: [(0.0, 0.0); CLASSES], kept: 1.0 - 1.0 / memory }
    }

    /// Notes whether a token was right.
    pub(super) fn add(&mut self, class: u8, right: bool) {
        if let Some((hits, trials)) = self.classes.get_mut(usize::from(class)) {
            *hits = *hits * self.kept + f64::from(u8::from(right));
            *trials = *trials * self.kept + 1.0;
        }
    }

    /// How likely a token of a class is right, where `guess` was thought before.
    pub(super) fn of(&self, class: u8, guess: f64) -> f64 {
        const GUESSED: f64 = 3.0;
        let (hits, trials) = self.classes.get(usize::from(class)).copied().unwrap_or_default();
        (hits + GUESSED * guess) / (trials + GUESSED)
    }

    /// The same for a token whose class is not known yet.
    pub(super) fn mean(&self, guess: f64) -> f64 {
        const GUESSED: f64 = 3.0;
        let sum = |part: fn(&(f64, f64)) -> f64| self.classes.iter().map(part).sum::<f64>();
        (sum(|class| class.0) + GUESSED * guess) / (sum(|class| class.1) + GUESSED)
    }
}

/// What drafts have cost and gained: decoding with them never becomes much slower than without.
#[derive(Debug, Clone, Default)]
pub(super) struct Ledger {
    spent: f64,
    lost: f64,
}

impl Ledger {
    /// Notes a step that took `seconds`, in which decoding without drafts would have taken `plain` for the same tokens.
    pub(super) fn add(&mut self, seconds: f64, plain: f64, step: f64) {
        let kept = 1.0 - 1.0 / MEMORY;
        self.spent = self.spent * kept + seconds;
        self.lost = (self.lost * kept + seconds - plain).max(-BANK * step);
    }

    /// What may be lost now, if a step takes `step`.
    pub(super) fn allows(&self, step: f64) -> f64 {
        (LOSS * self.spent + FIRST_LOSS * step - self.lost).max(0.0)
    }
}

/// How many of the drafted tokens to verify of each sequence, so that most tokens per second are expected.
///
/// `survivals` are, for each sequence, the chances that a drafted token and all before it are right: they fall. A step without drafts
/// takes `base` seconds and gives `tokens`; each drafted row takes `row` more. At most `most_rows` are taken.
pub(super) fn choose(base: f64, row: f64, tokens: usize, survivals: &[Vec<f64>], most_rows: usize) -> Vec<usize> {
    let mut chosen = vec![0; survivals.len()];
    let parts = survivals.iter().enumerate();
    let mut rows: Vec<(f64, usize)> =
        parts.flat_map(|(index, chances)| chances.iter().map(move |&chance| (chance, index))).collect();
    // The likeliest first: what is best by itself is best together, since all rows cost the same.
    rows.sort_by(|a, b| b.0.total_cmp(&a.0));
    let (mut expected, mut seconds) = (tokens as f64, base);
    for (chance, index) in rows.into_iter().take(most_rows) {
        if chance * seconds <= row * expected {
            break;
        }
        expected += chance;
        seconds += row;
        chosen[index] += 1;
    }
    chosen
}

/// The best rate, in tokens per second, of a drafter that needs `draft` seconds for each token, and how many it should draft of each of
/// `sequences` at most `most`, if each is right with probability `right`.
pub(super) fn outlook(base: f64, row: f64, draft: f64, sequences: usize, right: f64, most: usize) -> (f64, usize) {
    let count = sequences as f64;
    let rate = |drafted: usize| {
        let tokens: f64 = (0..=drafted).map(|i| right.powi(i as i32)).sum();
        count * tokens / (base + count * drafted as f64 * (row + draft))
    };
    (0..=most)
        .map(|drafted| (rate(drafted), drafted))
        .fold((0.0, 0), |best, next| if next.0 > best.0 { next } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_through_the_steps_tells_round_trips_from_rows() {
        let mut times = StepTimes::default();
        assert!(!times.is_known());
        for step in 0..200 {
            let rows = 1 + step % 5;
            let noise = [0.001, -0.001][step % 2];
            times.add(rows, 0.48 + 0.002 * rows as f64 + noise);
        }
        assert!((times.row() - 0.002).abs() < 0.0006, "{}", times.row());
        assert!((times.of(1.0) - 0.482).abs() < 0.003);
        times.add(1, 30.0);
        assert!(times.of(1.0) < 0.6, "one that hung says nothing of others");
        for step in 0..200 {
            times.add(1 + step % 3, 0.02);
        }
        assert!((times.of(2.0) - 0.02).abs() < 0.005, "the network has become faster: {}", times.of(2.0));
    }

    #[test]
    fn before_steps_differ_a_prompt_says_what_a_row_costs() {
        let mut times = StepTimes::default();
        times.add(1, 0.01);
        assert_eq!(times.row(), 0.0);
        times.add_prompt(101, 99.0);
        assert!(times.row() < 0.003, "a prompt that hung keeps nobody from trying");
        times.add_prompt(101, 0.21);
        (0..10).for_each(|_| times.add(1, 0.01));
        assert!((times.row() - 0.002).abs() < 1e-9 && !times.has_compared());
        (0..10).for_each(|_| times.add(3, 0.03));
        assert!((times.row() - 0.01).abs() < 1e-3, "what was measured counts more: {}", times.row());
    }

    #[test]
    fn a_rate_follows_what_happens_and_begins_with_a_guess() {
        let mut rates = Rates::new(32.0);
        assert!((rates.of(3, 0.4) - 0.4).abs() < 1e-9);
        (0..200).for_each(|_| rates.add(3, true));
        assert!(rates.of(3, 0.4) > 0.9 && rates.of(2, 0.4) < 0.41 && rates.mean(0.0) > 0.9);
        (0..60).for_each(|_| rates.add(3, false));
        assert!(rates.of(3, 0.4) < 0.25, "{}", rates.of(3, 0.4));
        rates.add(200, true);
    }

    #[test]
    fn rows_are_verified_where_they_bring_more_than_they_cost() {
        let falling = |right: f64| (1..=16).map(|i| right.powi(i)).collect::<Vec<f64>>();
        // A far network: rows cost next to nothing.
        assert_eq!(choose(0.5, 0.0005, 1, &[falling(0.95)], 99), [16]);
        let prose = choose(0.5, 0.0005, 1, &[falling(0.5)], 99)[0];
        assert!((5..=9).contains(&prose), "{prose}");
        // Experts here: a row costs half a step.
        assert_eq!(choose(0.001, 0.0005, 1, &[falling(0.3)], 99), [0]);
        assert!(choose(0.001, 0.0005, 1, &[falling(0.95)], 99)[0] >= 4);
        // Where rows cost as much as they can bring, nothing is drafted.
        assert_eq!(choose(0.001, 0.001, 1, &[falling(0.99)], 99), [0]);
        assert_eq!(choose(0.5, 0.0005, 1, &[falling(0.95)], 3), [3]);
        assert_eq!(choose(0.5, 0.0, 1, &[], 3), [0; 0]);
    }

    #[test]
    fn a_crowd_shrinks_the_window_and_the_surest_drafts_come_first() {
        let falling = |right: f64| (1..=16).map(|i| right.powi(i)).collect::<Vec<f64>>();
        let of = |sequences: usize| {
            let base = 0.1 + 0.01 * sequences as f64;
            let drafts = vec![falling(0.6); sequences];
            choose(base, 0.01, sequences, &drafts, 9999).iter().sum::<usize>() as f64 / sequences as f64
        };
        let windows = [1, 4, 16, 64].map(of);
        assert!(windows.is_sorted_by(|a, b| a >= b) && windows[0] >= 2.0 && windows[3] <= 1.0, "{windows:?}");
        let chosen = choose(0.1, 0.03, 2, &[falling(0.2), falling(0.9)], 99);
        assert!(chosen[0] == 0 && chosen[1] > 1, "{chosen:?}");
    }

    #[test]
    fn what_is_chosen_is_the_best_of_all_windows() {
        for (base, row, right) in [(0.5, 0.01, 0.7), (0.02, 0.002, 0.8), (0.01, 0.004, 0.6), (0.3, 0.1, 0.4)] {
            let chances: Vec<f64> = (1..=16).map(|i: i32| f64::powi(right, i)).collect();
            let rate = |rows: usize| (1.0 + chances[..rows].iter().sum::<f64>()) / (base + row * rows as f64);
            let chosen = choose(base, row, 1, std::slice::from_ref(&chances), 99)[0];
            let best = (0..=16).map(rate).fold(0.0, f64::max);
            assert!((rate(chosen) - best).abs() < 1e-9, "{base} {row} {right}: {chosen}");
            let (outlook, drafted) = outlook(base, row, 0.0, 1, right, 16);
            assert!((outlook - best).abs() < 1e-9 && drafted == chosen);
        }
    }

    #[test]
    fn drafts_that_are_always_wrong_cost_no_more_than_a_twentieth() {
        // Every draft costs half a step, and is made whenever the ledger lets it.
        for steps in [60, 1000, 10_000] {
            let mut ledger = Ledger::default();
            let (mut spent, step) = (0.0, 1.0);
            for _ in 0..steps {
                let tries = ledger.allows(step) >= 0.5;
                let seconds = if tries { 1.5 } else { 1.0 };
                spent += seconds;
                ledger.add(seconds, step, step);
            }
            assert!(spent <= 1.05 * f64::from(steps), "{spent} instead of {steps}");
            assert!(spent > f64::from(steps), "it is tried");
        }
    }

    #[test]
    fn what_was_gained_long_ago_is_not_lost_again() {
        let mut ledger = Ledger::default();
        (0..1000).for_each(|_| ledger.add(1.0, 5.0, 1.0));
        let mut lost = 0.0;
        while ledger.allows(1.0) >= 0.5 && lost < 100.0 {
            ledger.add(1.5, 1.0, 1.0);
            lost += 0.5;
        }
        assert!(lost < 25.0, "{lost} steps");
    }
}
