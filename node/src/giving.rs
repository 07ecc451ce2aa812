//! Giving out the model itself: manifest and weights, from what this member has, behind everything else it does.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hanse_protocol::{Chunk, Fetch, Frame, Refusal, RefusalCode};
use hanse_router::weights::{Shelf, ShelfError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::owner::Bandwidth;

/// Chunks held in memory at a time, over all connections.
const MAX_CHUNKS: usize = 32;
/// Of these, for one connection.
pub(crate) const MAX_CHUNKS_OF_ONE: usize = 4;
/// Whoever would have to wait longer is told to come back.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// What a member gives out and how fast. No expert call waits for it.
#[derive(Debug)]
pub(crate) struct Giving {
    shelf: Arc<Shelf>,
    places: Arc<Semaphore>,
    pace: Option<Pace>,
}

/// A chunk, and the places that it takes until it is written.
pub(crate) type Held = (Frame, Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)>);

impl Giving {
    /// At most `bytes_per_second` in the long run; `None` for no limit.
    pub(crate) fn new(shelf: Arc<Shelf>, bytes_per_second: Option<u64>) -> Self {
        Self { shelf, places: Arc::new(Semaphore::new(MAX_CHUNKS)), pace: bytes_per_second.map(Pace::new) }
    }

    pub(crate) fn shelf(&self) -> &Arc<Shelf> {
        &self.shelf
    }

    /// The chunk, or why there is none. `own` are the places of the connection, `bandwidth` is the owner's limit on all that is
    /// sent.
    pub(crate) async fn answer(&self, fetch: &Fetch, own: Arc<Semaphore>, bandwidth: Option<&Bandwidth>) -> Held {
        let refused = |code, text: String, retry_after: Duration| {
            let retry_after_ms = retry_after.as_millis() as u32;
            (Frame::Refusal(Refusal { retry_after_ms, ..Refusal::new(fetch.request_id, code, text) }), None)
        };
        let busy = |after| refused(RefusalCode::Busy, "others are being given weights".into(), after);
        if fetch.model != self.shelf.model() {
            let text = format!("this peer gives out model {}", self.shelf.model());
            return refused(RefusalCode::ModelMismatch, text, Duration::ZERO);
        }
        let take = async {
            let own = own.acquire_owned().await.ok()?;
            Some((own, self.places.clone().acquire_owned().await.ok()?))
        };
        let Ok(Some(places)) = tokio::time::timeout(LONGEST_WAIT, take).await else { return busy(LONGEST_WAIT) };
        let (shelf, wanted, offset, length) = (self.shelf.clone(), fetch.wanted, fetch.offset, fetch.length);
        let read = tokio::task::spawn_blocking(move || shelf.read(wanted, offset, length)).await;
        match read {
            Ok(Ok((total, body))) => {
                if let Err(wait) = self.wait(body.len(), bandwidth).await {
                    return busy(wait);
                }
                let chunk = Chunk { request_id: fetch.request_id, total, offset, body };
                (Frame::Chunk(chunk), Some(places))
            }
            Ok(Err(error)) => {
                let code = match error {
                    ShelfError::NotHere => RefusalCode::NotHosted,
                    ShelfError::BadRange(_) => RefusalCode::Malformed,
                    _ => {
                        tracing::warn!(%error, "weights cannot be given out");
                        RefusalCode::Internal
                    }
                };
                refused(code, error.to_string(), Duration::ZERO)
            }
            Err(error) => refused(RefusalCode::Internal, error.to_string(), Duration::ZERO),
        }
    }
}

impl Giving {
    /// Waits until so many bytes may go; an error if that takes too long, with the time after which to ask again.
    async fn wait(&self, bytes: usize, bandwidth: Option<&Bandwidth>) -> Result<(), Duration> {
        if let Some(pace) = &self.pace {
            tokio::time::sleep(pace.wait(bytes as u64, Instant::now())?).await;
        }
        match bandwidth {
            Some(bandwidth) => bandwidth.wait_spare(bytes, LONGEST_WAIT).await,
            None => Ok(()),
        }
    }
}

/// Spreads bytes over time.
#[derive(Debug)]
struct Pace {
    bytes_per_second: u64,
    /// When everything promised so far has gone out.
    free_at: Mutex<Option<Instant>>,
}

impl Pace {
    fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), free_at: Mutex::new(None) }
    }

    /// How long to wait before so many bytes may go out; an error if that is too long, and then nothing is promised.
    fn wait(&self, bytes: u64, now: Instant) -> Result<Duration, Duration> {
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let start = free_at.unwrap_or(now).max(now);
        let wait = start - now;
        // The first in line is served however slow the pace is.
        if wait > LONGEST_WAIT {
            return Err(wait);
        }
        *free_at = Some(start + takes);
        Ok(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_keep_to_the_pace_and_late_comers_are_told_when_to_come_back() {
        let (pace, now) = (Pace::new(1000), Instant::now());
        assert_eq!(pace.wait(1500, now), Ok(Duration::ZERO));
        assert_eq!(pace.wait(1000, now), Ok(Duration::from_millis(1500)));
        assert_eq!(pace.wait(1000, now), Err(Duration::from_millis(2500)));
        let later = now + Duration::from_secs(1);
        assert_eq!(pace.wait(1000, later), Ok(Duration::from_millis(1500)));
        assert_eq!(pace.wait(10, later + Duration::from_secs(60)), Ok(Duration::ZERO));
    }
}
