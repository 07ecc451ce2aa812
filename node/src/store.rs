//! The experts that this volunteer holds.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use hanse_model::{Checkpoint, Expert, LoadError};
use hanse_protocol::{HostedError, HostedExperts};

/// Experts by layer and number.
type Experts = BTreeMap<(u32, u32), Arc<Expert>>;

/// Loaded experts by layer and number. They may change while it serves: whoever computes works on a `Snapshot`.
#[derive(Debug)]
pub struct ExpertStore {
    experts: RwLock<Arc<Experts>>,
    hidden_size: usize,
}

/// The experts of a store at one moment. They stay usable for as long as it is kept.
#[derive(Debug, Clone)]
pub struct Snapshot(Arc<Experts>);

impl Snapshot {
    /// The expert, if it is here.
    #[must_use]
    pub fn expert(&self, layer: u32, expert: u32) -> Option<&Expert> {
        self.0.get(&(layer, expert)).map(Arc::as_ref)
    }
}

impl ExpertStore {
    /// An empty store for rows of `hidden_size` values.
    #[must_use]
    pub fn new(hidden_size: usize) -> Self {
        Self { experts: RwLock::default(), hidden_size }
    }

    /// Loads `wanted` (layer, expert) pairs; `progress` is told after each how many are loaded.
    ///
    /// # Errors
    /// The first tensor that is missing or has a wrong shape.
    pub fn load(
        checkpoint: &Checkpoint,
        wanted: &[(u32, u32)],
        mut progress: impl FnMut(usize),
    ) -> Result<Self, LoadError> {
        let store = Self::new(checkpoint.spec().hidden_size);
        for (done, &pair) in wanted.iter().enumerate() {
            store.add(checkpoint, &[pair])?;
            progress(done + 1);
        }
        Ok(store)
    }

    /// Loads experts and holds them from then on; all of them or, after an error, none.
    ///
    /// # Errors
    /// The first tensor that is missing or has a wrong shape.
    pub fn add(&self, checkpoint: &Checkpoint, wanted: &[(u32, u32)]) -> Result<(), LoadError> {
        let mut loaded = Vec::with_capacity(wanted.len());
        for &(layer, expert) in wanted {
            loaded.push(((layer, expert), Arc::new(Expert::load(checkpoint, layer as usize, expert as usize)?)));
        }
        self.change(|experts| experts.extend(loaded));
        Ok(())
    }

    /// Gives experts up. Work that was accepted before is still done: it has a snapshot.
    pub fn remove(&self, unwanted: &[(u32, u32)]) {
        self.change(|experts| unwanted.iter().for_each(|pair| _ = experts.remove(pair)));
    }

    fn change(&self, change: impl FnOnce(&mut Experts)) {
        let mut experts = self.experts.write().unwrap_or_else(PoisonError::into_inner);
        // The map is copied only while somebody computes with the old one; the weights never are.
        change(Arc::make_mut(&mut experts));
    }

    /// The experts held now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.experts.read().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Length of one row of hidden states.
    #[must_use]
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// Number of experts held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.snapshot().0.len()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.snapshot().0.is_empty()
    }

    /// Bytes of all weights held.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.snapshot().0.values().map(|expert| expert.bytes()).sum()
    }

    /// What to say in the advert.
    ///
    /// # Errors
    /// A layer or expert number beyond what an advert can say.
    pub fn hosted(&self) -> Result<HostedExperts, HostedError> {
        let mut hosted = HostedExperts::new();
        for &(layer, expert) in self.snapshot().0.keys() {
            hosted.insert(layer, expert)?;
        }
        Ok(hosted)
    }
}
