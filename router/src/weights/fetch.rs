//! Fetching blobs into the cache: from several sources at once, group by group, each group checked before it is kept.

mod groups;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::FuturesUnordered;
use futures::{StreamExt, TryStreamExt};
use hanse_protocol::{GROUP_BYTES, GroupTree};

use super::cache::{Begin, Cache, CacheError, PartFile, Pin};
use super::peers::Peers;
use super::source::{Item, Source, SourceError};

/// Blobs fetched at a time: with one alone, the time between question and answer would be the pace.
pub const BLOBS_AT_ONCE: usize = 8;
/// How long to look again while another process fetches the same blob.
const ELSEWHERE_PAUSE: Duration = Duration::from_millis(50);
/// A source that fails is left alone this long; each further failure in a row doubles it.
const FIRST_BACK_OFF: Duration = Duration::from_millis(250);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(30);
/// How often new sources are looked for while none is at hand.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// A source that has not told a blob's chaining values after this is not waited for any longer: the next one is asked too.
const TREE_LATE: Duration = Duration::from_secs(1);
/// After a blob has been waited for in vain, others are not for at least so long.
const LEAST_IN_VAIN: Duration = Duration::from_secs(10);
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

/// What is known of a source.
#[derive(Debug, Default)]
struct Record {
    failures: u32,
    until: Option<Instant>,
    /// It gave bytes that were not what they should be, or said that it is of no use.
    dropped: Option<String>,
    /// What it has given, useful or not.
    bytes: u64,
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

    async fn fetch_into(&self, item: &Item, part: PartFile) -> Result<(), FetchError> {
        let part = Arc::new(part);
        let mut reasons: HashMap<String, String> = HashMap::new();
        let mut given_up_at = Instant::now() + self.patience;
        let mut tree = part.tree();
        loop {
            let sources = self.sources(item, &mut reasons);
            let nobody = sources.is_empty() && reasons.is_empty();
            let mut goes_on = false;
            if tree.is_none() {
                tree = self.find_tree(item, &part, &sources, &mut reasons).await?;
                goes_on = tree.is_some();
            }
            match &tree {
                Some(tree) => {
                    let missing = {
                        let (part, tree) = (part.clone(), tree.clone());
                        blocking(move || part.missing(&tree)).await?
                    };
                    if missing.is_empty() {
                        break;
                    }
                    goes_on |= groups::fetch(self, item, &part, tree, missing, &sources, &mut reasons).await?;
                }
                None => goes_on |= self.read_in_order(item, &part, &sources, &mut reasons).await?,
            }
            let whole = {
                let (part, tree) = (part.clone(), tree.clone());
                blocking(move || match tree {
                    Some(tree) => part.missing(&tree).map(|missing| missing.is_empty()),
                    None => part.is_right(),
                })
                .await?
            };
            if whole {
                break;
            }
            if goes_on {
                // With whomever.
                given_up_at = Instant::now() + self.patience;
            } else if Instant::now() >= given_up_at || (nobody && self.waited_in_vain()) {
                if nobody {
                    self.in_vain.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(Instant::now);
                }
                let mut reasons: Vec<String> =
                    reasons.into_iter().map(|(name, why)| format!("{name}: {why}")).collect();
                reasons.sort();
                return Err(FetchError::NoSource { what: item.what.to_string(), reasons });
            } else {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
        // No task holds it any more: they have all ended.
        if let Some(part) = Arc::into_inner(part) {
            blocking(move || part.finish()).await?;
        }
        Ok(())
    }

    /// The sources that may have the item and are not set aside, the best first.
    fn sources(&self, item: &Item, reasons: &mut HashMap<String, String>) -> Vec<Arc<dyn Source>> {
        let mut all = self.peers.as_ref().map(|peers| peers.sources(item)).unwrap_or_default();
        all.extend(self.fixed.iter().cloned());
        let records = self.records();
        let now = Instant::now();
        all.retain(|source| match records.get(&source.name()) {
            Some(Record { dropped: Some(why), .. }) => {
                reasons.insert(source.name(), why.clone());
                false
            }
            Some(record) => record.until.is_none_or(|until| until <= now),
            None => true,
        });
        all
    }

    /// The groups' chaining values, from the first who gives ones that prove themselves.
    async fn find_tree(
        &self,
        item: &Item,
        part: &Arc<PartFile>,
        sources: &[Arc<dyn Source>],
        reasons: &mut HashMap<String, String>,
    ) -> Result<Option<GroupTree>, FetchError> {
        let mut rest = sources.iter();
        let mut asked = FuturesUnordered::new();
        let ask = |source: &Arc<dyn Source>| {
            let source = source.clone();
            async move { (timed(source.tree(item)).await, source) }
        };
        loop {
            if asked.is_empty() {
                let Some(next) = rest.next() else { return Ok(None) };
                asked.push(ask(next));
            }
            let answer = match tokio::time::timeout(TREE_LATE, asked.next()).await {
                Ok(answer) => answer,
                // One that hangs does not keep the others from being asked.
                Err(_) => {
                    asked.extend(rest.next().map(ask));
                    continue;
                }
            };
            let Some((answer, source)) = answer else { continue };
            match answer {
                Ok(None) => {}
                Ok(Some(list)) => {
                    self.count(source.name(), list.len());
                    let Some(tree) = GroupTree::verified(item.blob.hash, item.blob.bytes, &list) else {
                        self.lied(&*source, item, reasons);
                        continue;
                    };
                    let (part, kept) = (part.clone(), tree.clone());
                    blocking(move || part.keep_tree(&kept)).await?;
                    self.well(&*source);
                    return Ok(Some(tree));
                }
                Err(error) => self.failed(&*source, &error, reasons),
            }
        }
    }

    /// Without chaining values nothing can be said of a part before the whole is there: it is read in order, from one source,
    /// and thrown away if it is wrong. Tells whether it went on.
    async fn read_in_order(
        &self,
        item: &Item,
        part: &Arc<PartFile>,
        sources: &[Arc<dyn Source>],
        reasons: &mut HashMap<String, String>,
    ) -> Result<bool, FetchError> {
        let mut goes_on = false;
        for source in sources {
            let start = part.length()?.min(item.blob.bytes) / GROUP_BYTES * GROUP_BYTES;
            let ranges = (start..item.blob.bytes).step_by(GROUP_BYTES as usize);
            let reads = ranges.map(|start| {
                let end = (start + GROUP_BYTES).min(item.blob.bytes);
                async move { (start, timed(source.read(item, start..end)).await) }
            });
            let mut reads = futures::stream::iter(reads).buffered(source.parallel().max(1));
            let mut failure = None;
            while let Some((start, read)) = reads.next().await {
                match read {
                    Ok(data) => {
                        self.count(source.name(), data.len());
                        goes_on = true;
                        write(part, start, data).await?;
                    }
                    Err(error) => {
                        failure = Some(error);
                        break;
                    }
                }
            }
            drop(reads);
            if let Some(error) = failure {
                self.failed(&**source, &error, reasons);
                continue;
            }
            let (checked, length) = (part.clone(), part.length()?);
            if length == item.blob.bytes && blocking(move || checked.is_right()).await? {
                self.well(&**source);
                return Ok(true);
            }
            // Whoever began it is to blame as much as who ended it; the next attempt is this one's alone or another's.
            let alone = start == 0;
            part.clear()?;
            if alone {
                self.lied(&**source, item, reasons);
            }
        }
        Ok(goes_on)
    }

    /// The source did what it should.
    fn well(&self, source: &dyn Source) {
        let mut records = self.records();
        if let Some(record) = records.get_mut(&source.name()) {
            record.failures = 0;
            record.until = None;
        }
    }

    fn failed(&self, source: &dyn Source, error: &SourceError, reasons: &mut HashMap<String, String>) {
        tracing::debug!(source = %source.name(), %error, "a source failed");
        reasons.insert(source.name(), error.to_string());
        let mut records = self.records();
        let record = records.entry(source.name()).or_default();
        let pause = match error {
            SourceError::NotHere => return,
            SourceError::Busy { retry_after } => *retry_after,
            SourceError::Useless(why) => {
                record.dropped = Some(why.clone());
                return;
            }
            SourceError::Failed(_) => {
                let pause = FIRST_BACK_OFF * 2u32.pow(record.failures.min(7));
                record.failures = record.failures.saturating_add(1);
                pause
            }
        };
        record.until = Some(Instant::now() + pause.min(LONGEST_BACK_OFF));
    }

    /// Whether blobs that nobody has were waited for not long ago, and nobody came.
    fn waited_in_vain(&self) -> bool {
        let mut in_vain = self.in_vain.lock().unwrap_or_else(PoisonError::into_inner);
        *in_vain = in_vain.filter(|since| since.elapsed() < self.patience.max(LEAST_IN_VAIN));
        in_vain.is_some()
    }

    /// Another source was asked later and was faster.
    fn late(&self, source: &dyn Source) {
        let error = SourceError::Failed("others were faster, though they were asked later".into());
        self.failed(source, &error, &mut HashMap::new());
    }

    /// A group was read in this time.
    fn took(&self, time: Duration) {
        let mut usual = self.usual.lock().unwrap_or_else(PoisonError::into_inner);
        *usual = Some(usual.map_or(time, |usual| (usual * 7 + time) / 8));
    }

    /// A read that takes longer than this is late.
    fn late_after(&self) -> Duration {
        let usual = *self.usual.lock().unwrap_or_else(PoisonError::into_inner);
        usual.map_or(LONGEST_READ / 10, |usual| (usual * 4).max(groups::LEAST_LATE))
    }

    /// The source gave something else than it should: it is not asked again.
    fn lied(&self, source: &dyn Source, item: &Item, reasons: &mut HashMap<String, String>) {
        let why = format!("what it gave for {} has another hash: it is not asked again", item.what);
        tracing::warn!(source = %source.name(), "{why}");
        self.failed(source, &SourceError::Useless(why), reasons);
    }
}

/// A source's answer, within a time.
async fn timed<T>(answer: impl Future<Output = Result<T, SourceError>>) -> Result<T, SourceError> {
    let late = |_| Err(SourceError::Failed(format!("no answer within {LONGEST_READ:?}")));
    tokio::time::timeout(LONGEST_READ, answer).await.unwrap_or_else(late)
}

async fn write(part: &Arc<PartFile>, offset: u64, data: Bytes) -> Result<(), FetchError> {
    let part = part.clone();
    Ok(blocking(move || part.write(offset, &data)).await?)
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
