//! The groups of one blob, shared out among sources.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hanse_protocol::{GROUP_BYTES, GroupTree};
use tokio::sync::Notify;

use super::blob::timed;
use super::{FetchError, Fetcher, blocking};
use crate::weights::cache::{CacheError, PartFile};
use crate::weights::source::{Item, Source, SourceError};

/// A group is asked of a second source no sooner than this.
pub(super) const LEAST_LATE: Duration = Duration::from_millis(300);

/// Who fetches what.
struct Board {
    missing: VecDeque<u64>,
    /// Being read.
    in_flight: BTreeMap<u64, Reads>,
    left: usize,
}

/// Who reads one group.
struct Reads {
    /// When it was asked for last.
    since: Instant,
    /// Places in the list of sources: one, or two if the first was late.
    by: Vec<usize>,
}

/// How a worker ended.
enum End {
    /// There is nothing left to do.
    Done,
    Failed(SourceError),
    Lied,
    Cache(CacheError),
}

/// What all who read one blob share.
struct Round<'a> {
    fetcher: &'a Fetcher,
    item: &'a Item,
    part: &'a Arc<PartFile>,
    tree: Arc<GroupTree>,
    sources: &'a [Arc<dyn Source>],
    board: Mutex<Board>,
    changed: Notify,
}

/// Reads the groups `missing`, each from one source, as many at a time as the sources take. A source that fails is not asked
/// for more in this round; groups that are late are asked of another one as well. Ends when all are there or no source is left,
/// and tells whether any has come.
pub(super) async fn fetch(
    fetcher: &Fetcher,
    item: &Item,
    part: &Arc<PartFile>,
    tree: &GroupTree,
    missing: Vec<u64>,
    sources: &[Arc<dyn Source>],
    reasons: &mut HashMap<String, String>,
) -> Result<bool, FetchError> {
    let left = missing.len();
    let board = Mutex::new(Board { missing: missing.into(), in_flight: BTreeMap::new(), left });
    let (tree, changed) = (Arc::new(tree.clone()), Notify::new());
    let round = Round { fetcher, item, part, tree, sources, board, changed };
    let workers = FuturesUnordered::new();
    for (place, source) in sources.iter().enumerate() {
        for _ in 0..source.parallel().clamp(1, left) {
            let round = &round;
            workers.push(async move {
                let end = round.work(place, &**source).await;
                round.changed.notify_waiters();
                (source, end)
            });
        }
    }
    tokio::pin!(workers);
    while let Some((source, end)) = workers.next().await {
        match end {
            // What others still read is not needed any more: dropping them takes the requests back.
            End::Done => return Ok(true),
            End::Failed(error) => fetcher.failed(&**source, &error, reasons),
            End::Lied => fetcher.lied(&**source, item, reasons),
            End::Cache(error) => return Err(error.into()),
        }
    }
    let still = round.board().left;
    Ok(still < left)
}

impl Round<'_> {
    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads one group after another from a source, which has this place in the list.
    async fn work(&self, place: usize, source: &dyn Source) -> End {
        let fetcher = self.fetcher;
        loop {
            // Made before looking, so that no change is missed.
            let change = self.changed.notified();
            // Not within the match, which would hold the lock while it waits.
            let turn = self.board().take(place, fetcher.late_after(), Instant::now());
            let group = match turn {
                Turn::Group(group) => group,
                Turn::Done => return End::Done,
                Turn::Wait(time) => {
                    // Either way it is looked again.
                    let _ = tokio::time::timeout(time, change).await;
                    continue;
                }
            };
            let began = Instant::now();
            match self.read(group, source).await {
                Ok(()) => {
                    fetcher.well(source);
                    fetcher.took(began.elapsed());
                    let passed = self.board().done(group, place);
                    passed
                        .into_iter()
                        .filter_map(|place| self.sources.get(place))
                        .for_each(|late| fetcher.late(&**late));
                    self.changed.notify_waiters();
                }
                Err(end) => {
                    self.board().put_back(group, place);
                    return end;
                }
            }
        }
    }

    /// Reads a group and keeps it if it is right.
    async fn read(&self, group: u64, source: &dyn Source) -> Result<(), End> {
        let start = group * GROUP_BYTES;
        let end = (start + GROUP_BYTES).min(self.item.blob.bytes);
        let data = timed(source.read(self.item, start..end)).await.map_err(End::Failed)?;
        self.fetcher.count(source.name(), data.len());
        let (part, tree) = (self.part.clone(), self.tree.clone());
        let kept = blocking(move || {
            let right = tree.fits(group, &data);
            if right {
                part.write(start, &data)?;
            }
            Ok(right)
        });
        match kept.await {
            Ok(true) => Ok(()),
            Ok(false) => Err(End::Lied),
            Err(error) => Err(End::Cache(error)),
        }
    }
}

enum Turn {
    Group(u64),
    Wait(Duration),
    Done,
}

impl Board {
    fn take(&mut self, place: usize, late: Duration, now: Instant) -> Turn {
        if self.left == 0 {
            return Turn::Done;
        }
        if let Some(group) = self.missing.pop_front() {
            self.in_flight.insert(group, Reads { since: now, by: vec![place] });
            return Turn::Group(group);
        }
        // Everything is being read. What is late is read a second time, by another source that has nothing to do.
        let by_another = |reads: &Reads| reads.by.len() == 1 && !reads.by.contains(&place);
        let oldest = self.in_flight.iter_mut().filter(|(_, r)| by_another(r)).min_by_key(|(_, reads)| reads.since);
        // What is late by may become less while it waits.
        let Some((&group, reads)) = oldest else { return Turn::Wait(LEAST_LATE) };
        let waited = now.saturating_duration_since(reads.since);
        if waited < late {
            return Turn::Wait((late - waited).min(LEAST_LATE));
        }
        reads.since = now;
        reads.by.push(place);
        Turn::Group(group)
    }

    fn put_back(&mut self, group: u64, place: usize) {
        // If it is not being read any more, somebody else has brought it.
        let Some(reads) = self.in_flight.get_mut(&group) else { return };
        reads.by.retain(|by| *by != place);
        if reads.by.is_empty() {
            self.in_flight.remove(&group);
            self.missing.push_front(group);
        }
    }

    /// The group has come. Gives the sources that were asked for it earlier and have not brought it.
    fn done(&mut self, group: u64, place: usize) -> Vec<usize> {
        let Some(reads) = self.in_flight.remove(&group) else { return Vec::new() };
        self.left -= 1;
        reads.by.into_iter().take_while(|by| *by != place).collect()
    }
}
