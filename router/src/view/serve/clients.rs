//! How many pages are open: a bounded number, and those that have stalled make place for others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// The most pages at a time.
const MOST: usize = 64;
/// One that has taken nothing for so long gives its place to another if there is no other left.
const STALLED: Duration = Duration::from_secs(10);

/// The open pages, each with the time when it last took a document.
#[derive(Debug, Default)]
pub(super) struct Clients(Mutex<Places>);

#[derive(Debug, Default)]
struct Places {
    next: u64,
    taken: HashMap<u64, Instant>,
}

/// The place of one page, which is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    number: u64,
    clients: Arc<Clients>,
}

impl Clients {
    fn places(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place, if there is one or another page has stalled.
    pub(super) fn enter(self: &Arc<Self>, now: Instant) -> Option<Place> {
        let mut places = self.places();
        if places.taken.len() >= MOST {
            let (&stalled, &at) = places.taken.iter().min_by_key(|(_, at)| **at)?;
            if now.saturating_duration_since(at) < STALLED {
                return None;
            }
            places.taken.remove(&stalled);
        }
        let number = places.next;
        places.next += 1;
        places.taken.insert(number, now);
        Some(Place { number, clients: self.clone() })
    }
}

impl Place {
    /// Notes that the page takes documents; `false` if it has lost its place meanwhile.
    pub(super) fn is_kept(&self, now: Instant) -> bool {
        self.clients.places().taken.get_mut(&self.number).map(|at| *at = now).is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clients.places().taken.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_place_for_so_many_and_for_more_when_some_leave() {
        let (clients, now) = (Arc::new(Clients::default()), Instant::now());
        let mut places: Vec<_> = (0..MOST).map(|_| clients.enter(now).unwrap()).collect();
        assert!(clients.enter(now).is_none());
        places.pop();
        assert!(clients.enter(now).is_some());
    }

    #[test]
    fn one_that_takes_nothing_loses_its_place_to_another() {
        let (clients, start) = (Arc::new(Clients::default()), Instant::now());
        let places: Vec<_> = (0..MOST).map(|_| clients.enter(start).unwrap()).collect();
        let later = start + STALLED;
        assert!(places[1..].iter().all(|place| place.is_kept(later)));
        let newcomer = clients.enter(later).unwrap();
        assert!(!places[0].is_kept(later) && newcomer.is_kept(later));
        assert!(clients.enter(later).is_none(), "the others are lively");
        drop(places);
        assert_eq!(clients.places().taken.len(), 1, "only the newcomer is left");
    }
}
