//! One request on its way: what of it has gone through the model, and how logits become its tokens.

use std::time::{Duration, Instant};

use hanse_model::{
    ForwardError, GenerationDefaults, KvCache, LogitsWanted, Sampler, Segment, StopOutput, StopStrings, TextStream,
    Tokenizer, log_softmax_at, top_log_softmax,
};
use tokio::sync::mpsc;

use super::Step;
use super::draft::{Asked, Draft, MOST, Memory, Verdict};
use super::schedule::PREFILL_TOLD;
use crate::client::{Progress, Summary};
use crate::dispatch::Usage;
use crate::generate::{Constraint, FinishReason, GenerateError, GenerateRequest, ScoredToken, Timings, Token};
use crate::stats::DraftUse;

/// Messages that a step without drafts may bring: of the prompt, of a token, and of the end.
const MESSAGES: usize = 3;

/// A reader that has had no room for so long has gone, as far as its sequence is concerned.
const UNREAD_LIMIT: Duration = Duration::from_secs(60);

/// A request between its arrival and its end.
pub(super) struct Sequence {
    request: GenerateRequest,
    /// The prompt and what was generated; the cache holds the beginning of it.
    tokens: Vec<u32>,
    cache: KvCache,
    sampler: Sampler,
    constraint: Option<Box<dyn Constraint>>,
    stop: StopStrings,
    text: Option<TextStream>,
    /// The most tokens to generate.
    limit: usize,
    /// Tokens of the prompt whose log probabilities have been told.
    told: usize,
    steps: mpsc::Sender<Step>,
    /// Since when its reader has had no room.
    unread_since: Option<Instant>,
    began: Instant,
    prefilled: Option<Instant>,
    decode_steps: usize,
    /// Round trips until the prompt's last logits.
    prefill_round_trips: u64,
    network: Usage,
    /// What may come next, as far as it is known.
    draft: Draft,
    drafts: DraftUse,
    memory: Memory,
    /// Tokens of the rows of a pass with drafts.
    rows: Vec<u32>,
}

impl std::fmt::Debug for Sequence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sequence").field("tokens", &self.tokens.len()).field("cached", &self.cache.len()).finish()
    }
}

/// Where a sequence stands after its logits have been looked at.
pub(super) enum Outcome {
    GoesOn,
    Ended(Box<Result<Summary, GenerateError>>),
}

impl Sequence {
    /// Checks a request; `context` is the most tokens that a sequence may have.
    pub(super) fn new(
        request: GenerateRequest,
        context: usize,
        vocab_size: usize,
        cache: KvCache,
        tokenizer: Option<&Tokenizer>,
        steps: mpsc::Sender<Step>,
    ) -> Result<Self, GenerateError> {
        if request.prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        let room = context.checked_sub(request.prompt.len()).filter(|room| *room > 0 || request.max_tokens == 0);
        let Some(room) = room else {
            return Err(GenerateError::PromptTooLong { tokens: request.prompt.len(), context });
        };
        if let Some(&token) = request.prompt.iter().find(|token| **token as usize >= vocab_size) {
            return Err(ForwardError::TokenOutOfRange { token, vocab_size }.into());
        }
        let constraint = request.grammar.as_ref().map(|grammar| grammar.begin()).transpose();
        Ok(Self {
            tokens: request.prompt.clone(),
            cache,
            sampler: Sampler::new(request.sampling.clone())?,
            constraint: constraint.map_err(GenerateError::Grammar)?,
            stop: StopStrings::new(request.stop.clone()),
            text: tokenizer.map(|tokenizer| tokenizer.stream(true)),
            limit: request.max_tokens.min(room),
            told: 0,
            steps,
            unread_since: None,
            began: Instant::now(),
            prefilled: None,
            decode_steps: 0,
            prefill_round_trips: 0,
            network: Usage::default(),
            draft: Draft::default(),
            drafts: DraftUse::default(),
            memory: Memory::default(),
            rows: Vec::new(),
            request,
        })
    }

    /// Where its tokens go; closed when nobody wants them any more.
    pub(super) fn steps(&self) -> &mpsc::Sender<Step> {
        &self.steps
    }

    /// All its tokens so far.
    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub(super) fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// Goes on from a cache of the beginning of its tokens, or gives its cache away for an empty one.
    pub(super) fn replace_cache(&mut self, cache: KvCache) -> KvCache {
        std::mem::replace(&mut self.cache, cache)
    }

    /// Takes back what a pass that has failed has added to its cache.
    pub(super) fn truncate(&mut self, len: usize) {
        self.cache.truncate(len);
    }

    /// How many positions of a cache of tokens that begin like this one's may be used: the last token must go through the model,
    /// and so must a prompt whose log probabilities are wanted.
    pub(super) fn reusable(&self) -> usize {
        if self.request.prompt_logprobs && self.prefilled.is_none() { 0 } else { self.tokens.len() - 1 }
    }

    /// Tokens that have yet to go through the model; one while decoding.
    pub(super) fn pending(&self) -> usize {
        self.tokens.len() - self.cache.len()
    }

    /// The most of them that one pass may take.
    pub(super) fn pending_rows(&self) -> usize {
        if self.tells_prompt() { self.pending().min(PREFILL_TOLD) } else { self.pending() }
    }

    /// Whether its reader has room for what a step may bring.
    pub(super) fn is_read(&self) -> bool {
        self.steps.capacity() >= MESSAGES
    }

    /// Whether anybody waits for its tokens: somebody who has read nothing for long takes up memory that others could use.
    pub(super) fn is_wanted(&mut self) -> bool {
        if self.is_read() {
            self.unread_since = None;
        }
        let long = self.unread_since.is_some_and(|since| since.elapsed() > UNREAD_LIMIT);
        if !self.is_read() {
            self.unread_since.get_or_insert_with(Instant::now);
        }
        !self.steps.is_closed() && !long
    }

    /// Whether its next step gives a token of the answer after another one.
    pub(super) fn is_decoding(&self) -> bool {
        self.prefilled.is_some() && self.pending() == 1
    }

    /// How many tokens a draft may have: the last token of the answer needs none, and the reader must have room for what comes.
    pub(super) fn draft_room(&self) -> usize {
        let wanted = (self.limit - self.produced()).saturating_sub(1);
        wanted.min(self.steps.capacity().saturating_sub(MESSAGES)).min(MOST)
    }

    /// What a drafter needs to know to fill `draft` with up to `most` tokens.
    pub(super) fn asked<'a>(&'a mut self, draft: &'a mut Draft, most: usize) -> Asked<'a> {
        let Self { tokens, cache, sampler, memory, .. } = self;
        Asked { tokens, cache, sampler, memory, draft, most }
    }

    pub(super) fn draft_mut(&mut self) -> &mut Draft {
        &mut self.draft
    }

    /// Drafted tokens in its next segment.
    pub(super) fn drafted_rows(&self) -> usize {
        self.draft.verified
    }

    pub(super) fn memory_mut(&mut self) -> &mut Memory {
        &mut self.memory
    }

    /// Gives up its draft.
    pub(super) fn drop_draft(&mut self) {
        self.draft = Draft::default();
    }

    /// Bytes of memory that drafters take for it.
    pub(super) fn draft_bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// Gives up its draft and what drafters keep of it in memory.
    pub(super) fn forget_drafts(&mut self) {
        self.drop_draft();
        self.memory.forget();
    }

    /// Between a pass and what is taken from it: whether it had a token of the answer before.
    pub(super) fn was_decoding(&self) -> bool {
        self.prefilled.is_some()
    }

    /// What became of its last draft, which is over.
    pub(super) fn judge(&mut self, came: usize) -> Verdict {
        let draft = std::mem::take(&mut self.draft);
        Verdict::of(&draft, &self.tokens[self.tokens.len() - came..])
    }

    /// The next `rows` of its tokens as a part of a forward pass, and its draft.
    pub(super) fn segment(&mut self, rows: usize) -> Segment<'_> {
        let first = self.cache.len();
        if self.draft.verified > 0 {
            self.rows.clear();
            self.rows.extend_from_slice(&self.tokens[first..]);
            self.rows.extend_from_slice(&self.draft.tokens[..self.draft.verified]);
            return Segment { tokens: &self.rows, cache: &mut self.cache, logits: LogitsWanted::All };
        }
        let last = (first + rows).min(self.tokens.len());
        let logits = match last == self.tokens.len() {
            _ if self.tells_prompt() => LogitsWanted::All,
            true => LogitsWanted::Last,
            false => LogitsWanted::None,
        };
        Segment { tokens: &self.tokens[first..last], cache: &mut self.cache, logits }
    }

    fn tells_prompt(&self) -> bool {
        self.request.prompt_logprobs && self.prefilled.is_none()
    }

    /// Adds what a forward pass cost on the network in which it took part.
    pub(super) fn used(&mut self, step: &Usage) {
        self.network.add(step);
    }

    /// Takes the logits, `[n, vocab]`, of the segment that has just gone through the model.
    pub(super) fn take(&mut self, logits: &[f32], vocab: usize, defaults: &GenerationDefaults) -> Outcome {
        let advanced = match self.draft.verified {
            0 => self.advance(logits, vocab, defaults),
            _ => self.verify(logits, vocab, defaults),
        };
        match advanced {
            Ok(None) => Outcome::GoesOn,
            Ok(Some(reason)) => Outcome::Ended(Box::new(self.finish(reason))),
            Err(error) => Outcome::Ended(Box::new(Err(error))),
        }
    }

    /// Draws tokens, as without a draft, as long as they are what was drafted; the reason if the answer has ended.
    fn verify(
        &mut self,
        logits: &[f32],
        vocab: usize,
        defaults: &GenerationDefaults,
    ) -> Result<Option<FinishReason>, GenerateError> {
        self.decode_steps += 1;
        let before = self.tokens.len();
        let mut drawn = Ok(None);
        for (place, row) in logits.chunks_exact(vocab).enumerate() {
            drawn = self.draw(row, defaults);
            // The last row is that of the last drafted token: what comes after it was not drafted.
            let goes_on = self.tokens.last() == self.draft.tokens.get(place);
            if !matches!(drawn, Ok(None)) || !goes_on {
                break;
            }
        }
        // The last token has not been through the model, nor have any that came of a draft's other tokens.
        self.cache.truncate(self.tokens.len() - 1);
        self.drafts.drafted += self.draft.verified as u64;
        let accepted = self.tokens[before..].iter().zip(&self.draft.tokens[..self.draft.verified]);
        self.drafts.accepted += accepted.take_while(|(came, drafted)| came == drafted).count() as u64;
        drawn
    }

    /// Draws a token if it is time; the reason if the answer has ended.
    fn advance(
        &mut self,
        logits: &[f32],
        vocab: usize,
        defaults: &GenerationDefaults,
    ) -> Result<Option<FinishReason>, GenerateError> {
        if self.tells_prompt() {
            self.tell_prompt(logits, vocab);
        }
        if self.pending() > 0 {
            return Ok(None);
        }
        match self.prefilled {
            None => {
                self.prefilled = Some(Instant::now());
                self.prefill_round_trips = self.network.counts().round_trips;
            }
            Some(_) => self.decode_steps += 1,
        }
        if self.produced() == self.limit {
            return Ok(Some(FinishReason::Length));
        }
        self.draw(&logits[logits.len().saturating_sub(vocab)..], defaults)
    }

    /// Draws the next token from its logits, `[vocab]`; the reason if it is the last one.
    fn draw(&mut self, logits: &[f32], defaults: &GenerationDefaults) -> Result<Option<FinishReason>, GenerateError> {
        let id = match &mut self.constraint {
            Some(constraint) => {
                let allowed = constraint.allowed().map_err(GenerateError::Grammar)?;
                let id = self.sampler.sample_allowed(logits, &allowed);
                constraint.accept(id).map_err(GenerateError::Grammar)?;
                id
            }
            None => self.sampler.sample(logits),
        };
        let is_end = defaults.eos_token_ids.contains(&id) && !self.request.ignore_eos;
        let (mut text, mut stopped) = (String::new(), false);
        if !is_end && let Some(stream) = &mut self.text {
            StopOutput { text, stopped } = self.stop.push(&stream.push(id)?);
        }
        self.tokens.push(id);
        let top = top_log_softmax(logits, self.request.top_logprobs);
        // Who has gone is noticed before the next step; who is slow has been waited for.
        let token = Token { id, text, logprob: log_softmax_at(logits, id), top };
        let _ = self.steps.try_send(Step::Token(token, self.progress()));
        if is_end || stopped {
            return Ok(Some(FinishReason::Stop));
        }
        Ok((self.produced() == self.limit).then_some(FinishReason::Length))
    }

    fn produced(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Tells of the prompt's tokens that have just gone through the model: their logits speak of the tokens after them.
    fn tell_prompt(&mut self, logits: &[f32], vocab: usize) {
        let top = self.request.top_logprobs;
        let mut tokens = Vec::new();
        if self.told == 0 {
            tokens.push(ScoredToken { id: self.tokens[0], logprob: None, top: Vec::new() });
        }
        let first = self.cache.len() - logits.len() / vocab.max(1);
        for (offset, row) in logits.chunks_exact(vocab).enumerate() {
            if let Some(&id) = self.tokens.get(first + offset + 1) {
                tokens.push(ScoredToken { id, logprob: Some(log_softmax_at(row, id)), top: top_log_softmax(row, top) });
            }
        }
        self.told += tokens.len();
        let _ = self.steps.try_send(Step::Prompt(tokens));
    }

    fn finish(&mut self, mut reason: FinishReason) -> Result<Summary, GenerateError> {
        let mut rest = String::new();
        if let Some(text) = &mut self.text {
            let StopOutput { text: last, stopped } = self.stop.push(&text.finish()?);
            rest = last + &self.stop.finish();
            if stopped {
                reason = FinishReason::Stop;
            }
        }
        let Progress { timings, network, drafts } = self.progress();
        Ok(Summary { finish_reason: reason, rest, timings, network, drafts })
    }

    fn progress(&self) -> Progress {
        let prefilled = self.prefilled.unwrap_or(self.began);
        let prefill: Duration = prefilled - self.began;
        let timings = Timings {
            prefill,
            decode: prefilled.elapsed(),
            decode_steps: self.decode_steps,
            decode_tokens: self.produced().saturating_sub(1),
        };
        let network = self.network.counts();
        let decode_round_trips = network.round_trips.saturating_sub(self.prefill_round_trips);
        let drafts = DraftUse { decode_round_trips, ..self.drafts };
        Progress { timings, network, drafts }
    }
}
