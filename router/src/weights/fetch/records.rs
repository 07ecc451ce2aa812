//! What is known of sources: who failed and is left alone, who lied and is asked no more, how long a read takes.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::{Fetcher, LONGEST_READ, groups};
use crate::weights::source::{Item, Source, SourceError};

/// A source that fails is left alone this long; each further failure in a row doubles it.
const FIRST_BACK_OFF: Duration = Duration::from_millis(250);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(30);
/// After a blob has been waited for in vain, others are not for at least so long.
const LEAST_IN_VAIN: Duration = Duration::from_secs(10);

/// What is known of a source.
#[derive(Debug, Default)]
pub(super) struct Record {
    failures: u32,
    until: Option<Instant>,
    /// It gave bytes that were not what they should be, or said that it is of no use.
    dropped: Option<String>,
    /// What it has given, useful or not.
    pub(super) bytes: u64,
}

impl Fetcher {
    /// The sources that may have the item and are not set aside, the best first.
    pub(super) fn sources(&self, item: &Item, reasons: &mut HashMap<String, String>) -> Vec<Arc<dyn Source>> {
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

    /// The source did what it should.
    pub(super) fn well(&self, source: &dyn Source) {
        let mut records = self.records();
        if let Some(record) = records.get_mut(&source.name()) {
            record.failures = 0;
            record.until = None;
        }
    }

    pub(super) fn failed(&self, source: &dyn Source, error: &SourceError, reasons: &mut HashMap<String, String>) {
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
    pub(super) fn waited_in_vain(&self) -> bool {
        let mut in_vain = self.in_vain.lock().unwrap_or_else(PoisonError::into_inner);
        *in_vain = in_vain.filter(|since| since.elapsed() < self.patience.max(LEAST_IN_VAIN));
        in_vain.is_some()
    }

    /// Another source was asked later and was faster.
    pub(super) fn late(&self, source: &dyn Source) {
        let error = SourceError::Failed("others were faster, though they were asked later".into());
        self.failed(source, &error, &mut HashMap::new());
    }

    /// A group was read in this time.
    pub(super) fn took(&self, time: Duration) {
        let mut usual = self.usual.lock().unwrap_or_else(PoisonError::into_inner);
        *usual = Some(usual.map_or(time, |usual| (usual * 7 + time) / 8));
    }

    /// A read that takes longer than this is late.
    pub(super) fn late_after(&self) -> Duration {
        let usual = *self.usual.lock().unwrap_or_else(PoisonError::into_inner);
        usual.map_or(LONGEST_READ / 10, |usual| (usual * 4).max(groups::LEAST_LATE))
    }

    /// The source gave something else than it should: it is not asked again.
    pub(super) fn lied(&self, source: &dyn Source, item: &Item, reasons: &mut HashMap<String, String>) {
        let why = format!("what it gave for {} has another hash: it is not asked again", item.what);
        tracing::warn!(source = %source.name(), "{why}");
        self.failed(source, &SourceError::Useless(why), reasons);
    }
}
