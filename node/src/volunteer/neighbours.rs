//! What the other volunteers of the network say, kept up to date at a bounded price.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use hanse_protocol::discovery::keys::ProviderKey;
use hanse_protocol::discovery::{Discovery, unix_ms};
use hanse_protocol::{Advert, HostedExperts, ModelId, PeerId};

use crate::placement::{ExpertTable, View};

/// The DHT is listened to for so long: it names those that are there at once, and then waits for those that are not.
const SEARCH_TIME: Duration = Duration::from_secs(1);
/// A member that does not answer so soon counts as silent.
const READ_TIMEOUT: Duration = Duration::from_secs(3);
/// A provider that did not answer at [`SILENT_LOOKS`] looks is asked at every so many-th only: the DHT names those that left for a
/// while.
const ASK_SILENT_EVERY: u32 = 8;
/// Adverts asked for at a time.
const READS_AT_A_TIME: usize = 32;
/// In a network of up to so many, every advert is read at every look; in a larger one only those that would expire before
/// the next.
const READ_ALL: usize = 64;
/// The most members remembered.
const MAX_MEMBERS: usize = 4096;
/// A member that did not answer so often in a row is not counted any more, though its last advert is still valid.
const SILENT_LOOKS: u32 = 2;

#[derive(Debug)]
struct Neighbour {
    advert: Advert,
    silent: u32,
}

/// The adverts of all other volunteers of one model.
#[derive(Debug)]
pub(super) struct Neighbours {
    discovery: Discovery,
    model: ModelId,
    known: BTreeMap<PeerId, Neighbour>,
    silent: Silent,
}

/// Providers that never answered. The first failure counts little: they may just have come, as they do when all start together.
#[derive(Debug, Default)]
struct Silent {
    looks: u32,
    peers: BTreeMap<PeerId, Unanswered>,
}

#[derive(Debug)]
struct Unanswered {
    times: u32,
    /// The look in which it was asked last.
    asked: u32,
}

impl Silent {
    /// Begins another look.
    fn look(&mut self) {
        self.looks = self.looks.wrapping_add(1);
        let looks = self.looks;
        self.peers.retain(|_, peer| looks.wrapping_sub(peer.asked) < ASK_SILENT_EVERY);
    }

    /// Whether the peer is not asked in this look.
    fn skips(&self, peer: &PeerId) -> bool {
        self.peers.get(peer).is_some_and(|peer| peer.times >= SILENT_LOOKS)
    }

    fn did_not_answer(&mut self, peer: PeerId) {
        let looks = self.looks;
        let entry = self.peers.entry(peer).or_insert(Unanswered { times: 0, asked: looks });
        (entry.times, entry.asked) = (entry.times + 1, looks);
        while self.peers.len() > MAX_MEMBERS {
            self.peers.pop_first();
        }
    }

    fn answered(&mut self, peer: &PeerId) {
        self.peers.remove(peer);
    }
}

impl Neighbours {
    pub(super) fn new(discovery: Discovery, model: ModelId) -> Self {
        Self { discovery, model, known: BTreeMap::new(), silent: Silent::default() }
    }

    /// Looks at the network: who is there, and what they say. Members that cannot be reached are counted until they were silent
    /// twice or their advert expires. `until_next` is when this will be done again.
    pub(super) async fn look(&mut self, until_next: Duration) {
        let mut to_read = self.providers().await;
        to_read.extend(self.known.keys().copied());
        self.silent.look();
        to_read.retain(|peer| !self.silent.skips(peer));
        let horizon = unix_ms().saturating_add(u64::try_from(until_next.as_millis()).unwrap_or(u64::MAX));
        if to_read.len() > READ_ALL {
            let fresh = |peer: &PeerId| {
                self.known.get(peer).is_some_and(|n| n.silent == 0 && n.advert.expires_unix_ms > horizon)
            };
            to_read.retain(|peer| !fresh(peer));
        }
        self.read(to_read).await;
    }

    /// Reads the adverts of the members that are known already, and no others.
    pub(super) async fn refresh(&mut self) {
        let known = self.known.keys().copied().collect();
        self.read(known).await;
    }

    async fn read(&mut self, peers: BTreeSet<PeerId>) {
        let reads = peers.into_iter().take(MAX_MEMBERS).map(|peer| {
            let (discovery, model) = (self.discovery.clone(), self.model);
            async move {
                let answer = tokio::time::timeout(READ_TIMEOUT, read(&discovery, peer, model)).await;
                (peer, answer.unwrap_or(Err(())))
            }
        });
        let answers: Vec<(PeerId, Result<Option<Advert>, ()>)> =
            futures::stream::iter(reads).buffer_unordered(READS_AT_A_TIME).collect().await;
        for (peer, answer) in answers {
            if answer.is_ok() {
                self.silent.answered(&peer);
            }
            match answer {
                Ok(Some(advert)) => {
                    if self.known.len() < MAX_MEMBERS || self.known.contains_key(&peer) {
                        self.known.insert(peer, Neighbour { advert, silent: 0 });
                    }
                }
                Ok(None) => _ = self.known.remove(&peer),
                Err(()) => match self.known.get_mut(&peer) {
                    Some(neighbour) => neighbour.silent += 1,
                    None => self.silent.did_not_answer(peer),
                },
            }
        }
        let now = unix_ms();
        self.known.retain(|_, n| n.silent < SILENT_LOOKS && n.advert.expires_unix_ms > now);
    }

    async fn providers(&self) -> BTreeSet<PeerId> {
        let mut found = BTreeSet::new();
        let search = async {
            let Ok(mut volunteers) = self.discovery.providers(ProviderKey::volunteers()).await else { return };
            while let Some(peer) = volunteers.recv().await {
                if peer != self.discovery.peer_id() {
                    found.insert(peer);
                }
            }
        };
        // Running out of time is not an error: whoever was found is in.
        let _ = tokio::time::timeout(SEARCH_TIME, search).await;
        found
    }

    /// Waits until some member of the network is connected; whether one is.
    pub(super) async fn wait_connected(&self, timeout: Duration) -> bool {
        self.discovery.wait_connected(timeout).await.is_ok()
    }

    /// Waits until this member's records have reached others, or the time is over.
    pub(super) async fn wait_published(&self, timeout: Duration) {
        self.discovery.wait_published(timeout).await;
    }

    /// A number of this member's own, from its peer id.
    pub(super) fn seed(&self) -> u64 {
        let bytes = self.discovery.peer_id().to_bytes();
        bytes.iter().fold(0u64, |seed, &byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)))
    }

    /// The network with this member's own advert in it, if it has one.
    pub(super) fn view(&self, table: &Arc<ExpertTable>, own: Option<&Advert>) -> View {
        View::of(table.clone(), self.known.values().map(|n| &n.advert).chain(own), unix_ms())
    }

    /// The network without this member, and without what members behind it in the order of peer ids are only about to load, unless
    /// they said so in `earlier`: of two who choose at the same time, the first one's choice stands.
    pub(super) fn view_for_choice(&self, table: &Arc<ExpertTable>, earlier: &BTreeSet<PeerId>) -> View {
        let own = self.discovery.peer_id();
        let adverts: Vec<Advert> = self
            .known
            .iter()
            .map(|(peer, neighbour)| {
                let mut advert = neighbour.advert.clone();
                if *peer > own && !earlier.contains(peer) {
                    advert.loading = HostedExperts::new();
                }
                advert
            })
            .collect();
        View::of(table.clone(), &adverts, unix_ms())
    }

    /// Those who have said that they are about to load something.
    pub(super) fn loading(&self) -> BTreeSet<PeerId> {
        let loading = self.known.iter().filter(|(_, neighbour)| !neighbour.advert.loading.is_empty());
        loading.map(|(peer, _)| *peer).collect()
    }
}

/// The peer's valid advert of the model; `None` if it says that it hosts none of it.
async fn read(discovery: &Discovery, peer: PeerId, model: ModelId) -> Result<Option<Advert>, ()> {
    let adverts = discovery.adverts(peer, Some(model)).await.map_err(|error| {
        tracing::debug!(%peer, %error, "no advert");
    })?;
    // Variants in fewer bits are no replicas of what this member hosts.
    Ok(adverts.into_iter().find(|advert| advert.model == model))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_provider_that_did_not_answer_once_is_asked_at_the_next_look_and_one_that_never_does_seldom() {
        let (mut silent, peer) = (Silent::default(), hanse_protocol::Identity::generate().peer_id());
        let mut asked = Vec::new();
        for look in 0..20 {
            silent.look();
            if !silent.skips(&peer) {
                asked.push(look);
                silent.did_not_answer(peer);
            }
        }
        assert_eq!(asked, [0, 1, 9, 10, 18, 19]);
        silent.answered(&peer);
        assert!(!silent.skips(&peer));
    }
}
