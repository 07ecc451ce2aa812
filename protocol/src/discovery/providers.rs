//! The provider records that this member keeps for the DHT, and which of them it names to those who ask.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::time::Instant;

use libp2p::PeerId;
use libp2p::kad::store::{Error, RecordStore, Result};
use libp2p::kad::{K_VALUE, ProviderRecord, Record, RecordKey};

/// Providers remembered per key. Twenty, as is usual in a DHT of files, would hide most of a large network's volunteers.
const MAX_PROVIDERS_PER_KEY: usize = 1024;
/// Keys for which providers are remembered.
const MAX_KEYS: usize = 1024;
/// Provider records in all: strangers fill no more memory than these take.
const MAX_RECORDS: usize = 1 << 16;
/// Addresses remembered of one provider.
const MAX_ADDRESSES: usize = 16;

/// Provider records and nothing else: values are not stored.
///
/// An answer in the DHT names [`K_VALUE`] providers at most, whoever asks. So each answer goes on where the last one ended, and the first
/// begins anywhere: who asks all members that keep a key's records, once or a few times, learns of every provider.
#[derive(Debug)]
pub(crate) struct ProviderStore {
    local: PeerId,
    keys: HashMap<RecordKey, Providers>,
    records: usize,
}

#[derive(Debug)]
struct Providers {
    records: Vec<ProviderRecord>,
    /// Where the next answer begins, modulo the number of records.
    next: Cell<usize>,
}

impl ProviderStore {
    pub(crate) fn new(local: PeerId) -> Self {
        Self { local, keys: HashMap::new(), records: 0 }
    }

    /// Nobody else removes the records of those who have left, unless somebody asks for them.
    fn remove_expired(&mut self) {
        let now = Instant::now();
        self.keys.retain(|_, providers| {
            providers.records.retain(|record| !record.is_expired(now));
            !providers.records.is_empty()
        });
        self.records = self.keys.values().map(|providers| providers.records.len()).sum();
    }

    fn is_full_for(&self, key: &RecordKey) -> bool {
        let of_key = self.keys.get(key).map(|providers| providers.records.len());
        self.records >= MAX_RECORDS
            || of_key.map_or(self.keys.len() >= MAX_KEYS, |records| records >= MAX_PROVIDERS_PER_KEY)
    }
}

impl RecordStore for ProviderStore {
    type RecordsIter<'a> = std::iter::Empty<Cow<'a, Record>>;
    type ProvidedIter<'a> = Box<dyn Iterator<Item = Cow<'a, ProviderRecord>> + 'a>;

    fn get(&self, _: &RecordKey) -> Option<Cow<'_, Record>> {
        None
    }

    fn put(&mut self, _: Record) -> Result<()> {
        Err(Error::MaxRecords)
    }

    fn remove(&mut self, _: &RecordKey) {}

    fn records(&self) -> Self::RecordsIter<'_> {
        std::iter::empty()
    }

    fn add_provider(&mut self, mut record: ProviderRecord) -> Result<()> {
        record.addresses.truncate(MAX_ADDRESSES);
        let known = self
            .keys
            .get_mut(&record.key)
            .and_then(|providers| providers.records.iter_mut().find(|known| known.provider == record.provider));
        if let Some(known) = known {
            *known = record;
            return Ok(());
        }
        // What this member itself provides is not published unless it is kept.
        if record.provider != self.local && self.is_full_for(&record.key) {
            self.remove_expired();
            if self.is_full_for(&record.key) {
                return Err(Error::MaxProvidedKeys);
            }
        }
        let providers = self.keys.entry(record.key.clone()).or_insert_with(|| Providers {
            records: Vec::new(),
            // Members that got the same records in the same order begin at different ones.
            next: Cell::new(RandomState::new().hash_one(()) as usize),
        });
        providers.records.push(record);
        self.records += 1;
        Ok(())
    }

    fn providers(&self, key: &RecordKey) -> Vec<ProviderRecord> {
        let Some(Providers { records, next }) = self.keys.get(key) else { return Vec::new() };
        let begin = next.get() % records.len().max(1);
        next.set(begin + K_VALUE.get());
        records.iter().cycle().skip(begin).take(K_VALUE.get().min(records.len())).cloned().collect()
    }

    fn provided(&self) -> Self::ProvidedIter<'_> {
        let all = self.keys.values().flat_map(|providers| &providers.records);
        Box::new(all.filter(|record| record.provider == self.local).map(Cow::Borrowed))
    }

    fn remove_provider(&mut self, key: &RecordKey, provider: &PeerId) {
        let Some(providers) = self.keys.get_mut(key) else { return };
        let before = providers.records.len();
        providers.records.retain(|record| record.provider != *provider);
        self.records -= before - providers.records.len();
        if providers.records.is_empty() {
            self.keys.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::time::Duration;

    use super::*;

    fn record(key: u8, provider: PeerId) -> ProviderRecord {
        ProviderRecord::new(RecordKey::new(&[key]), provider, Vec::new())
    }

    fn store_of(providers: &[PeerId]) -> ProviderStore {
        let mut store = ProviderStore::new(PeerId::random());
        for provider in providers {
            store.add_provider(record(1, *provider)).unwrap();
        }
        store
    }

    fn peers(count: usize) -> Vec<PeerId> {
        (0..count).map(|_| PeerId::random()).collect()
    }

    #[test]
    fn who_asks_again_learns_of_every_provider_and_who_asks_once_of_an_answer_full() {
        let all = peers(205);
        let store = store_of(&all);
        let mut learned = HashSet::new();
        for _ in 0..all.len().div_ceil(K_VALUE.get()) {
            let answer = store.providers(&RecordKey::new(&[1]));
            assert_eq!(answer.iter().map(|record| record.provider).collect::<HashSet<_>>().len(), K_VALUE.get());
            learned.extend(answer.into_iter().map(|record| record.provider));
        }
        assert_eq!(learned, all.into_iter().collect());
    }

    #[test]
    fn few_providers_are_named_all_and_once() {
        let all = peers(7);
        let mut store = store_of(&all);
        store.add_provider(record(1, all[3])).unwrap();
        for _ in 0..3 {
            let answer: Vec<PeerId> =
                store.providers(&RecordKey::new(&[1])).into_iter().map(|record| record.provider).collect();
            assert_eq!(answer.len(), 7);
            assert_eq!(answer.into_iter().collect::<HashSet<_>>(), all.iter().copied().collect());
        }
        store.remove_provider(&RecordKey::new(&[1]), &all[0]);
        assert_eq!((store.providers(&RecordKey::new(&[1])).len(), store.records), (6, 6));
        assert!(store.providers(&RecordKey::new(&[2])).is_empty());
    }

    #[test]
    fn a_full_key_takes_no_more_until_records_expire() {
        let all = peers(MAX_PROVIDERS_PER_KEY);
        let mut store = store_of(&all);
        assert!(store.add_provider(record(1, PeerId::random())).is_err());
        assert!(store.add_provider(record(2, PeerId::random())).is_ok(), "another key");
        let expired =
            ProviderRecord { expires: Instant::now().checked_sub(Duration::from_secs(1)), ..record(1, all[0]) };
        store.add_provider(expired).unwrap();
        assert!(store.add_provider(record(1, PeerId::random())).is_ok());
        assert_eq!(store.records, MAX_PROVIDERS_PER_KEY + 1);
    }

    #[test]
    fn own_records_are_told_from_others() {
        let mut store = store_of(&peers(3));
        let own = record(5, store.local);
        store.add_provider(own.clone()).unwrap();
        assert_eq!(store.provided().map(Cow::into_owned).collect::<Vec<_>>(), [own]);
    }
}
