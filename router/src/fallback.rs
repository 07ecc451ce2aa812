//! Experts that no peer can compute, computed by the client itself: the last resort, when the client may.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use hanse_model::{Checkpoint, Expert, ExpertJob, run_experts};
use hanse_protocol::ExpertRows;

/// A source of expert rows beside the network. It is asked only when an expert has had no replica for
/// [`NetworkConfig::replica_patience`](crate::NetworkConfig::replica_patience).
pub trait Fallback: std::fmt::Debug + Send + Sync {
    /// One expert on some rows: `hidden` is `[rows, hidden_size]` and so is the answer, unweighted. May block.
    ///
    /// # Errors
    /// In words, for the error that the request then ends with.
    fn compute(&self, layer: u32, expert: u32, hidden: &[f32]) -> Result<Vec<f32>, String>;
}

/// Experts kept ready for the next token. What is not kept is mapped again, and compared with its hash again if it was fetched.
const MAX_KEPT: usize = 256;

/// The client's own copy of the model: its folder, or a checkpoint that fetches each expert when it is first needed.
#[derive(Debug)]
pub struct LocalFallback {
    checkpoint: Checkpoint,
    pool: Arc<rayon::ThreadPool>,
    kept: Mutex<HashMap<(u32, u32), Arc<Expert>>>,
}

impl LocalFallback {
    /// Experts are mapped from `checkpoint` when they are needed and computed on `pool`.
    #[must_use]
    pub fn new(checkpoint: Checkpoint, pool: Arc<rayon::ThreadPool>) -> Self {
        Self { checkpoint, pool, kept: Mutex::default() }
    }

    fn expert(&self, layer: u32, expert: u32) -> Result<Arc<Expert>, String> {
        let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(expert) = kept().get(&(layer, expert)) {
            return Ok(expert.clone());
        }
        let load = || Expert::load(&self.checkpoint, layer as usize, expert as usize);
        // What is kept may be what fills a small cache.
        let loaded = load().or_else(|error| if self.forget() { load() } else { Err(error) });
        let loaded = Arc::new(loaded.map_err(|e| with_causes(&e))?);
        let mut kept = kept();
        if kept.len() >= MAX_KEPT {
            kept.clear();
        }
        kept.insert((layer, expert), loaded.clone());
        Ok(loaded)
    }

    /// Whether there was anything to forget.
    fn forget(&self) -> bool {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let forgotten = !kept.is_empty();
        kept.clear();
        forgotten
    }
}

impl Fallback for LocalFallback {
    fn compute(&self, layer: u32, expert: u32, hidden: &[f32]) -> Result<Vec<f32>, String> {
        let expert = self.expert(layer, expert)?;
        let mut output = vec![0.0; hidden.len()];
        run_experts(&mut [ExpertJob { expert: &expert, hidden, output: &mut output }], &self.pool);
        Ok(output)
    }
}

/// An error's text with those of its causes.
fn with_causes(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Experts that were waited for in vain: when they have no peer again, nobody waits a second time. An expert that has found a
/// peer is asked there all the same.
#[derive(Debug, Default)]
pub(crate) struct Orphans(Mutex<HashSet<(u32, u32)>>);

impl Orphans {
    pub(crate) fn add(&self, layer: u32, assignments: &[ExpertRows]) {
        let mut orphans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        orphans.extend(assignments.iter().map(|a| (layer, a.expert)));
    }

    /// Whether all of them are.
    pub(crate) fn contains(&self, layer: u32, assignments: &[ExpertRows]) -> bool {
        let orphans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        assignments.iter().all(|a| orphans.contains(&(layer, a.expert)))
    }
}
