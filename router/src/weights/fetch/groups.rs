//! The groups of one blob, shared out among sources.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hanse_protocol::{GROUP_BYTES, GroupTree};
use tokio::sync::Notify;

use super::{FetchError, Fetcher, PartFile, blocking, timed};
use crate::weights::cache::CacheError;
use crate::weights::source::{Item, Source, SourceError};

/// A group is asked of a second source no sooner than this.
const LEAST_LATE: Duration = Duration::from_millis(300);

/// Who fetches what.
struct Board {
    missing: VecDeque<u64>,
    /// Being read: since when, and by how many.
    in_flight: BTreeMap<u64, (Instant, usize)>,
    left: usize,
    /// How long a read usually takes.
    usual: Option<Duration>,
}

/// How a worker ended.
enum End {
    /// There is nothing left to do.
    Done,
    Failed(SourceError),
    Lied,
    Cache(CacheError),
}

/// Reads the groups `missing`, each from one source, as many at a time as the sources take. A source that fails is not asked
/// for more in this round; groups that are late are asked of another one as well. Ends when all are there or no source is left.
pub(super) async fn fetch(
    fetcher: &Fetcher,
    item: &Item,
    part: &Arc<PartFile>,
    tree: &GroupTree,
    missing: Vec<u64>,
    sources: &[Arc<dyn Source>],
    reasons: &mut HashMap<String, String>,
) -> Result<(), FetchError> {
    let left = missing.len();
    let board = Mutex::new(Board { missing: missing.into(), in_flight: BTreeMap::new(), left, usual: None });
    let changed = Notify::new();
    let tree = Arc::new(tree.clone());
    let workers = FuturesUnordered::new();
    for source in sources {
        for _ in 0..source.parallel().clamp(1, left) {
            let (board, changed, tree) = (&board, &changed, &tree);
            workers.push(async move {
                let end = work(fetcher, item, part, tree, &**source, board, changed).await;
                changed.notify_waiters();
                (source, end)
            });
        }
    }
    tokio::pin!(workers);
    while let Some((source, end)) = workers.next().await {
        match end {
            // What others still read is not needed any more: dropping them takes the requests back.
            End::Done => return Ok(()),
            End::Failed(error) => fetcher.failed(&**source, &error, reasons),
            End::Lied => fetcher.lied(&**source, item, reasons),
            End::Cache(error) => return Err(error.into()),
        }
    }
    Ok(())
}

async fn work(
    fetcher: &Fetcher,
    item: &Item,
    part: &Arc<PartFile>,
    tree: &Arc<GroupTree>,
    source: &dyn Source,
    board: &Mutex<Board>,
    changed: &Notify,
) -> End {
    let lock = || board.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        // Made before looking, so that no change is missed.
        let change = changed.notified();
        // Not within the match, which would hold the lock while it waits.
        let turn = lock().take(Instant::now());
        let group = match turn {
            Turn::Group(group) => group,
            Turn::Done => return End::Done,
            Turn::Wait(time) => {
                // Either way it is looked again.
                let _ = tokio::time::timeout(time, change).await;
                continue;
            }
        };
        let start = group * GROUP_BYTES;
        let end = (start + GROUP_BYTES).min(item.blob.bytes);
        let began = Instant::now();
        let read = timed(source.read(item, start..end)).await;
        let data = match read {
            Ok(data) => data,
            Err(error) => {
                lock().put_back(group);
                return End::Failed(error);
            }
        };
        fetcher.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        let kept = {
            let (part, tree) = (part.clone(), tree.clone());
            blocking(move || {
                let right = tree.fits(group, &data);
                if right {
                    part.write(start, &data)?;
                }
                Ok(right)
            })
            .await
        };
        match kept {
            Ok(true) => {
                fetcher.well(source);
                lock().done(group, began.elapsed());
                changed.notify_waiters();
            }
            Ok(false) => {
                lock().put_back(group);
                return End::Lied;
            }
            Err(error) => {
                lock().put_back(group);
                return End::Cache(error);
            }
        }
    }
}

enum Turn {
    Group(u64),
    Wait(Duration),
    Done,
}

impl Board {
    fn take(&mut self, now: Instant) -> Turn {
        if self.left == 0 {
            return Turn::Done;
        }
        if let Some(group) = self.missing.pop_front() {
            self.in_flight.insert(group, (now, 1));
            return Turn::Group(group);
        }
        // Everything is being read. What is late is read a second time, by whoever has nothing to do.
        let late = self.usual.map_or(super::LONGEST_READ / 4, |usual| (usual * 4).max(LEAST_LATE));
        let oldest =
            self.in_flight.iter().filter(|(_, (_, readers))| *readers == 1).min_by_key(|(_, (since, _))| *since);
        let Some((&group, &(since, _))) = oldest else { return Turn::Wait(late) };
        let waited = now.saturating_duration_since(since);
        if waited < late {
            return Turn::Wait(late - waited);
        }
        self.in_flight.insert(group, (now, 2));
        Turn::Group(group)
    }

    fn put_back(&mut self, group: u64) {
        match self.in_flight.get_mut(&group) {
            Some((_, readers)) if *readers > 1 => *readers -= 1,
            Some(_) => {
                self.in_flight.remove(&group);
                self.missing.push_front(group);
            }
            // Somebody else has brought it.
            None => {}
        }
    }

    fn done(&mut self, group: u64, took: Duration) {
        if self.in_flight.remove(&group).is_some() {
            self.left -= 1;
        }
        self.usual = Some(self.usual.map_or(took, |usual| (usual * 7 + took) / 8));
    }
}
