//! The experts of a running volunteer: what is loaded, what is on its way, and what is about to go.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{Stream, StreamExt, TryStreamExt};
use hanse_model::{Checkpoint, Device};
use hanse_protocol::HostedExperts;
use hanse_router::weights::cache::Pin;
use hanse_router::weights::fetch::BLOBS_AT_ONCE;
use hanse_router::weights::{FetchError, RemoteModel};
use tokio::sync::{Notify, mpsc};
use tokio_util::task::AbortOnDropHandle;

use super::VolunteerError;
use crate::placement::ExpertTable;
use crate::store::ExpertStore;

/// The most experts loaded in one step, after which they are served; as many may have been fetched and wait to be loaded.
const STEP: usize = 16;
/// So long at most, memory of experts that were given up is waited for.
const FREED_WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct Intent {
    loading: HostedExperts,
    retiring: HostedExperts,
}

/// What a volunteer hosts, and how that changes.
#[derive(Debug)]
pub(super) struct Shard {
    checkpoint: Checkpoint,
    /// What the checkpoint's experts are fetched by, unless it is a folder.
    remote: Option<RemoteModel>,
    store: Arc<ExpertStore>,
    table: Arc<ExpertTable>,
    intent: Mutex<Intent>,
    changed: Notify,
    /// What keeps the files of experts in the cache, if a device that forgets them is to load them again.
    files: Option<Mutex<BTreeMap<(u32, u32), Pin>>>,
    came_back: Notify,
}

impl Shard {
    /// With `keep_files`, the files of experts that are held, or are to come back, stay in the cache.
    pub(super) fn new(
        checkpoint: Checkpoint,
        remote: Option<RemoteModel>,
        devices: Vec<Arc<dyn Device>>,
        keep_files: bool,
    ) -> Self {
        let store = Arc::new(ExpertStore::new(checkpoint.spec().hidden_size, devices));
        let table = Arc::new(ExpertTable::of(&checkpoint));
        let files = keep_files.then(Mutex::default);
        let (intent, changed, came_back) = (Mutex::default(), Notify::new(), Notify::new());
        Self { checkpoint, remote, store, table, intent, changed, files, came_back }
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

    /// The experts that can be loaded without fetching them, if others must be fetched. Looks for each on the disk.
    pub(super) fn at_hand(&self) -> Result<HostedExperts, VolunteerError> {
        match &self.remote {
            Some(remote) => Ok(set(&remote.cached_experts())?),
            None => Ok(HostedExperts::new()),
        }
    }

    /// Experts that cannot be had at present.
    pub(super) fn unobtainable(&self) -> Result<HostedExperts, VolunteerError> {
        match &self.remote {
            Some(remote) => Ok(set(&remote.unobtainable_experts())?),
            None => Ok(HostedExperts::new()),
        }
    }

    /// What of a budget the devices have room for. They are asked in another thread, as a card takes its time.
    pub(super) async fn budget(&self, budget_bytes: u64) -> Result<u64, VolunteerError> {
        let (store, largest) = (self.store.clone(), self.table.largest());
        Ok(budget_bytes.min(blocking(move || store.capacity(largest)).await?))
    }

    /// Takes a device that was lent and opened anew; what lay there is loaded by whoever waits for [`Self::came_back`].
    pub(super) fn take_back(&self, device: Arc<dyn Device>) {
        self.store.take_back(device);
        self.came_back.notify_one();
    }

    /// Completes when a device has come back since the last time.
    pub(super) async fn came_back(&self) {
        self.came_back.notified().await;
    }

    /// Keeps the files of these experts, and those of no experts that have gone for good.
    fn keep_files(&self, experts: impl IntoIterator<Item = ((u32, u32), Pin)>) {
        let Some(files) = &self.files else { return };
        let held = self.store.snapshot();
        let mut files = files.lock().unwrap_or_else(PoisonError::into_inner);
        files.extend(experts);
        let is_coming =
            |pair: (u32, u32)| self.store.is_missing(pair) || self.intent().loading.contains(pair.0, pair.1);
        files.retain(|&pair, _| held.expert(pair.0, pair.1).is_some() || is_coming(pair));
    }

    /// Completes when more or fewer experts are served than before, or others should hear of a plan.
    pub(super) async fn changed(&self) {
        tokio::select! {
            () = self.changed.notified() => {}
            () = self.store.lost() => {}
        }
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

    /// Gives up the experts that were retired, and waits a while for their memory.
    pub(super) async fn drop_experts(&self, experts: &[(u32, u32)]) -> Result<(), VolunteerError> {
        let (store, unwanted) = (self.store.clone(), experts.to_vec());
        let removed = blocking(move || store.remove(&unwanted)).await?;
        self.keep_files([]);
        self.intent().retiring = HostedExperts::new();
        self.changed.notify_one();
        removed.freed(FREED_WITHIN).await;
        Ok(())
    }

    /// The names of the devices.
    fn devices(&self) -> String {
        let devices = self.store.devices();
        let names: Vec<&str> = devices.iter().map(|device| device.name()).collect();
        if names.is_empty() { "any device: all have failed".into() } else { names.join(", ") }
    }

    /// Brings experts to where they can be loaded from without a wait, as long as what is returned lives.
    ///
    /// # Errors
    /// The first that cannot be fetched.
    pub(super) async fn fetch(&self, experts: &[(u32, u32)]) -> Result<Vec<Fetched>, VolunteerError> {
        Ok(fetches(self.remote.as_ref(), experts).try_collect().await?)
    }

    /// Loads experts; each is served as soon as it is there. Those that have to be fetched are, several at a time, while those
    /// that have come are loaded. `progress` is told how many are loaded. Those that no device has room for are left out, and that is
    /// said.
    ///
    /// Dropped, it ends fetching; what has come stays in the cache.
    ///
    /// # Errors
    /// An expert that cannot be loaded ends it, and so does a cache that takes no more. One that nobody gives does not keep the
    /// others from being loaded.
    pub(super) async fn load(
        &self,
        experts: &[(u32, u32)],
        progress: &(dyn Fn(usize) + Sync),
    ) -> Result<(), VolunteerError> {
        let (send, mut fetched) = mpsc::channel(STEP);
        let _fetching = AbortOnDropHandle::new(tokio::spawn(fetch_ahead(self.remote.clone(), experts.to_vec(), send)));
        let (mut done, mut left_out, mut step, mut refused) = (0, Vec::new(), Vec::with_capacity(STEP), None);
        while fetched.recv_many(&mut step, STEP).await > 0 {
            let (mut wanted, mut pins) = (Vec::with_capacity(STEP), Vec::with_capacity(STEP));
            for found in step.drain(..) {
                match found {
                    Ok((pair, pin)) => {
                        wanted.push(pair);
                        pins.push(pin);
                    }
                    Err(error) => {
                        tracing::debug!(%error, "not fetched");
                        refused.get_or_insert(error);
                    }
                }
            }
            done += wanted.len();
            let (checkpoint, store) = (self.checkpoint.clone(), self.store.clone());
            let pairs = wanted.clone();
            left_out.extend(blocking(move || store.add(&checkpoint, &wanted)).await??);
            // What the processor holds says itself that it is in use.
            self.keep_files(pairs.into_iter().zip(pins).filter_map(|(pair, pin)| Some((pair, pin?))));
            self.changed.notify_one();
            progress(done);
            if let Some(error @ FetchError::Cache(_)) = refused {
                return Err(error.into());
            }
        }
        self.intent().loading = HostedExperts::new();
        let (missing, left_out): (Vec<_>, Vec<_>) = left_out.into_iter().partition(|&pair| self.store.is_missing(pair));
        if !missing.is_empty() {
            tracing::info!(missing = missing.len(), "some experts are loaded when other programs give the card back");
        }
        let left_out = left_out.len();
        if left_out > 0 {
            let devices = self.devices();
            if self.store.is_empty() {
                return Err(VolunteerError::NoRoom { devices });
            }
            let (hosted, bytes) = (self.store.len(), self.store.bytes());
            tracing::warn!(left_out, hosted, bytes, %devices, "not all experts fit on the devices: the others are hosted");
        }
        refused.map_or(Ok(()), |error| Err(error.into()))
    }
}

/// Does what may take a device its time in a thread for that.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, VolunteerError> {
    tokio::task::spawn_blocking(work).await.map_err(|e| VolunteerError::Compute(e.to_string()))
}

/// An expert that is at hand, and what keeps it there until it is loaded.
pub(super) type Fetched = ((u32, u32), Option<Pin>);

/// Experts as they come, several being fetched at a time; from a folder they are at hand.
fn fetches(remote: Option<&RemoteModel>, experts: &[(u32, u32)]) -> impl Stream<Item = Result<Fetched, FetchError>> {
    let fetches = experts.iter().map(move |&(layer, expert)| async move {
        let Some(remote) = remote else { return Ok(((layer, expert), None)) };
        remote.fetch_expert(layer, expert).await.map(|pin| ((layer, expert), pin))
    });
    futures::stream::iter(fetches).buffer_unordered(BLOBS_AT_ONCE)
}

/// Fetches while somebody else loads.
async fn fetch_ahead(
    remote: Option<RemoteModel>,
    experts: Vec<(u32, u32)>,
    to: mpsc::Sender<Result<Fetched, FetchError>>,
) {
    let mut fetches = std::pin::pin!(fetches(remote.as_ref(), &experts));
    while let Some(fetched) = fetches.next().await {
        // Whoever waited for them has gone.
        if to.send(fetched).await.is_err() {
            return;
        }
    }
}

fn set(experts: &[(u32, u32)]) -> Result<HostedExperts, VolunteerError> {
    let mut set = HostedExperts::new();
    for &(layer, expert) in experts {
        set.insert(layer, expert)?;
    }
    Ok(set)
}
