//! Fetching blobs into the cache: from several sources at once, group by group, each group checked before it is kept.

mod blob;
mod groups;
mod records;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};

use super::cache::{Begin, Cache, CacheError, Pin};
use super::peers::Peers;
use super::source::{Item, Source};
use records::Record;

/// Blobs fetched at a time: with one alone, the time between question and answer would be the pace.
pub const BLOBS_AT_ONCE: usize = 8;
/// How long to look again while another process fetches the same blob.
const ELSEWHERE_PAUSE: Duration = Duration::from_millis(50);
/// The longest that one read may take.
pub(super) const LONGEST_READ: Duration = Duration::from_secs(20);

/// Why a blob could not be fetched.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// Nobody who can be reached has it, or all who have it failed or gave other bytes.
    #[error("{what} cannot be fetched: {}", reasons_text(.reasons))]
    NoSource {
        /// What was wanted.
        what: String,
        /// What each source that was asked said.
        reasons: Vec<String>,
    },
    /// The cache cannot take it.
    #[error(transparent)]
    Cache(#[from] Arc<CacheError>),
}

fn reasons_text(reasons: &[String]) -> String {
    if reasons.is_empty() { "no source has it".to_owned() } else { reasons.join("; ") }
}

impl From<CacheError> for FetchError {
    fn from(error: CacheError) -> Self {
        Self::Cache(Arc::new(error))
    }
}

/// Fetches blobs from all sources there are. Shared by all tasks of a process.
#[derive(Debug)]
pub struct Fetcher {
    cache: Cache,
    fixed: Vec<Arc<dyn Source>>,
    peers: Option<Arc<Peers>>,
    patience: Duration,
    records: Mutex<HashMap<String, Record>>,
    /// When a blob was last waited for in vain, with nobody who might have it.
    in_vain: Mutex<Option<Instant>>,
    /// How long a read of one group usually takes, over all blobs.
    usual: Mutex<Option<Duration>>,
}

impl Fetcher {
    /// Into `cache`, from `fixed` sources and from `peers`. A blob that nobody has is waited for as long as `patience`; if that was
    /// in vain, others that nobody has are not waited for as well.
    #[must_use]
    pub fn new(cache: Cache, fixed: Vec<Arc<dyn Source>>, peers: Option<Arc<Peers>>, patience: Duration) -> Self {
        Self {
            cache,
            fixed,
            peers,
            patience,
            records: Mutex::default(),
            in_vain: Mutex::default(),
            usual: Mutex::default(),
        }
    }

    /// Where blobs are kept.
    #[must_use]
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The peers that are asked.
    #[must_use]
    pub fn peers(&self) -> Option<&Arc<Peers>> {
        self.peers.as_ref()
    }

    /// Bytes that sources have given so far, those that were of no use included.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.records().values().map(|record| record.bytes).sum()
    }

    /// The same for each source that has given something, by its name; who gave most comes first.
    #[must_use]
    pub fn bytes_by_source(&self) -> Vec<(String, u64)> {
        let records = self.records();
        let given = records.iter().filter(|(_, record)| record.bytes > 0);
        let mut by_source: Vec<(String, u64)> = given.map(|(name, record)| (name.clone(), record.bytes)).collect();
        by_source.sort_by(|(a, most), (b, least)| least.cmp(most).then_with(|| a.cmp(b)));
        by_source
    }

    fn records(&self) -> MutexGuard<'_, HashMap<String, Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The source of this name has given so many bytes.
    pub(super) fn count(&self, source: String, bytes: usize) {
        self.records().entry(source).or_default().bytes += bytes as u64;
    }

    /// Whether somebody is at hand who may have it.
    #[must_use]
    pub fn has_source(&self, item: &Item) -> bool {
        !self.sources(item, &mut HashMap::new()).is_empty()
    }

    /// Fetches what is not in the cache yet, and says that it is in use. `progress` is told bytes done and bytes in all.
    ///
    /// A dropped future leaves what has been fetched for another time.
    ///
    /// # Errors
    /// The first blob that cannot be fetched.
    pub async fn fetch_all(
        &self,
        items: &[Item],
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Vec<Pin>, FetchError> {
        let total = items.iter().map(|item| item.blob.bytes).sum();
        let done = AtomicU64::new(0);
        progress(0, total);
        futures::stream::iter(items)
            .map(|item| async {
                let pin = self.fetch_pinned(item).await?;
                progress(done.fetch_add(item.blob.bytes, Ordering::Relaxed) + item.blob.bytes, total);
                Ok(pin)
            })
            .buffer_unordered(BLOBS_AT_ONCE)
            .try_collect()
            .await
    }

    /// Fetches one blob unless it is in the cache, and says that it is in use.
    ///
    /// # Errors
    /// [`FetchError`], as its variants say.
    pub async fn fetch_pinned(&self, item: &Item) -> Result<Pin, FetchError> {
        loop {
            self.fetch(item).await?;
            // It may be gone again at once, if the cache is small.
            if let Some(opened) = self.cache.open(&item.blob)? {
                return Ok(opened.pin);
            }
        }
    }

    /// Fetches one blob unless it is in the cache. Afterwards it is there, and it is right.
    ///
    /// # Errors
    /// [`FetchError`], as its variants say.
    pub async fn fetch(&self, item: &Item) -> Result<(), FetchError> {
        loop {
            let cache = self.cache.clone();
            let blob = item.blob;
            match blocking(move || cache.begin(blob)).await? {
                Begin::Present => return Ok(()),
                Begin::Elsewhere => tokio::time::sleep(ELSEWHERE_PAUSE).await,
                Begin::Ours(part) => return self.fetch_into(item, part).await,
            }
        }
    }
}

/// Work on files, away from the threads of the network.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CacheError> + Send + 'static,
) -> Result<T, CacheError> {
    let ended = |error: tokio::task::JoinError| {
        Err(CacheError::Io { path: Default::default(), source: std::io::Error::other(error) })
    };
    tokio::task::spawn_blocking(work).await.unwrap_or_else(ended)
}
