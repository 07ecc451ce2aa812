//! Drafts: tokens that something cheap thinks will come next, verified together in one pass.
//!
//! A pass over several tokens costs the same round trips as one over a single token. A sequence that is decoding sends its last token
//! and some drafted ones; then its own sampler draws from the true logits of one row after the other, as it would have without drafts,
//! and goes on as long as what it draws is what was drafted. The positions of the other rows are forgotten.
//!
//! This is stricter than rejection sampling (Leviathan et al., arXiv:2211.17192), which accepts a drafted token with probability
//! `min(1, p/q)` and so gives *other* tokens of the same distribution. Here the random numbers are those of plain decoding and are used
//! for the same draws in the same order, so with the same seed the tokens are the same, whatever is drafted. What it costs is acceptance where
//! a draft is drawn with random numbers of its own; a drafter that has logits therefore draws with a copy of the sequence's sampler, and
//! the same random number chooses among two similar distributions.
//!
//! Inside: `lookup`, `model` and `head` draft, `window` decides how much of it is verified.

mod head;
mod lookup;
mod model;
#[cfg(test)]
mod tests;
mod window;

use std::time::{Duration, Instant};

use hanse_model::{KvCache, Sampler};

use super::sequence::Sequence;
use crate::client::Core;
pub(crate) use head::HeadDrafter;
use lookup::{Index, Lookup};
use model::ModelCache;
pub(crate) use model::{DraftModel, ModelDrafter};
use window::{CLASSES, Ledger, Rates, StepTimes, choose, outlook};

/// Drafted tokens of a sequence that are verified at most in one pass.
pub(super) const MOST: usize = 32;
/// The same of all sequences together.
const MOST_ROWS: usize = 256;
/// The same until it is known what a row costs.
const FIRST_ROWS: usize = 2;
/// Steps without drafts after a pass with drafts has failed: perhaps only a draft needed the experts that nobody hosts.
const PAUSE: u32 = 64;
/// What looking whether a drafter has become better may cost, as a share of a step.
const PROBING: f64 = 0.01;
/// Steps between two looks, at least.
const PROBE_EVERY: f64 = 8.0;
/// How many of the latest tokens of each class a drafter is judged by, over all sequences and in one.
const SEEN: f64 = 64.0;
const SEEN_IN_ONE: f64 = 24.0;

/// How likely a token is right whose class is not known, before anything is known.
const FIRST_MEAN: f64 = 0.5;

/// Proposes tokens. Nothing it says reaches a result: what is wrong costs time.
pub(crate) trait Drafter: Send + std::fmt::Debug {
    /// Whether a proposal takes no time worth counting.
    fn is_free(&self) -> bool;

    /// Whether it reads the last hidden states of a sequence's positions, which caches then keep.
    fn reads_hidden(&self) -> bool {
        false
    }

    /// How likely a token of each class is right before anything is known.
    fn guesses(&self) -> [f64; CLASSES];

    /// Adds tokens to each sequence's empty draft, up to as many as asked for, or none. Every cache is afterwards as it was. Gives the
    /// part of its time that is a price of prompts and not of drafts.
    fn propose(&mut self, core: &Core, asked: &mut [Asked<'_>], worth: &Worth<'_>) -> Duration;
}

/// A sequence of which the next tokens are wanted.
pub(crate) struct Asked<'a> {
    /// Its tokens so far.
    pub(super) tokens: &'a [u32],
    /// Keys and values of all of them but the last.
    pub(super) cache: &'a mut KvCache,
    /// How its tokens are drawn.
    pub(super) sampler: &'a Sampler,
    pub(super) memory: &'a mut Memory,
    pub(super) draft: &'a mut Draft,
    /// Tokens wanted at most.
    pub(super) most: usize,
}

/// Tokens that may come next, each with how sure its drafter was of it.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub(super) tokens: Vec<u32>,
    pub(super) classes: Vec<u8>,
    drafter: usize,
    /// How many of them are verified.
    pub(super) verified: usize,
}

impl Draft {
    pub(super) fn push(&mut self, token: u32, class: u8) {
        self.tokens.push(token);
        self.classes.push(class);
    }

    /// Ends it before a token that the model does not know: it would fail the pass.
    fn cut_to(&mut self, vocab: usize) {
        let known = self.tokens.iter().take_while(|token| (**token as usize) < vocab).count();
        self.tokens.truncate(known);
        self.classes.truncate(known);
    }
}

/// What drafters keep of a sequence from step to step.
#[derive(Debug, Default)]
pub(super) struct Memory {
    index: Index,
    /// How often each drafter was right about this sequence.
    rates: Vec<Rates>,
    /// Keys and values of a draft model.
    model: Option<ModelCache>,
    /// Keys and values of the model's own head for drafts, one position less than the model has.
    head: Option<KvCache>,
}

impl Memory {
    /// Bytes of keys and values.
    pub(super) fn bytes(&self) -> usize {
        self.model.as_ref().map_or(0, ModelCache::bytes) + self.head.as_ref().map_or(0, KvCache::bytes)
    }

    /// Gives up keys and values, which are computed again if they are wanted.
    pub(super) fn forget(&mut self) {
        (self.model, self.head) = (None, None);
    }
}

/// Whether it pays to draft on.
pub(crate) struct Worth<'a> {
    drafter: usize,
    rates: &'a Rates,
    guesses: [f64; CLASSES],
    /// A token is worth drafting if it is right with this probability.
    threshold: f64,
}

impl Worth<'_> {
    /// How likely a token of this class is right.
    fn chance(&self, memory: &Memory, class: u8) -> f64 {
        let guess = self.guesses.get(usize::from(class)).copied().unwrap_or_default();
        let guess = self.rates.of(class, guess);
        memory.rates.get(self.drafter).map_or(guess, |own| own.of(class, guess))
    }

    /// Whether one more token is worth it where all before it are right with probability `survival`.
    fn goes_on(&self, survival: f64) -> bool {
        survival * self.rates.mean(FIRST_MEAN) >= self.threshold
    }

    /// For each token the chance that it and all before it are right.
    fn survivals(&self, memory: &Memory, draft: &Draft) -> Vec<f64> {
        let falling = |survival: &mut f64, &class: &u8| {
            *survival *= self.chance(memory, class);
            Some(*survival)
        };
        draft.classes.iter().scan(1.0, falling).collect()
    }
}

/// What became of a draft.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    drafter: usize,
    /// Classes of the tokens of which it is known whether they were right.
    trials: Vec<(u8, bool)>,
    pub(super) verified: usize,
    pub(super) accepted: usize,
}

impl Verdict {
    /// Compares a draft with the tokens that came; the first one that was not verified is known too.
    pub(super) fn of(draft: &Draft, came: &[u32]) -> Self {
        let pairs = draft.tokens.iter().zip(&draft.classes).zip(came);
        let trials: Vec<(u8, bool)> = pairs.map(|((token, class), came)| (*class, token == came)).collect();
        let accepted = trials.iter().take(draft.verified).take_while(|(_, right)| *right).count();
        Self { drafter: draft.drafter, trials, verified: draft.verified, accepted }
    }
}

/// What a step was: for learning what steps and drafts cost.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepMeasure {
    /// Rows of prompts.
    pub(super) prompt_rows: usize,
    /// All other rows, drafted ones included.
    pub(super) rows: usize,
    /// Sequences that were decoding.
    pub(super) sequences: usize,
    /// Tokens that they got.
    pub(super) tokens: usize,
    pub(super) took: Duration,
}

#[derive(Debug)]
struct Judged {
    drafter: Box<dyn Drafter>,
    rates: Rates,
    /// Seconds for each drafted token; unknown before the first.
    cost: Option<f64>,
    /// Steps since it was asked.
    unasked: f64,
}

/// All drafters, and what is known of them.
#[derive(Debug, Default)]
pub(super) struct Drafting {
    drafters: Vec<Judged>,
    times: StepTimes,
    ledger: Ledger,
    paused: u32,
    /// What the drafts of the step in progress took, without what drafters read of prompts.
    drafted_for: Duration,
}

impl Drafting {
    /// Drafts from the text itself.
    pub(super) fn lookup() -> Self {
        let mut this = Self::default();
        this.add(Box::new(Lookup));
        this
    }

    /// Adds a drafter. Those that are free come first.
    pub(super) fn add(&mut self, drafter: Box<dyn Drafter>) {
        self.drafters.push(Judged { drafter, rates: Rates::new(SEEN), cost: None, unasked: f64::INFINITY });
    }

    /// Whether any drafter reads the last hidden states of positions.
    pub(super) fn reads_hidden(&self) -> bool {
        self.drafters.iter().any(|judged| judged.drafter.reads_hidden())
    }

    /// Gives each of `sequences`, which are decoding, a draft, and says how much of it is verified, in a step in which
    /// `prompt_rows` rows of prompts take part.
    pub(super) fn draft(&mut self, core: &Core, sequences: &mut [&mut Sequence], prompt_rows: usize) {
        self.drafted_for = Duration::ZERO;
        self.paused = self.paused.saturating_sub(1);
        if sequences.is_empty() || self.drafters.is_empty() || self.paused > 0 || !self.times.is_known() {
            return;
        }
        let started = Instant::now();
        let (base, row) = (self.times.of((sequences.len() + prompt_rows) as f64), self.times.row());
        let read: Duration = (0..self.drafters.len()).map(|number| self.ask(number, core, sequences, base, row)).sum();
        self.drafted_for = started.elapsed().saturating_sub(read);
        let survivals: Vec<Vec<f64>> = sequences.iter_mut().map(|sequence| self.survivals(sequence)).collect();
        let allowed = self.ledger.allows(base) - self.drafted_for.as_secs_f64();
        // A float beyond the range becomes the end of it.
        let allowed = if row > 0.0 { (allowed / row) as usize } else { MOST_ROWS };
        let most = if self.times.has_compared() { MOST_ROWS } else { FIRST_ROWS * sequences.len() };
        let chosen = choose(base, row, sequences.len(), &survivals, most.min(allowed).min(MOST_ROWS));
        sequences.iter_mut().zip(chosen).for_each(|(sequence, rows)| sequence.draft_mut().verified = rows);
    }

    /// Has one drafter draft for those sequences for which it is likely better than what there is. Gives the time that it took
    /// for prompts.
    fn ask(&mut self, number: usize, core: &Core, sequences: &mut [&mut Sequence], base: f64, row: f64) -> Duration {
        let expected: Vec<f64> = sequences.iter_mut().map(|sequence| self.survivals(sequence).iter().sum()).collect();
        let Some(judged) = self.drafters.get_mut(number) else { return Duration::ZERO };
        let guesses = judged.drafter.guesses();
        let right = judged.rates.mean(FIRST_MEAN);
        let cost = judged.cost.unwrap_or(0.0);
        let (mut best, mut most) = if judged.drafter.is_free() {
            (0.0, MOST)
        } else if self.ledger.allows(base) < cost {
            // It has lost too much lately.
            return Duration::ZERO;
        } else {
            outlook(base, row, cost, sequences.len(), right, MOST)
        };
        judged.unasked += 1.0;
        if judged.cost.is_none() && !judged.drafter.is_free() {
            most = most.min(FIRST_ROWS);
        }
        if most == 0 {
            let every = (cost * sequences.len() as f64 / (PROBING * base)).max(PROBE_EVERY);
            if judged.unasked < every {
                return Duration::ZERO;
            }
            // One token shows whether it has become better: it is compared with what comes, verified or not.
            (best, most) = (0.0, 1);
        }
        let hoped: f64 = (1..=most as i32).map(|i| right.powi(i)).sum();
        let worth = Worth { drafter: number, rates: &judged.rates, guesses, threshold: best * (row + cost) };
        let mut drafts: Vec<(usize, Draft)> = Vec::new();
        let mut parts = Vec::new();
        for (index, (sequence, expected)) in sequences.iter_mut().zip(&expected).enumerate() {
            let room = most.min(sequence.draft_room());
            if room > 0 && (judged.drafter.is_free() || hoped > *expected) {
                drafts.push((index, Draft { drafter: number, ..Draft::default() }));
                parts.push((sequence, room));
            }
        }
        if drafts.is_empty() {
            return Duration::ZERO;
        }
        judged.unasked = 0.0;
        let started = Instant::now();
        let pairs = parts.into_iter().zip(&mut drafts);
        let mut asked: Vec<Asked<'_>> =
            pairs.map(|((sequence, room), (_, draft))| sequence.asked(draft, room)).collect();
        let read = judged.drafter.propose(core, &mut asked, &worth);
        drop(asked);
        let tokens: usize = drafts.iter().map(|(_, draft)| draft.tokens.len()).sum();
        if tokens > 0 && !judged.drafter.is_free() {
            let newest = started.elapsed().saturating_sub(read).as_secs_f64() / tokens as f64;
            judged.cost = Some(judged.cost.map_or(newest, |cost| cost + (newest - cost) / 8.0));
        }
        let vocab = core.trunk.spec().vocab_size;
        for (index, mut draft) in drafts {
            draft.cut_to(vocab);
            let Some(sequence) = sequences.get_mut(index) else { continue };
            let better: f64 = self.chances(sequence, &draft).iter().sum();
            if better > expected[index] {
                *sequence.draft_mut() = draft;
            }
        }
        read
    }

    /// For each token of a sequence's draft the chance that it and all before it are right.
    fn survivals(&self, sequence: &mut Sequence) -> Vec<f64> {
        let draft = std::mem::take(sequence.draft_mut());
        let survivals = self.chances(sequence, &draft);
        *sequence.draft_mut() = draft;
        survivals
    }

    fn chances(&self, sequence: &mut Sequence, draft: &Draft) -> Vec<f64> {
        let Some(judged) = self.drafters.get(draft.drafter) else { return Vec::new() };
        let worth =
            Worth { drafter: draft.drafter, rates: &judged.rates, guesses: judged.drafter.guesses(), threshold: 0.0 };
        worth.survivals(sequence.memory_mut(), draft)
    }

    /// Learns from what became of a sequence's draft.
    pub(super) fn learn(&mut self, verdict: &Verdict, memory: &mut Memory) {
        if memory.rates.len() < self.drafters.len() {
            memory.rates.resize_with(self.drafters.len(), || Rates::new(SEEN_IN_ONE));
        }
        let Some(judged) = self.drafters.get_mut(verdict.drafter) else { return };
        for &(class, right) in &verdict.trials {
            judged.rates.add(class, right);
            memory.rates[verdict.drafter].add(class, right);
        }
    }

    /// Learns what a step took.
    pub(super) fn measured(&mut self, step: StepMeasure) {
        let seconds = step.took.as_secs_f64();
        let is_drafted = step.rows > step.sequences;
        if step.sequences > 0 && self.times.is_known() {
            let base = self.times.of((step.sequences + step.prompt_rows) as f64);
            let plain = if is_drafted { base * step.tokens as f64 / step.sequences as f64 } else { seconds };
            self.ledger.add(seconds + self.drafted_for.as_secs_f64(), plain, base);
        }
        match step.prompt_rows {
            0 => self.times.add(step.rows, seconds),
            _ => self.times.add_prompt(step.rows + step.prompt_rows, seconds),
        }
    }

    /// Drafts nothing for a while, since a pass with drafts has failed.
    pub(super) fn pause(&mut self) {
        self.paused = PAUSE;
    }
}
