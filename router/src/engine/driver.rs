//! The loop of the engine, on a thread of its own while there are sequences.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_model::{ForwardError, Segment};
use rayon::prelude::*;
use tokio::runtime::Handle;

use super::draft::{StepMeasure, Verdict};
use super::experts::StepExperts;
use super::groups;
use super::memory::common;
use super::schedule;
use super::sequence::{Outcome, Sequence};
use super::{Engine, State, Step};
use crate::client::{Core, Place, Summary};
use crate::dispatch::Usage;
use crate::generate::GenerateError;

/// How long to wait when nobody reads.
const UNREAD_PAUSE: Duration = Duration::from_millis(2);
/// Positions for which there must be room when a sequence joins others, for it and for each of them.
const HEADROOM: usize = 64;

/// Which of the active sequences has ended, and how.
type End = (usize, Result<Summary, GenerateError>);

/// What a step gave one of the active sequences.
struct Taken {
    index: usize,
    outcome: Outcome,
    /// Tokens.
    came: usize,
    /// Whether it was decoding before.
    decodes: bool,
    verdict: Verdict,
}

pub(super) struct Driver {
    core: Arc<Core>,
    engine: Arc<Engine>,
    runtime: Handle,
    /// Those that advance, in the order of their arrival.
    active: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
}

/// The logits of each sequence of a pass, in order.
type Logits = Vec<Vec<f32>>;

/// A pass of each group, all at the same time; gives the logits of each, or the first error, and what all used.
fn in_groups<'a>(
    mut groups: Vec<Vec<Segment<'a>>>,
    pass: impl Fn(&mut [Segment<'a>]) -> (Result<Logits, ForwardError>, Usage) + Sync,
) -> (Result<Vec<Logits>, ForwardError>, Usage) {
    let pass = &pass;
    let outcomes: Vec<(Result<Logits, ForwardError>, Usage)> = std::thread::scope(|scope| {
        let (first, others) = groups.split_first_mut().map_or((None, &mut [][..]), |(a, b)| (Some(a), b));
        let others: Vec<_> = others.iter_mut().map(|group| scope.spawn(move || pass(group))).collect();
        let first = first.map(|group| pass(group));
        let joined =
            others.into_iter().map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        first.into_iter().chain(joined).collect()
    });
    let mut used = Usage::default();
    outcomes.iter().for_each(|(_, usage)| used.add(usage));
    (outcomes.into_iter().map(|(logits, _)| logits).collect(), used)
}

/// If the driver dies of a defect, its sequences end and the next request starts a new one.
struct OnPanic(Arc<Engine>);

impl Drop for OnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut state = self.0.state();
            let status = super::EngineStatus { running: 0, waiting: 0, kv_bytes: 0, ..state.status.clone() };
            *state = State { status, ..State::default() };
        }
    }
}

impl Driver {
    pub(super) fn new(core: Arc<Core>, engine: Arc<Engine>, runtime: Handle) -> Self {
        Self { core, engine, runtime, active: Vec::new(), waiting: VecDeque::new() }
    }

    pub(super) fn run(mut self) {
        let _guard = OnPanic(self.engine.clone());
        while self.take_arrivals() {
            self.drop_unwanted();
            self.make_room();
            self.admit();
            self.report();
            self.step();
        }
    }

    /// Takes what has arrived; `false` when there is nothing left to do, and then the next request starts another driver.
    fn take_arrivals(&mut self) -> bool {
        let mut state = self.engine.state();
        self.waiting.extend(state.arrived.drain(..));
        self.count(&mut state);
        state.is_driven = !(self.active.is_empty() && self.waiting.is_empty());
        state.is_driven
    }

    fn count(&self, state: &mut State) {
        state.status.running = self.active.len();
        state.status.waiting = self.waiting.len();
        state.status.kv_bytes = self.used(0);
    }

    fn report(&self) {
        self.count(&mut self.engine.state());
    }

    fn drop_unwanted(&mut self) {
        self.waiting.retain_mut(Sequence::is_wanted);
        for mut sequence in std::mem::take(&mut self.active) {
            match sequence.is_wanted() {
                true => self.active.push(sequence),
                false => self.keep(sequence),
            }
        }
    }

    /// Keeps the keys and values of a sequence that has ended.
    fn keep(&self, mut sequence: Sequence) {
        let cache = sequence.replace_cache(self.engine.new_cache(&self.core));
        self.engine.prefixes().keep(sequence.tokens(), cache);
    }

    /// Bytes that a sequence has or is about to have.
    fn bytes(sequence: &Sequence, ahead: usize) -> usize {
        let cache = sequence.cache();
        let own = cache.bytes().max((sequence.tokens().len() + ahead) * cache.bytes_per_position());
        own + sequence.draft_bytes()
    }

    fn used(&self, ahead: usize) -> usize {
        self.active.iter().map(|sequence| Self::bytes(sequence, ahead)).sum()
    }

    /// Gives up the keys and values of the latest sequences until the others have room.
    fn make_room(&mut self) {
        let limit = self.engine.config.kv_bytes;
        while self.active.len() > 1 && self.used(0) > limit {
            let Some(mut latest) = self.active.pop() else { break };
            latest.replace_cache(self.engine.new_cache(&self.core));
            latest.forget_drafts();
            self.waiting.push_front(latest);
            self.engine.state().status.preemptions += 1;
        }
        self.engine.prefixes().shrink_to(limit.saturating_sub(self.used(0)));
    }

    /// Lets those who wait join, in order, as far as there is room.
    fn admit(&mut self) {
        let (limit, most) = (self.engine.config.kv_bytes, self.engine.config.max_sequences.max(1));
        while self.active.len() < most
            && let Some(next) = self.waiting.front()
        {
            let room = self.active.is_empty() || self.used(HEADROOM) + Self::bytes(next, HEADROOM) <= limit;
            if !room || !self.reuse() {
                return;
            }
            self.active.extend(self.waiting.pop_front());
        }
    }

    /// Has the first one that waits go on from what others have computed already; `false` if one of them is about to compute more of
    /// the same, which is worth waiting for.
    fn reuse(&mut self) -> bool {
        let Some(next) = self.waiting.front_mut() else { return true };
        let longest = next.reusable();
        let alike = |other: &Sequence| common(other.tokens(), next.tokens()).min(longest);
        let best = self.active.iter().max_by_key(|other| alike(other).min(other.cache().len()));
        let have = best.map_or(0, |other| alike(other).min(other.cache().len()));
        let kept = self.engine.prefixes().find(next.tokens(), longest);
        let found = kept.as_ref().map_or(0, |cache| cache.len()).max(have);
        let coming = self.active.iter().filter(|other| other.is_read() && other.pending() > 1).map(alike).max();
        if coming.is_some_and(|coming| coming >= found + schedule::PREFILL_BESIDE) {
            return false;
        }
        let cache = match (kept, best) {
            (Some(kept), _) if kept.len() == found => Some(kept),
            (_, Some(other)) if have > 0 => Some(other.cache().prefix(have)),
            _ => None,
        };
        if let Some(cache) = cache {
            self.engine.state().status.reused_tokens += cache.len() as u64;
            next.replace_cache(cache);
        }
        true
    }

    /// One forward pass, and what comes of it.
    fn step(&mut self) {
        let (readable, unread): (Vec<_>, Vec<_>) = (0..self.active.len()).partition(|&i| self.active[i].is_read());
        if readable.is_empty() {
            if !unread.is_empty() {
                std::thread::sleep(UNREAD_PAUSE);
            }
            return;
        }
        let pending: Vec<usize> = readable.iter().map(|&i| self.active[i].pending_rows()).collect();
        let mut rows = vec![0; self.active.len()];
        readable.into_iter().zip(schedule::rows(&pending)).for_each(|(index, count)| rows[index] = count);
        let mut measure = self.draft(&mut rows);
        let began = Instant::now();
        match self.forward(&rows, None) {
            Ok(logits) => {
                measure.tokens = self.take(&rows, logits, Vec::new());
                measure.took = began.elapsed();
                self.engine.drafting().measured(measure);
                self.choose_resident();
            }
            Err(error) => self.one_by_one(rows, error),
        }
    }

    /// Now and then, has the experts that the gates chose most take the place of others that this client holds.
    fn choose_resident(&self) {
        let Place::Network(network) = &self.core.place else { return };
        let Some(resident) = &network.config.resident else { return };
        if resident.is_due(self.engine.state().status.steps) {
            let (network, resident) = (network.clone(), resident.clone());
            self.runtime.spawn_blocking(move || {
                if let Err(error) = resident.hold_most_chosen(|layer| network.calls(layer)) {
                    tracing::warn!(%error, "cannot load experts to hold: those that are held stay");
                }
            });
        }
    }

    /// Has tokens drafted for those that are decoding, and adds rows for what is to be verified.
    fn draft(&mut self, rows: &mut [usize]) -> StepMeasure {
        let engine = self.engine.clone();
        let parts = self.active.iter_mut().zip(&*rows).filter(|(sequence, rows)| **rows > 0 && sequence.is_decoding());
        let mut decoding: Vec<&mut Sequence> = parts.map(|(sequence, _)| sequence).collect();
        let sequences = decoding.len();
        let prompt_rows = rows.iter().sum::<usize>() - sequences;
        engine.drafting().draft(&self.core, &mut decoding, prompt_rows);
        let drafted: usize = decoding.iter().map(|sequence| sequence.drafted_rows()).sum();
        let parts = self.active.iter().zip(rows).filter(|(_, rows)| **rows > 0);
        parts.for_each(|(sequence, rows)| *rows += sequence.drafted_rows());
        StepMeasure { prompt_rows, rows: sequences + drafted, sequences, tokens: 0, took: Duration::ZERO }
    }

    /// A pass for all has failed, perhaps for experts that only some need: each has one of its own, and the experts have been waited
    /// for.
    fn one_by_one(&mut self, mut rows: Vec<usize>, error: ForwardError) {
        let drafted: usize = self.active.iter().map(Sequence::drafted_rows).sum();
        for (sequence, rows) in self.active.iter_mut().zip(&mut rows) {
            *rows -= sequence.drafted_rows();
            sequence.drop_draft();
        }
        if drafted > 0 {
            // Perhaps only a draft needed what is missing.
            self.engine.drafting().pause();
        } else if rows.iter().filter(|&&count| count > 0).count() == 1 {
            let failed = rows.iter().position(|&count| count > 0);
            return self.end(failed.map(|index| (index, Err(error.into()))).into_iter().collect());
        }
        let (mut fine, mut logits, mut failed) = (vec![0; rows.len()], Vec::new(), Vec::new());
        for index in (0..rows.len()).filter(|&index| rows[index] > 0) {
            let mut alone = vec![0; rows.len()];
            alone[index] = rows[index];
            match self.forward(&alone, Some(Duration::ZERO)) {
                Ok(mut own) => {
                    fine[index] = rows[index];
                    logits.append(&mut own);
                }
                Err(error) => failed.push((index, Err(error.into()))),
            }
        }
        self.take(&fine, logits, failed);
    }

    /// The logits of each sequence that has rows in this pass, in order.
    fn forward(&mut self, rows: &[usize], patience: Option<Duration>) -> Result<Logits, ForwardError> {
        let parts = self.active.iter_mut().zip(rows).filter(|(_, rows)| **rows > 0);
        let mut parts: Vec<(&mut Sequence, usize)> = parts.map(|(sequence, rows)| (sequence, *rows)).collect();
        let rows: Vec<usize> = parts.iter().map(|(_, rows)| *rows).collect();
        // Those that are tried alone have nobody to share a pass with, and in this process nobody is waited for.
        let in_network = matches!(self.core.place, Place::Network(_));
        let groups = if in_network && self.engine.config.groups { self.engine.groups().choose(&rows) } else { 1 };
        let began = Instant::now();
        let group = groups::assign(&rows, groups);
        let readers: Vec<_> = parts.iter().map(|(sequence, _)| sequence.steps().clone()).collect();
        let before: Vec<usize> = parts.iter().map(|(sequence, _)| sequence.cache().len()).collect();
        let mut segments: Vec<Vec<Segment<'_>>> = (0..groups).map(|_| Vec::new()).collect();
        for ((sequence, rows), &group) in parts.iter_mut().zip(&group) {
            segments[group].push(sequence.segment(*rows));
        }
        let (core, runtime) = (&self.core, &self.runtime);
        let (logits, used) = in_groups(segments, |segments| {
            let (place, readers) = (&core.place, readers.clone());
            let mut experts = StepExperts { place, runtime, readers, patience, usage: Usage::default() };
            let logits = core.trunk.forward(segments, &mut experts);
            (logits, experts.usage)
        });
        if logits.is_err() {
            // One of two groups may have got through.
            parts.iter_mut().zip(before).for_each(|((sequence, _), before)| sequence.truncate(before));
        }
        parts.iter_mut().for_each(|(sequence, _)| sequence.used(&used));
        let mut state = self.engine.state();
        state.status.steps += 1;
        state.status.grouped_steps += u64::from(groups > 1);
        state.status.network.add(&used.counts);
        drop(state);
        let mut logits = logits?;
        self.engine.groups().measured(&rows, groups, began.elapsed());
        logits.iter_mut().for_each(|of_group| of_group.reverse());
        Ok(group.into_iter().filter_map(|group| logits[group].pop()).collect())
    }

    /// Draws the tokens of those that have rows in this pass, and ends those that have come to their end or have `failed`. Gives the
    /// number of tokens that went to those that were decoding.
    fn take(&mut self, rows: &[usize], logits: Logits, mut failed: Vec<End>) -> usize {
        let core = self.core.clone();
        let (vocab, defaults) = (core.trunk.spec().vocab_size, &core.defaults);
        let parts = self.active.iter_mut().enumerate().zip(rows).filter(|(_, rows)| **rows > 0);
        let parts: Vec<_> = parts.map(|(part, _)| part).zip(logits).collect();
        let take = |((index, sequence), logits): ((usize, &mut Sequence), Vec<f32>)| {
            let (before, decodes) = (sequence.tokens().len(), sequence.was_decoding());
            let outcome = sequence.take(&logits, vocab, defaults);
            let came = sequence.tokens().len() - before;
            Taken { index, outcome, came, decodes, verdict: sequence.judge(came) }
        };
        // Drawing from a large vocabulary takes long enough to share it out.
        let taken: Vec<Taken> = if parts.len() == 1 {
            parts.into_iter().map(take).collect()
        } else {
            self.core.pool.install(|| parts.into_par_iter().map(take).collect())
        };
        let mut drafting = self.engine.drafting();
        for Taken { index, verdict, .. } in &taken {
            drafting.learn(verdict, self.active[*index].memory_mut());
        }
        drop(drafting);
        let mut state = self.engine.state();
        for Taken { came, verdict, .. } in &taken {
            state.status.tokens += *came as u64;
            state.status.drafted += verdict.verified as u64;
            state.status.accepted += verdict.accepted as u64;
        }
        drop(state);
        let tokens = taken.iter().filter(|taken| taken.decodes).map(|taken| taken.came).sum();
        let ended = taken.into_iter().filter_map(|taken| match taken.outcome {
            Outcome::GoesOn => None,
            Outcome::Ended(end) => Some((taken.index, *end)),
        });
        failed.extend(ended);
        self.end(failed);
        tokens
    }

    /// Tells the ends of some sequences and takes them out.
    fn end(&mut self, mut ended: Vec<End>) {
        // From behind, so that the other indices stay true.
        ended.sort_unstable_by_key(|(index, _)| std::cmp::Reverse(*index));
        let ended: Vec<_> = ended.into_iter().map(|(index, end)| (self.active.remove(index), end)).collect();
        // Before they are told, so that whoever asks again at once finds room.
        self.report();
        for (sequence, end) in ended {
            // There is room, or it would not have had this step; perhaps nobody listens any more.
            let _ = sequence.steps().try_send(Step::End(end));
            self.keep(sequence);
        }
    }
}
