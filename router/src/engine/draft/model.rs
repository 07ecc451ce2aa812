//! Drafts by a model: a smaller one of the same vocabulary, or the model itself with a part of its experts.

use std::sync::Arc;
use std::time::Duration;

use hanse_model::{Experts, KvCache, LocalExperts, LogitsWanted, Sampler, Segment, Trunk, log_softmax_at};

use super::super::memory::common;
use super::window::CLASSES;
use super::{Asked, Drafter, Memory, Worth};
use crate::client::Core;
use crate::resident::{Resident, ResidentOnly};

/// Rows of one pass while what drafts reads what it has not seen yet.
pub(super) const CATCH_UP: usize = 256;

/// Keys and values of a draft model, and of which tokens they are.
#[derive(Debug)]
pub(crate) struct ModelCache {
    tokens: Vec<u32>,
    cache: KvCache,
}

impl ModelCache {
    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        self.cache.bytes()
    }
}

/// A small model that drafts for another one of the same vocabulary, all in this process.
#[derive(Debug)]
pub(crate) struct DraftModel {
    pub(crate) trunk: Trunk,
    pub(crate) experts: Arc<LocalExperts>,
}

/// Drafts with a model's logits, drawn as the sequence itself draws.
pub(crate) struct ModelDrafter {
    /// A model of its own; `None` for the trunk of the model that is drafted for, on its own keys and values.
    model: Option<Arc<DraftModel>>,
    experts: Box<dyn Experts>,
}

impl std::fmt::Debug for ModelDrafter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelDrafter").field("another_model", &self.model.is_some()).finish_non_exhaustive()
    }
}

impl ModelDrafter {
    /// Drafts with another model.
    pub(crate) fn of(model: Arc<DraftModel>) -> Self {
        let experts = Box::new(model.experts.clone());
        Self { model: Some(model), experts }
    }

    /// Drafts with the model itself, of whose experts only some are used.
    pub(crate) fn with_resident(resident: Arc<Resident>) -> Self {
        Self { model: None, experts: Box::new(ResidentOnly::new(resident)) }
    }
}

/// How sure a model is of a token that it gives this probability.
fn class(probability: f32) -> u8 {
    const BOUNDS: [f32; CLASSES - 1] = [0.1, 0.25, 0.4, 0.6, 0.8, 0.9, 0.97];
    BOUNDS.iter().filter(|&&bound| probability >= bound).count() as u8
}

/// How often a token of each class is right: as often as the one that drafts thinks.
pub(super) const GUESSES: [f64; CLASSES] = [0.05, 0.17, 0.32, 0.5, 0.7, 0.85, 0.93, 0.98];

/// A draft in the making.
pub(super) struct Course {
    sampler: Sampler,
    survival: f64,
    pub(super) ends: bool,
}

impl Course {
    /// Begins, unless nothing is wanted.
    pub(super) fn new(asked: &Asked<'_>) -> Self {
        Self { sampler: asked.sampler.clone(), survival: 1.0, ends: asked.most == 0 }
    }

    /// Adds a token that is drawn from `logits`, and ends where one more would not be worth it.
    pub(super) fn draw(&mut self, asked: &mut Asked<'_>, logits: &[f32], worth: &Worth<'_>) {
        let token = self.sampler.sample(logits);
        let class = class(log_softmax_at(logits, token).exp());
        asked.draft.push(token, class);
        self.survival *= worth.chance(asked.memory, class);
        self.ends = asked.draft.tokens.len() >= asked.most || !worth.goes_on(self.survival);
    }
}

impl Drafter for ModelDrafter {
    fn is_free(&self) -> bool {
        false
    }

    fn guesses(&self) -> [f64; CLASSES] {
        GUESSES
    }

    fn propose(&mut self, core: &Core, asked: &mut [Asked<'_>], worth: &Worth<'_>) -> Duration {
        let own = self.model.is_some();
        let trunk = self.model.as_ref().map_or(&core.trunk, |model| &model.trunk);
        let max = trunk.spec().max_positions;
        // Where the last token is at the latest when nothing has been drafted.
        asked.iter_mut().for_each(|asked| asked.most = asked.most.min(max.saturating_sub(asked.tokens.len())));
        if own {
            asked
                .iter_mut()
                .filter(|asked| asked.most > 0)
                .for_each(|asked| catch_up(trunk, &mut *self.experts, asked));
        }
        let before: Vec<usize> = asked.iter().map(|asked| asked.cache.len()).collect();
        let mut courses: Vec<Course> = asked.iter().map(Course::new).collect();
        while courses.iter().any(|course| !course.ends) {
            let lasts: Vec<[u32; 1]> = asked.iter().map(|asked| [last(asked)]).collect();
            let parts = asked.iter_mut().zip(&lasts).zip(&courses).filter(|(_, course)| !course.ends);
            let mut segments: Vec<Segment<'_>> = parts
                .filter_map(|((asked, last), _)| {
                    let cache = if own { &mut asked.memory.model.as_mut()?.cache } else { &mut *asked.cache };
                    Some(Segment { tokens: last, cache, logits: LogitsWanted::Last })
                })
                .collect();
            // A draft that cannot be made is no draft.
            let Ok(logits) = trunk.forward(&mut segments, &mut *self.experts) else { break };
            drop(segments);
            let going = asked.iter_mut().zip(&mut courses).zip(lasts).filter(|((_, course), _)| !course.ends);
            for (((asked, course), last), logits) in going.zip(logits) {
                if own && let Some(model) = &mut asked.memory.model {
                    model.tokens.extend(last);
                }
                course.draw(asked, &logits, worth);
            }
        }
        asked.iter_mut().zip(before).for_each(|(asked, before)| asked.cache.truncate(before));
        // A model may take long to read a prompt, which must not be done over and over for drafts that bring nothing.
        Duration::ZERO
    }
}

/// The token that the draft goes on from.
fn last(asked: &Asked<'_>) -> u32 {
    asked.draft.tokens.last().or(asked.tokens.last()).copied().unwrap_or_default()
}

/// Brings a draft model's cache to all tokens but the last; without it the sequence gets no draft.
fn catch_up(trunk: &Trunk, experts: &mut dyn Experts, asked: &mut Asked<'_>) {
    let Memory { model, .. } = &mut *asked.memory;
    let ModelCache { tokens, cache } =
        model.get_or_insert_with(|| ModelCache { tokens: Vec::new(), cache: trunk.new_cache() });
    let wanted = &asked.tokens[..asked.tokens.len().saturating_sub(1)];
    // What was drafted and did not come is forgotten.
    tokens.truncate(common(tokens, wanted));
    cache.truncate(tokens.len());
    for chunk in wanted[tokens.len()..].chunks(CATCH_UP) {
        let segment = Segment { tokens: chunk, cache, logits: LogitsWanted::None };
        if trunk.forward(&mut [segment], experts).is_err() {
            asked.most = 0;
            return;
        }
        tokens.extend(chunk);
    }
}
