//! Drafts by the multi-token-prediction head that the model's checkpoint carries.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_model::{DraftHead, KvCache, LogitsWanted, Segment};

use super::model::{CATCH_UP, Course, GUESSES};
use super::window::CLASSES;
use super::{Asked, Drafter, MOST, Worth};
use crate::client::Core;

/// Drafts with the head: one token of what the model knows of the last position, and more of what the head itself makes of it.
#[derive(Debug)]
pub(crate) struct HeadDrafter {
    head: Arc<DraftHead>,
}

/// What the head reads next of a sequence.
#[derive(Default)]
struct Pairs {
    tokens: Vec<u32>,
    /// `[tokens, hidden]`
    hidden: Vec<f32>,
}

impl HeadDrafter {
    pub(crate) fn new(head: Arc<DraftHead>) -> Self {
        Self { head }
    }

    /// Reads a prompt but for its last pair, and gives the pairs that are left to read. A sequence of which they cannot be had gets no
    /// draft.
    fn catch_up(&self, asked: &mut Asked<'_>, read: &mut Duration) -> Pairs {
        let Asked { tokens, cache, memory, .. } = asked;
        let own = memory.head.get_or_insert_with(|| self.head.new_cache());
        let end = tokens.len().saturating_sub(1);
        // The last pair's logits are wanted in any case.
        own.truncate(end.saturating_sub(1));
        // Of each position with the token after it.
        let pairs = |first: usize, last: usize| Some((&tokens[first + 1..=last], cache.hidden(first..last)?));
        if end - own.len() > MOST + 1 {
            let started = Instant::now();
            while own.len() + 1 < end {
                let chunk = pairs(own.len(), (end - 1).min(own.len() + CATCH_UP));
                let passed = chunk.is_some_and(|(tokens, hidden)| {
                    let segment = Segment { tokens, cache: own, logits: LogitsWanted::None };
                    self.head.forward(&mut [segment], hidden).is_ok()
                });
                if !passed {
                    break;
                }
            }
            *read += started.elapsed();
        }
        match pairs(own.len(), end) {
            Some((tokens, hidden)) if (1..=MOST + 1).contains(&tokens.len()) => {
                Pairs { tokens: tokens.to_vec(), hidden: hidden.to_vec() }
            }
            _ => {
                asked.most = 0;
                Pairs::default()
            }
        }
    }
}

impl Drafter for HeadDrafter {
    fn is_free(&self) -> bool {
        false
    }

    fn reads_hidden(&self) -> bool {
        true
    }

    fn guesses(&self) -> [f64; CLASSES] {
        GUESSES
    }

    fn propose(&mut self, core: &Core, asked: &mut [Asked<'_>], worth: &Worth<'_>) -> Duration {
        let max = core.trunk.spec().max_positions;
        // Where the last token is at the latest when nothing has been drafted.
        asked.iter_mut().for_each(|asked| asked.most = asked.most.min(max.saturating_sub(asked.tokens.len())));
        let mut read = Duration::ZERO;
        let mut pairs: Vec<Pairs> = asked
            .iter_mut()
            .map(|asked| if asked.most > 0 { self.catch_up(asked, &mut read) } else { Pairs::default() })
            .collect();
        let mut courses: Vec<Course> = asked.iter().map(Course::new).collect();
        while courses.iter().any(|course| !course.ends) {
            let parts = asked.iter_mut().zip(&pairs).zip(&courses).filter(|(_, course)| !course.ends);
            let (mut segments, mut hidden) = (Vec::new(), Vec::new());
            for ((asked, pairs), _) in parts {
                let Some(cache) = &mut asked.memory.head else { continue };
                segments.push(Segment { tokens: &pairs.tokens, cache, logits: LogitsWanted::Last });
                hidden.extend_from_slice(&pairs.hidden);
            }
            // A draft that cannot be made is no draft.
            let Ok(output) = self.head.forward(&mut segments, &hidden) else { break };
            drop(segments);
            let going = asked.iter_mut().zip(&mut courses).zip(&mut pairs).filter(|((_, course), _)| !course.ends);
            for (((asked, course), pairs), (logits, hidden)) in going.zip(output.logits.into_iter().zip(output.hidden))
            {
                course.draw(asked, &logits, worth);
                *pairs = Pairs { tokens: asked.draft.tokens.last().copied().into_iter().collect(), hidden };
            }
        }
        // What was made of drafted tokens, and of the head's own hidden states, gives way to what the model makes of them.
        for asked in asked {
            let known = asked.tokens.len().saturating_sub(1);
            asked.memory.head.iter_mut().for_each(|cache: &mut KvCache| cache.truncate(known));
        }
        // One layer of many: a small part of what the prompt itself took, once.
        read
    }
}
