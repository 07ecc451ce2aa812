//! One blob, from nothing to the whole of it.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hanse_protocol::{GROUP_BYTES, GroupTree};

use super::{FetchError, Fetcher, LONGEST_READ, blocking, groups};
use crate::weights::cache::PartFile;
use crate::weights::source::{Item, Source, SourceError};

/// How often new sources are looked for while none is at hand.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// A source that has not told a blob's chaining values after this is not waited for any longer: the next one is asked too.
const TREE_LATE: Duration = Duration::from_secs(1);

impl Fetcher {
    pub(super) async fn fetch_into(&self, item: &Item, part: PartFile) -> Result<(), FetchError> {
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
}

/// A source's answer, within a time.
pub(super) async fn timed<T>(answer: impl Future<Output = Result<T, SourceError>>) -> Result<T, SourceError> {
    let late = |_| Err(SourceError::Failed(format!("no answer within {LONGEST_READ:?}")));
    tokio::time::timeout(LONGEST_READ, answer).await.unwrap_or_else(late)
}

pub(super) async fn write(part: &Arc<PartFile>, offset: u64, data: Bytes) -> Result<(), FetchError> {
    let part = part.clone();
    Ok(blocking(move || part.write(offset, &data)).await?)
}
