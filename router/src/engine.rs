//! The decoding engine: all sequences of a client advance together, one frame per peer and layer for all of them.
//!
//! A step is one forward pass with a row for each sequence that is decoding, and rows for what was drafted for it, and beside them as many rows of prompts as do not hold
//! those up. Sequences join and leave between steps. Since a row's bits do not depend on the other rows, nor on how a prompt is cut,
//! a sequence gets the same tokens alone and in a crowd, and two things are free of consequences: going on from the keys and values of
//! another sequence that began alike, and giving up a sequence's keys and values when memory is short, to compute them again later.
//!
//! Inside: `sequence` is one request, `schedule` decides who gets how many rows, `memory` keeps beginnings, `driver` is the loop,
//! `experts` what a step calls, `draft` what may come next, `groups` whether a step's sequences advance in two groups.

mod draft;
mod driver;
mod experts;
mod groups;
mod memory;
mod schedule;
mod sequence;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hanse_model::KvCache;
use tokio::sync::mpsc;

use crate::client::{Core, Progress, Summary};
use crate::generate::{GenerateError, GenerateRequest, ScoredToken, Token};
use crate::stats::NetworkUse;
use draft::Drafting;
pub(crate) use draft::{DraftModel, Drafter, HeadDrafter, ModelDrafter};
use driver::Driver;
use groups::Groups;
use memory::Prefixes;
use sequence::Sequence;

/// Messages that may wait for a slow reader before its sequence waits too.
const STEP_QUEUE: usize = 64;

/// What the engine may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Bytes for keys and values of all sequences together, those kept for later included. Bounds the context too. Up to an eighth
    /// more may be in use.
    pub kv_bytes: usize,
    /// Sequences that advance together.
    pub max_sequences: usize,
    /// Requests that may wait to be among them; more are refused. While memory is short, more wait and fewer advance.
    pub max_waiting: usize,
    /// Whether tokens are drafted, and verified several in a pass, where that is faster. No token and no probability changes.
    pub drafts: bool,
    /// Whether sequences advance in two groups where that is faster: while one waits for peers the other computes.
    pub groups: bool,
}

impl Default for EngineConfig {
    /// 4 GiB, 256 sequences, 1024 waiting, with drafts and groups.
    fn default() -> Self {
        Self { kv_bytes: 4 << 30, max_sequences: 256, max_waiting: 1024, drafts: true, groups: true }
    }
}

impl EngineConfig {
    /// The most requests that it has at a time.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.max_sequences.max(1).saturating_add(self.max_waiting)
    }
}

/// What the engine is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct EngineStatus {
    /// Sequences that advance together.
    pub running: usize,
    /// Requests that wait to be among them.
    pub waiting: usize,
    /// Bytes of keys and values in use.
    pub kv_bytes: usize,
    /// Tokens generated since the start.
    pub tokens: u64,
    /// Tokens of prompts since the start, computed or not.
    pub prompt_tokens: u64,
    /// Of which were not computed, because another sequence had begun alike.
    pub reused_tokens: u64,
    /// Forward passes since the start.
    pub steps: u64,
    /// Of which were made in two groups, one computing while the other waited for peers.
    pub grouped_steps: u64,
    /// How often a sequence's keys and values were given up for lack of memory.
    pub preemptions: u64,
    /// Drafted tokens that were verified since the start.
    pub drafted: u64,
    /// Of which came.
    pub accepted: u64,
    /// What all forward passes cost on the network; `peers` is not counted.
    pub network: NetworkUse,
}

/// What a sequence tells its reader.
#[derive(Debug)]
pub(crate) enum Step {
    Prompt(Vec<ScoredToken>),
    Token(Token, Progress),
    End(Result<Summary, GenerateError>),
}

/// Takes requests, and runs as long as there are any.
#[derive(Debug)]
pub(crate) struct Engine {
    config: EngineConfig,
    state: Mutex<State>,
    prefixes: Mutex<Prefixes>,
    drafting: Mutex<Drafting>,
    /// Whether drafters read the last hidden states of positions.
    keeps_hidden: bool,
    groups: Mutex<Groups>,
}

#[derive(Debug, Default)]
struct State {
    arrived: Vec<Sequence>,
    /// Whether a driver runs, which takes what arrives.
    is_driven: bool,
    status: EngineStatus,
}

impl Engine {
    /// An engine that drafts, if `config` says so, from the text and with `drafters`.
    pub(crate) fn new(config: EngineConfig, drafters: Vec<Box<dyn Drafter>>) -> Self {
        let mut drafting = Drafting::default();
        if config.drafts {
            drafting = Drafting::lookup();
            drafters.into_iter().for_each(|drafter| drafting.add(drafter));
        }
        Self {
            config,
            state: Mutex::default(),
            prefixes: Mutex::default(),
            keeps_hidden: drafting.reads_hidden(),
            drafting: Mutex::new(drafting),
            groups: Mutex::default(),
        }
    }

    pub(crate) fn config(&self) -> EngineConfig {
        self.config
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn prefixes(&self) -> MutexGuard<'_, Prefixes> {
        self.prefixes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drafting(&self) -> MutexGuard<'_, Drafting> {
        self.drafting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn groups(&self) -> MutexGuard<'_, Groups> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn status(&self) -> EngineStatus {
        let state = self.state();
        EngineStatus { waiting: state.status.waiting + state.arrived.len(), ..state.status.clone() }
    }

    /// An empty cache for one sequence.
    fn new_cache(&self, core: &Core) -> KvCache {
        if self.keeps_hidden { core.trunk.new_cache_with_hidden() } else { core.trunk.new_cache() }
    }

    /// The most tokens that a sequence may have.
    pub(crate) fn context(&self, core: &Core) -> usize {
        let position = self.new_cache(core).bytes_per_position().max(1);
        core.trunk.spec().max_positions.min(self.config.kv_bytes / position)
    }

    /// Takes a request; what comes of it comes through the channel. Must be called within a tokio runtime.
    pub(crate) fn submit(self: &Arc<Self>, core: &Arc<Core>, request: GenerateRequest) -> mpsc::Receiver<Step> {
        let (steps, receiver) = mpsc::channel(STEP_QUEUE);
        let prompt = request.prompt.len() as u64;
        let (cache, tokenizer) = (self.new_cache(core), core.tokenizer.as_ref());
        let sequence =
            Sequence::new(request, self.context(core), core.trunk.spec().vocab_size, cache, tokenizer, steps.clone());
        if let Err(error) = sequence.and_then(|sequence| self.enqueue(sequence, prompt)) {
            // The channel is new and has room.
            let _ = steps.try_send(Step::End(Err(error)));
            return receiver;
        }
        let mut state = self.state();
        if !state.is_driven {
            state.is_driven = true;
            let driver = Driver::new(core.clone(), self.clone(), tokio::runtime::Handle::current());
            tokio::task::spawn_blocking(move || driver.run());
        }
        receiver
    }

    fn enqueue(&self, sequence: Sequence, prompt: u64) -> Result<(), GenerateError> {
        let mut state = self.state();
        let waiting = state.status.waiting + state.arrived.len();
        if state.status.running + waiting >= self.config.capacity() {
            return Err(GenerateError::Busy { waiting });
        }
        state.status.prompt_tokens += prompt;
        state.arrived.push(sequence);
        Ok(())
    }
}
