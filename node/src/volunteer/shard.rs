//! The experts of a running volunteer: what is loaded, what is on its way, and what is about to go.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hanse_model::Checkpoint;
use hanse_protocol::HostedExperts;
use tokio::sync::Notify;

use super::VolunteerError;
use crate::placement::ExpertTable;
use crate::store::ExpertStore;

/// Experts loaded in one step, after which they are served.
const STEP: usize = 16;

#[derive(Debug, Default)]
struct Intent {
    loading: HostedExperts,
    retiring: HostedExperts,
}

/// What a volunteer hosts, and how that changes.
#[derive(Debug)]
pub(super) struct Shard {
    checkpoint: Checkpoint,
    store: Arc<ExpertStore>,
    table: Arc<ExpertTable>,
    intent: Mutex<Intent>,
    changed: Notify,
}

impl Shard {
    pub(super) fn new(checkpoint: Checkpoint) -> Self {
        let store = Arc::new(ExpertStore::new(checkpoint.spec().hidden_size));
        let table = Arc::new(ExpertTable::of(&checkpoint));
        Self { checkpoint, store, table, intent: Mutex::default(), changed: Notify::new() }
    }

    fn intent(&self) -> MutexGuard<'_, Intent> {
        self.intent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn store(&self) -> &Arc<ExpertStore> {
        &self.store
    }

    pub(super) fn table(&self) -> &Arc<ExpertTable> {
        &self.table
    }

    /// Completes when more or fewer experts are served than before, or others should hear of a plan.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What an advert says: experts that may be called, and experts that are about to be hosted.
    pub(super) fn announced(&self) -> Result<(HostedExperts, HostedExperts), VolunteerError> {
        let hosted = self.store.hosted()?;
        let intent = self.intent();
        if intent.retiring.is_empty() {
            return Ok((hosted, intent.loading.clone()));
        }
        let mut staying = HostedExperts::new();
        for (layer, expert) in hosted.iter().filter(|(layer, expert)| !intent.retiring.contains(*layer, *expert)) {
            staying.insert(layer, expert)?;
        }
        Ok((staying, intent.loading.clone()))
    }

    /// Says what will be loaded, in place of what was said before.
    pub(super) fn claim(&self, experts: &[(u32, u32)]) -> Result<(), VolunteerError> {
        let loading = set(experts)?;
        self.intent().loading = loading;
        self.changed.notify_one();
        Ok(())
    }

    /// Says that these experts are about to go; with an empty list that none is. They are served until [`Self::drop_experts`].
    pub(super) fn retire(&self, experts: &[(u32, u32)]) -> Result<(), VolunteerError> {
        let retiring = set(experts)?;
        self.intent().retiring = retiring;
        self.changed.notify_one();
        Ok(())
    }

    /// Gives up the experts that were retired.
    pub(super) fn drop_experts(&self, experts: &[(u32, u32)]) {
        self.store.remove(experts);
        self.intent().retiring = HostedExperts::new();
        self.changed.notify_one();
    }

    /// Loads experts step by step; each is served as soon as it is there. `progress` is told how many are loaded.
    pub(super) async fn load(
        &self,
        experts: &[(u32, u32)],
        progress: &(dyn Fn(usize) + Sync),
    ) -> Result<(), VolunteerError> {
        for (done, step) in experts.chunks(STEP).enumerate() {
            let (checkpoint, store, wanted) = (self.checkpoint.clone(), self.store.clone(), step.to_vec());
            let loaded = tokio::task::spawn_blocking(move || store.add(&checkpoint, &wanted)).await;
            loaded.map_err(|e| VolunteerError::Compute(e.to_string()))??;
            self.changed.notify_one();
            progress(done * STEP + step.len());
        }
        self.intent().loading = HostedExperts::new();
        Ok(())
    }
}

fn set(experts: &[(u32, u32)]) -> Result<HostedExperts, VolunteerError> {
    let mut set = HostedExperts::new();
    for &(layer, expert) in experts {
        set.insert(layer, expert)?;
    }
    Ok(set)
}
