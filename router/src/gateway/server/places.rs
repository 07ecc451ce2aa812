//! How many connections there are: a bounded number, and one that waits for its other end makes place for a newcomer.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A connection keeps its place for so long while it waits, so that what was sent on it is read before it is judged.
const LEAST: Duration = Duration::from_millis(200);

/// The places of a server's connections.
#[derive(Debug)]
pub(super) struct Places {
    most: usize,
    taken: Mutex<Taken>,
    left: Notify,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    connections: HashMap<u64, Connection>,
}

#[derive(Debug)]
struct Connection {
    /// Since when it waits for its other end: for a request, for the rest of one, or for an answer to be taken. `None` while a
    /// request is being answered.
    idle_since: Option<Instant>,
    evicted: CancellationToken,
}

/// The place of one connection, free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    number: u64,
    places: Arc<Places>,
    evicted: CancellationToken,
}

impl Places {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most: most.max(1), taken: Mutex::default(), left: Notify::new() })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new connection; waits for one while all others are answering requests.
    pub(super) async fn enter(self: &Arc<Self>) -> Arc<Place> {
        loop {
            match self.try_enter() {
                Ok(place) => return Arc::new(place),
                Err(Some(soon)) => {
                    let _ = tokio::time::timeout_at(soon, self.left.notified()).await;
                }
                Err(None) => self.left.notified().await,
            }
        }
    }

    /// A place, or when one may be had by eviction if no other is left before.
    fn try_enter(self: &Arc<Self>) -> Result<Place, Option<Instant>> {
        let mut taken = self.taken();
        if taken.connections.len() >= self.most {
            taken.evict()?;
        }
        let (number, evicted) = (taken.next, CancellationToken::new());
        taken.next += 1;
        taken.connections.insert(number, Connection { idle_since: Some(Instant::now()), evicted: evicted.clone() });
        Ok(Place { number, places: self.clone(), evicted })
    }

    /// Closes the connection that has waited longest for its other end, if one does.
    pub(super) fn evict(&self) {
        // Where there is none, others are being served.
        let _ = self.taken().evict();
    }
}

impl Taken {
    fn evict(&mut self) -> Result<(), Option<Instant>> {
        let idle = self.connections.iter().filter_map(|(&number, at)| Some((at.idle_since?, number)));
        let (since, longest) = idle.min().ok_or(None)?;
        if since.elapsed() < LEAST {
            return Err(Some(since + LEAST));
        }
        if let Some(connection) = self.connections.remove(&longest) {
            connection.evicted.cancel();
        }
        Ok(())
    }
}

impl Place {
    /// Completes when another connection has got this place.
    pub(super) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    fn set_idle_since(&self, since: Option<Instant>) {
        if let Some(connection) = self.places.taken().connections.get_mut(&self.number) {
            connection.idle_since = since;
        }
        if since.is_some() {
            self.places.left.notify_one();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken().connections.remove(&self.number);
        self.places.left.notify_one();
    }
}

/// A request's body: when all of it has come, the request is being answered.
pub(super) struct Arriving<B> {
    body: B,
    place: Arc<Place>,
}

impl<B: Body> Arriving<B> {
    pub(super) fn new(body: B, place: Arc<Place>) -> Self {
        let arriving = Self { body, place };
        arriving.look();
        arriving
    }

    fn look(&self) {
        if self.body.is_end_stream() {
            self.place.set_idle_since(None);
        }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Arriving<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        self.look();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response's body: when the server has all of it, only its reader is waited for.
pub(super) struct Leaving<B> {
    body: B,
    place: Arc<Place>,
}

impl<B> Leaving<B> {
    pub(super) fn new(body: B, place: Arc<Place>) -> Self {
        Self { body, place }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Leaving<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B> Drop for Leaving<B> {
    fn drop(&mut self) {
        self.place.set_idle_since(Some(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_waits_longest_for_its_other_end_makes_place() {
        let places = Places::new(2);
        let first = places.enter().await;
        let second = places.enter().await;
        first.set_idle_since(None);
        let third = places.enter().await;
        assert!(second.evicted.is_cancelled() && !first.evicted.is_cancelled(), "the first is being answered");
        third.set_idle_since(None);
        drop(second);
        assert!(places.try_enter().is_err_and(|soon| soon.is_none()), "both others are being answered");
        let waits = tokio::spawn({
            let places = places.clone();
            async move { places.enter().await }
        });
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        first.set_idle_since(Some(Instant::now()));
        tokio::time::sleep(LEAST / 2).await;
        assert!(!waits.is_finished(), "what was sent may not have been read yet");
        let fourth = waits.await.unwrap();
        assert!(first.evicted.is_cancelled() && !third.evicted.is_cancelled());
        drop((first, third, fourth));
        assert_eq!(places.taken().connections.len(), 0);
    }
}
