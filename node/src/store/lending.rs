//! Devices that other programs want: what lies on them is given up, and taken in again when they come back.

use std::collections::BTreeSet;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hanse_model::{Device, HeldExpert};

use super::{ExpertStore, FREED_POLL};

/// What is not here for the sake of others.
#[derive(Debug, Default)]
pub(super) struct Away {
    /// The names of devices that are lent.
    devices: BTreeSet<String>,
    /// Experts that lay there, or would have been put there.
    experts: BTreeSet<(u32, u32)>,
}

/// What became of a device that was to be lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lent {
    /// Experts that were given up.
    pub experts: usize,
    /// All its memory is free: nobody of this process has anything of the device.
    pub freed: bool,
    /// So long that took.
    pub took: Duration,
}

impl ExpertStore {
    fn away(&self) -> MutexGuard<'_, Away> {
        self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up a device with all that lies on it, until [`Self::take_back`]. Work that is being computed is finished, work that waits
    /// is refused. Blocks until the device's memory is free, or for `within`; frees it in this thread, which takes a card its time.
    /// `None` if no such device is here.
    pub fn lend(&self, name: &str, within: Duration) -> Option<Lent> {
        let begun = Instant::now();
        let device = {
            let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
            let at = devices.iter().position(|device| device.name() == name)?;
            // Before it is missed by others: who finds no device asks whether one is lent.
            self.away().devices.insert(name.to_owned());
            devices.remove(at)
        };
        let given_up = self.change(|experts| {
            let given_up: Vec<_> = experts.extract_if(.., |_, held| held.is_on(&device)).collect();
            self.away().experts.extend(given_up.iter().map(|(pair, _)| *pair));
            given_up
        });
        self.lost.notify_one();
        let experts = given_up.len();
        let weights: Vec<Arc<HeldExpert>> = given_up.into_iter().map(|(_, held)| held).collect();
        // A snapshot that somebody computes with has them still.
        let is_used = || weights.iter().any(|held| Arc::strong_count(held) > 1);
        while is_used() && begun.elapsed() < within {
            std::thread::sleep(FREED_POLL);
        }
        drop(weights);
        let left = Arc::downgrade(&device);
        drop(device);
        while left.strong_count() > 0 && begun.elapsed() < within {
            std::thread::sleep(FREED_POLL);
        }
        Some(Lent { experts, freed: left.strong_count() == 0, took: begun.elapsed() })
    }

    /// Takes a device that was lent, and has been opened anew.
    pub fn take_back(&self, device: Arc<dyn Device>) {
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        if self.away().devices.remove(device.name()) {
            devices.push(device);
            self.is_full.store(false, std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// The names of devices that are lent, in order.
    #[must_use]
    pub fn lent(&self) -> Vec<String> {
        self.away().devices.iter().cloned().collect()
    }

    /// Notes experts for which there is no place while a device is lent.
    pub(super) fn miss(&self, experts: &[(u32, u32)]) {
        let mut away = self.away();
        if !away.devices.is_empty() {
            away.experts.extend(experts);
        }
    }

    /// The experts that are missing for the sake of others, ascending; they are not noted any more.
    pub(crate) fn take_missing(&self) -> Vec<(u32, u32)> {
        let missing = std::mem::take(&mut self.away().experts);
        let held = self.snapshot();
        missing.into_iter().filter(|(layer, expert)| held.expert(*layer, *expert).is_none()).collect()
    }

    /// Whether an expert is to come back.
    pub(crate) fn is_missing(&self, pair: (u32, u32)) -> bool {
        self.away().experts.contains(&pair)
    }
}
