//! Experts that the client holds itself, beside those of its peers.
//!
//! They serve twice. Where the client adds up ([`Combine::Client`]) they are not asked of anybody: a
//! layer whose chosen experts are all here makes no call. That changes no bit, since everybody computes an expert with the same kernels and the client adds
//! in the same order. And the model drafts for itself with them alone, which is no result but a guess that is verified.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use hanse_model::{Checkpoint, Expert, ExpertJob, Experts, ExpertsError, LoadError, Routing, run_experts};
use hanse_protocol::{Combine, ExpertRows};
use rayon::ThreadPool;

use crate::dispatch::{add_answers, group_by_expert};

/// Forward passes after which the choice is made for the first time by what the gate has chosen.
const FIRST_CHOICE: u64 = 8;
/// Passes between two choices, at most.
const SELDOM: u64 = 4096;
/// How much more often another expert must be chosen to take the place of one that is here.
const STICKY: f64 = 1.1;

/// What a layer has to choose from.
#[derive(Debug, Clone, Copy)]
struct LayerSize {
    experts: usize,
    top_k: usize,
    bytes_per_expert: u64,
}

/// By layer, for each expert whether it is held.
type Choice = BTreeMap<u32, Vec<bool>>;

/// By layer, the experts that are held.
#[derive(Debug, Default)]
pub(crate) struct Held(BTreeMap<u32, Vec<Option<Arc<Expert>>>>);

/// A part of a model's experts, as large as the client wants: those that its gates choose most.
#[derive(Debug)]
pub struct Resident {
    checkpoint: Checkpoint,
    pool: Arc<ThreadPool>,
    budget_bytes: u64,
    sizes: BTreeMap<u32, LayerSize>,
    held: RwLock<Arc<Held>>,
    /// One choice at a time.
    choosing: Mutex<()>,
    /// The forward pass after which the next choice is due.
    due: AtomicU64,
}

impl Resident {
    /// Experts of `checkpoint` that take at most `budget_bytes`, evenly from all layers until it is known which are chosen most. Of a
    /// folder they are mapped, not copied; of a checkpoint that fetches what is loaded they are fetched.
    ///
    /// Blocks while they are loaded.
    ///
    /// # Errors
    /// If the checkpoint lacks a tensor.
    pub fn load(checkpoint: Checkpoint, pool: Arc<ThreadPool>, budget_bytes: u64) -> Result<Self, LoadError> {
        let bytes = checkpoint.sizes().bytes_per_expert;
        let size = |(layer, moe): (usize, &hanse_model::MoeSpec)| {
            let bytes_per_expert = bytes.get(layer).copied().unwrap_or(0);
            (layer as u32, LayerSize { experts: moe.experts, top_k: moe.top_k, bytes_per_expert })
        };
        let this = Self {
            sizes: checkpoint.spec().moe_layers().map(size).collect(),
            checkpoint,
            pool,
            budget_bytes,
            held: RwLock::default(),
            choosing: Mutex::default(),
            due: AtomicU64::new(FIRST_CHOICE),
        };
        this.hold_most_chosen(|_| Vec::new())?;
        Ok(this)
    }

    /// Holds the experts that were chosen most, where `calls` gives for each expert of a layer how often; those that are here already
    /// have a small advantage. Blocks while others are loaded.
    ///
    /// # Errors
    /// If one cannot be loaded; what is held stays as it was.
    pub fn hold_most_chosen(&self, calls: impl Fn(u32) -> Vec<u64>) -> Result<(), LoadError> {
        let _one: MutexGuard<'_, ()> = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.held();
        let held = |layer, expert| before.expert(layer, expert).is_some();
        let choice = choose(&self.sizes, self.budget_bytes, calls, held);
        let load = |layer: u32, expert: usize| match before.expert(layer, expert as u32) {
            Some(expert) => Ok(expert.clone()),
            None => Expert::load(&self.checkpoint, layer as usize, expert).map(Arc::new),
        };
        let layers = choice.into_iter().map(|(layer, chosen)| {
            let experts = chosen.into_iter().enumerate();
            let experts = experts.map(|(expert, chosen)| chosen.then(|| load(layer, expert)).transpose());
            Ok((layer, experts.collect::<Result<Vec<_>, LoadError>>()?))
        });
        let held = Held(layers.collect::<Result<_, LoadError>>()?);
        *self.held.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(held);
        Ok(())
    }

    /// Whether it is time to choose again, after so many forward passes: often at first, then seldom.
    pub(crate) fn is_due(&self, passes: u64) -> bool {
        let due = self.due.load(Ordering::Relaxed);
        let next = passes.saturating_add(passes.clamp(FIRST_CHOICE, SELDOM));
        passes >= due && self.due.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    pub(crate) fn held(&self) -> Arc<Held> {
        self.held.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many experts are held.
    #[must_use]
    pub fn count(&self) -> usize {
        self.held().0.values().flatten().flatten().count()
    }

    /// Bytes of the experts that are held.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.held().0.values().flatten().flatten().map(|expert| expert.bytes()).sum()
    }

    /// Each assignment's rows, unweighted, one after the other: `hidden` is `[rows, width]`. All experts must be held.
    pub(crate) fn compute(
        &self,
        held: &Held,
        layer: u32,
        hidden: &[f32],
        width: usize,
        assignments: &[ExpertRows],
    ) -> Vec<f32> {
        let row = |row: &u32| &hidden[*row as usize * width..(*row as usize + 1) * width];
        let inputs: Vec<Vec<f32>> =
            assignments.iter().map(|a| a.rows.iter().flat_map(row).copied().collect()).collect();
        let mut outputs = vec![0.0; inputs.iter().map(Vec::len).sum()];
        let mut rest = outputs.as_mut_slice();
        let mut jobs = Vec::new();
        for (assigned, hidden) in assignments.iter().zip(&inputs) {
            let output;
            (output, rest) = rest.split_at_mut(hidden.len());
            if let Some(expert) = held.expert(layer, assigned.expert) {
                jobs.push(ExpertJob { expert, hidden, output });
            }
        }
        run_experts(&mut jobs, &self.pool);
        outputs
    }
}

impl Held {
    fn expert(&self, layer: u32, expert: u32) -> Option<&Arc<Expert>> {
        self.0.get(&layer)?.get(expert as usize)?.as_ref()
    }

    /// Splits a layer's work into what can be done here and what cannot.
    pub(crate) fn split(&self, layer: u32, wanted: Vec<ExpertRows>) -> (Vec<ExpertRows>, Vec<ExpertRows>) {
        wanted.into_iter().partition(|assigned| self.expert(layer, assigned.expert).is_some())
    }
}

/// Which experts to hold: of each layer as many as a row needs, as far as there is room, and then those that were chosen most.
fn choose(
    sizes: &BTreeMap<u32, LayerSize>,
    budget: u64,
    calls: impl Fn(u32) -> Vec<u64>,
    held: impl Fn(u32, u32) -> bool,
) -> Choice {
    let mut choice: Choice = sizes.iter().map(|(&layer, size)| (layer, vec![false; size.experts])).collect();
    // (beyond the first of its layer, times chosen, place in its layer, layer, expert)
    let mut order = Vec::new();
    for (&layer, size) in sizes {
        let calls = calls(layer);
        let weight = |expert: u32| {
            let called = calls.get(expert as usize).copied().unwrap_or(0) as f64;
            if held(layer, expert) { called * STICKY } else { called }
        };
        let mut experts: Vec<u32> = (0..size.experts as u32).collect();
        experts.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)).then(a.cmp(&b)));
        let ranked = experts.into_iter().enumerate();
        order.extend(ranked.map(|(place, expert)| (place >= size.top_k, weight(expert), place, layer, expert)));
    }
    order.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)).then(a.2.cmp(&b.2)));
    let mut left = budget;
    for (_, _, _, layer, expert) in order {
        let bytes = sizes.get(&layer).map_or(u64::MAX, |size| size.bytes_per_expert);
        if bytes <= left
            && let Some(slot) = choice.get_mut(&layer).and_then(|layer| layer.get_mut(expert as usize))
        {
            left -= bytes;
            *slot = true;
        }
    }
    choice
}

/// The experts that are held and no others, for drafts: the gate chooses among them.
#[derive(Debug)]
pub(crate) struct ResidentOnly {
    resident: Arc<Resident>,
    held: Arc<Held>,
    choosable: Choice,
}

impl ResidentOnly {
    pub(crate) fn new(resident: Arc<Resident>) -> Self {
        let mut this = Self { resident, held: Arc::default(), choosable: Choice::default() };
        this.look();
        this
    }

    /// Takes notice of what is held now.
    fn look(&mut self) {
        let held = self.resident.held();
        if !Arc::ptr_eq(&held, &self.held) {
            let is_held = |experts: &Vec<Option<Arc<Expert>>>| experts.iter().map(Option::is_some).collect();
            self.choosable = held.0.iter().map(|(&layer, experts)| (layer, is_held(experts))).collect();
            self.held = held;
        }
    }
}

impl Experts for ResidentOnly {
    fn forward(&mut self, layer: usize, hidden: &[f32], routing: &Routing) -> Result<Vec<f32>, ExpertsError> {
        let layer = u32::try_from(layer)?;
        let rows = routing.rows();
        let width = hidden.len() / rows.max(1);
        // Where fewer are held than a row needs, it gets those that are.
        let (wanted, _) = self.held.split(layer, group_by_expert(routing, 0..rows));
        let values = self.resident.compute(&self.held, layer, hidden, width, &wanted);
        let mut output = vec![0.0; hidden.len()];
        add_answers(Combine::Client, width, [(wanted.as_slice(), &[][..], values.as_slice())].into_iter(), &mut output);
        if self.choosable.last_key_value().is_some_and(|(&last, _)| last == layer) {
            self.look();
        }
        Ok(output)
    }

    fn choosable(&self, layer: usize) -> Option<&[bool]> {
        self.choosable.get(&u32::try_from(layer).ok()?).map(Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(layers: u32) -> BTreeMap<u32, LayerSize> {
        (0..layers).map(|layer| (layer, LayerSize { experts: 4, top_k: 1, bytes_per_expert: 10 })).collect()
    }

    fn held(choice: &Choice) -> Vec<Vec<usize>> {
        choice.values().map(|layer| (0..layer.len()).filter(|&expert| layer[expert]).collect()).collect()
    }

    #[test]
    fn every_layer_gets_what_a_row_needs_and_then_the_most_chosen_come() {
        let calls = |layer| if layer == 0 { vec![1, 50, 40, 2] } else { vec![3, 0, 7, 5] };
        let chosen = |budget| held(&choose(&sizes(2), budget, calls, |_, _| false));
        assert_eq!(chosen(9).concat().len(), 0);
        assert_eq!(chosen(19), [vec![1], vec![]]);
        assert_eq!(chosen(20), [vec![1], vec![2]]);
        assert_eq!(chosen(35), [vec![1, 2], vec![2]]);
        assert_eq!(chosen(1000), [vec![0, 1, 2, 3], vec![0, 1, 2, 3]]);
    }

    #[test]
    fn before_anything_is_known_all_layers_get_as_many() {
        assert_eq!(held(&choose(&sizes(3), 65, |_| Vec::new(), |_, _| false)), [[0, 1], [0, 1], [0, 1]]);
    }

    #[test]
    fn what_is_held_gives_way_only_to_what_is_chosen_clearly_more() {
        let chosen = |calls: u64| held(&choose(&sizes(1), 10, |_| vec![100, calls, 0, 0], |_, expert| expert == 0));
        assert_eq!((chosen(109), chosen(111)), (vec![vec![0]], vec![vec![1]]));
    }
}
