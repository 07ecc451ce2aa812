//! The experts that this volunteer holds.

mod lending;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Duration;

use hanse_model::{Checkpoint, Device, DeviceError, Expert, HeldExpert, LoadError};
use hanse_protocol::{HostedError, HostedExperts};
use tokio::sync::Notify;

use lending::Away;
pub use lending::Lent;

/// How often it is looked whether given up experts are free.
const FREED_POLL: Duration = Duration::from_millis(5);

/// Experts by layer and number.
type Experts = BTreeMap<(u32, u32), Arc<HeldExpert>>;

/// An expert that is not served yet.
type Loaded = ((u32, u32), Arc<HeldExpert>);

/// Loaded experts by layer and number, on one device or several. They may change while it serves: whoever computes works on a
/// `Snapshot`.
#[derive(Debug)]
pub struct ExpertStore {
    experts: RwLock<Arc<Experts>>,
    hidden_size: usize,
    /// Those that work.
    devices: RwLock<Vec<Arc<dyn Device>>>,
    /// Those that other programs have at present. Locked after `devices` and `experts`.
    away: Mutex<Away>,
    /// Experts have gone with their device.
    lost: Notify,
    /// The last expert that was to be held did not fit, and none has gone since.
    is_full: AtomicBool,
}

/// The experts of a store at one moment. They stay usable for as long as it is kept.
#[derive(Debug, Clone)]
pub struct Snapshot(Arc<Experts>);

impl Snapshot {
    /// The expert, if it is here.
    #[must_use]
    pub fn expert(&self, layer: u32, expert: u32) -> Option<&HeldExpert> {
        self.0.get(&(layer, expert)).map(Arc::as_ref)
    }
}

/// Experts that were given up.
#[derive(Debug)]
pub struct Removed(Vec<Weak<HeldExpert>>);

impl Removed {
    /// Waits until nobody computes with them any more and their memory is free, or until the time is over.
    pub async fn freed(self, timeout: Duration) {
        let freed = async {
            while self.0.iter().any(|expert| expert.strong_count() > 0) {
                tokio::time::sleep(FREED_POLL).await;
            }
        };
        if tokio::time::timeout(timeout, freed).await.is_err() {
            tracing::warn!("experts that were given up are still computed with");
        }
    }
}

impl ExpertStore {
    /// An empty store for rows of `hidden_size` values, whose experts lie on `devices`.
    #[must_use]
    pub fn new(hidden_size: usize, devices: Vec<Arc<dyn Device>>) -> Self {
        Self {
            experts: RwLock::default(),
            hidden_size,
            devices: RwLock::new(devices),
            away: Mutex::default(),
            lost: Notify::new(),
            is_full: AtomicBool::new(false),
        }
    }

    /// Loads experts and holds them from then on, each on the device with most room; all of them or, after an error, none.
    /// Returns those for which no device has room.
    ///
    /// # Errors
    /// The first tensor that is missing or has a wrong shape.
    pub fn add(&self, checkpoint: &Checkpoint, wanted: &[(u32, u32)]) -> Result<Vec<(u32, u32)>, LoadError> {
        let (mut loaded, mut left_out) = (Vec::with_capacity(wanted.len()), Vec::new());
        for &(layer, expert) in wanted {
            match self.place(|| Expert::load(checkpoint, layer as usize, expert as usize))? {
                Some(held) => loaded.push(((layer, expert), Arc::new(held))),
                None => left_out.push((layer, expert)),
            }
            // A device may have failed meanwhile, or be wanted by others, who do not wait for the rest.
            self.leave(&mut loaded, &mut left_out);
        }
        let mut gone = Vec::new();
        self.change(|experts| {
            gone = self.leave(&mut loaded, &mut left_out);
            experts.extend(loaded);
        });
        self.miss(&left_out);
        Ok(left_out)
    }

    /// Takes out what lies on devices that are not here any more.
    fn leave(&self, loaded: &mut Vec<Loaded>, left_out: &mut Vec<(u32, u32)>) -> Vec<Loaded> {
        let gone: Vec<_> = loaded.extract_if(.., |(_, held)| !self.works(held.device())).collect();
        left_out.extend(gone.iter().map(|(pair, _)| *pair));
        gone
    }

    /// Whether a device takes experts and computes them.
    pub(crate) fn works(&self, device: &Arc<dyn Device>) -> bool {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        devices.iter().any(|other| std::ptr::addr_eq(Arc::as_ptr(device), Arc::as_ptr(other)))
    }

    /// Has the device with most room take an expert, or the next where that is not enough.
    fn place(&self, load: impl Fn() -> Result<Expert, LoadError>) -> Result<Option<HeldExpert>, LoadError> {
        let mut devices: Vec<_> =
            self.devices().into_iter().filter_map(|device| Some((self.free(&device)?, device))).collect();
        devices.sort_by_key(|(free, _)| std::cmp::Reverse(*free));
        for (_, device) in devices {
            match HeldExpert::new(&device, load()?) {
                Ok(held) => return Ok(Some(held)),
                Err(error @ DeviceError::NoRoom { .. }) => tracing::debug!(%error, "an expert does not fit"),
                Err(error) => self.give_up(&device, &error),
            }
        }
        self.is_full.store(true, Ordering::Relaxed);
        Ok(None)
    }

    /// Bytes of experts that a device could take; `None` if it has just failed.
    fn free(&self, device: &Arc<dyn Device>) -> Option<u64> {
        let free = device.free_bytes();
        free.map_err(|error| self.give_up(device, &error)).ok().map(|free| free.unwrap_or(u64::MAX))
    }

    /// The most bytes of experts that all devices can hold, those that are here included, where each takes up to `expert_bytes`. A
    /// device may use more memory for an expert than it has bytes; when one did not fit, what is here is all.
    pub(crate) fn capacity(&self, expert_bytes: u64) -> u64 {
        if self.is_full.load(Ordering::Relaxed) {
            return self.bytes();
        }
        let whole = |free: u64| if free == u64::MAX { free } else { free - free % expert_bytes.max(1) };
        let free: Vec<u64> = self.devices().iter().filter_map(|device| self.free(device)).collect();
        free.into_iter().map(whole).fold(self.bytes(), u64::saturating_add)
    }

    /// The devices that work and are not lent to others.
    #[must_use]
    pub fn devices(&self) -> Vec<Arc<dyn Device>> {
        self.devices.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A device has failed: it gets no more experts, and those that it holds are not here any more.
    pub(crate) fn give_up(&self, failed: &Arc<dyn Device>, error: &DeviceError) {
        {
            let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
            let before = devices.len();
            devices.retain(|device| !std::ptr::addr_eq(Arc::as_ptr(device), Arc::as_ptr(failed)));
            if devices.len() == before {
                return;
            }
        }
        let given_up = self.change(|experts| experts.extract_if(.., |_, held| held.is_on(failed)).collect::<Vec<_>>());
        let (device, given_up) = (failed.name(), given_up.len());
        tracing::error!(device, given_up, left = self.len(), %error, "a device failed and its experts are given up; start anew to use it again");
        self.lost.notify_one();
    }

    /// Completes when a device has failed or was lent since the last time.
    pub(crate) async fn lost(&self) {
        self.lost.notified().await;
    }

    /// Gives experts up. Work that was accepted before is still done: it has a snapshot, and until it is done the memory is not free.
    pub fn remove(&self, unwanted: &[(u32, u32)]) -> Removed {
        let removed: Vec<_> = self.change(|experts| unwanted.iter().filter_map(|pair| experts.remove(pair)).collect());
        self.is_full.store(false, Ordering::Relaxed);
        Removed(removed.iter().map(Arc::downgrade).collect())
    }

    /// What `change` takes out and gives back is freed after others may look again: a card takes its time.
    fn change<T>(&self, change: impl FnOnce(&mut Experts) -> T) -> T {
        let mut experts = self.experts.write().unwrap_or_else(PoisonError::into_inner);
        // The map is copied only while somebody computes with the old one; the weights never are.
        change(Arc::make_mut(&mut experts))
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
