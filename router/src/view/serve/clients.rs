//! How many pages are open: a bounded number, and the one that has been open longest makes place for another.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// The most pages at a time.
const MOST: usize = 64;
/// A page may be open for so long at least. That it takes its events is not known: much of them fits into a system's buffers.
const LEAST: Duration = Duration::from_secs(5);

/// The open pages by number, each with the time when it was opened.
#[derive(Debug, Default)]
pub(super) struct Clients(Mutex<Places>);

#[derive(Debug, Default)]
struct Places {
    next: u64,
    taken: BTreeMap<u64, Instant>,
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

    /// A place, if there is one or a page has been open long enough: a page whose events end comes back by itself.
    pub(super) fn enter(self: &Arc<Self>, now: Instant) -> Option<Place> {
        let mut places = self.places();
        if places.taken.len() >= MOST {
            let oldest = places.taken.first_entry()?;
            if now.saturating_duration_since(*oldest.get()) < LEAST {
                return None;
            }
            oldest.remove();
        }
        let number = places.next;
        places.next += 1;
        places.taken.insert(number, now);
        Some(Place { number, clients: self.clone() })
    }
}

impl Place {
    /// Whether the page still has its place.
    pub(super) fn is_kept(&self) -> bool {
        self.clients.places().taken.contains_key(&self.number)
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
    fn the_one_that_has_been_open_longest_makes_place() {
        let (clients, start) = (Arc::new(Clients::default()), Instant::now());
        let places: Vec<_> = (0..MOST).map(|_| clients.enter(start).unwrap()).collect();
        let newcomer = clients.enter(start + LEAST).unwrap();
        assert!(!places[0].is_kept() && places[1].is_kept() && newcomer.is_kept());
        drop(places);
        assert_eq!(clients.places().taken.len(), 1, "only the newcomer is left");
    }
}
