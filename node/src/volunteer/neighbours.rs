//! What the other volunteers of the network say, kept up to date at a bounded price.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use hanse_protocol::discovery::keys::ProviderKey;
use hanse_protocol::discovery::{Discovery, unix_ms};
use hanse_protocol::{Advert, HostedExperts, ModelId, PeerId};

use crate::placement::{ExpertTable, View};

/// A look at the whole network may take this long.
const LOOK_TIMEOUT: Duration = Duration::from_secs(8);
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
}

impl Neighbours {
    pub(super) fn new(discovery: Discovery, model: ModelId) -> Self {
        Self { discovery, model, known: BTreeMap::new() }
    }

    /// Looks at the network: who is there, and what they say. Members that cannot be reached are counted until they were silent
    /// twice or their advert expires. `until_next` is when this will be done again.
    pub(super) async fn look(&mut self, until_next: Duration) {
        let mut to_read = self.providers().await;
        to_read.extend(self.known.keys().copied());
        let now = unix_ms();
        let horizon = now.saturating_add(u64::try_from(until_next.as_millis()).unwrap_or(u64::MAX));
        if to_read.len() > READ_ALL {
            let fresh = |peer: &PeerId| {
                self.known.get(peer).is_some_and(|n| n.silent == 0 && n.advert.expires_unix_ms > horizon)
            };
            to_read.retain(|peer| !fresh(peer));
        }
        let reads = to_read.into_iter().take(MAX_MEMBERS).map(|peer| {
            let (discovery, model) = (self.discovery.clone(), self.model);
            async move { (peer, read(&discovery, peer, model).await) }
        });
        let answers: Vec<(PeerId, Result<Option<Advert>, ()>)> =
            futures::stream::iter(reads).buffer_unordered(READS_AT_A_TIME).collect().await;
        for (peer, answer) in answers {
            match answer {
                Ok(Some(advert)) => {
                    if self.known.len() < MAX_MEMBERS || self.known.contains_key(&peer) {
                        self.known.insert(peer, Neighbour { advert, silent: 0 });
                    }
                }
                Ok(None) => _ = self.known.remove(&peer),
                Err(()) => {
                    if let Some(neighbour) = self.known.get_mut(&peer) {
                        neighbour.silent += 1;
                    }
                }
            }
        }
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
        let _ = tokio::time::timeout(LOOK_TIMEOUT, search).await;
        found
    }

    /// Waits until some member of the network is connected; whether one is.
    pub(super) async fn wait_connected(&self, timeout: Duration) -> bool {
        self.discovery.wait_connected(timeout).await.is_ok()
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

    /// The network without this member, and without what members behind it in the order of peer ids are only about to load: of
    /// two who choose at the same time, the first one's choice stands.
    pub(super) fn view_for_choice(&self, table: &Arc<ExpertTable>) -> View {
        let own = self.discovery.peer_id();
        let adverts: Vec<Advert> = self
            .known
            .iter()
            .map(|(peer, neighbour)| {
                let mut advert = neighbour.advert.clone();
                if *peer > own {
                    advert.loading = HostedExperts::new();
                }
                advert
            })
            .collect();
        View::of(table.clone(), &adverts, unix_ms())
    }
}

/// The peer's valid advert of the model; `None` if it says that it hosts none of it.
async fn read(discovery: &Discovery, peer: PeerId, model: ModelId) -> Result<Option<Advert>, ()> {
    let adverts = discovery.adverts(peer, Some(model)).await.map_err(|error| {
        tracing::debug!(%peer, %error, "no advert");
    })?;
    Ok(adverts.into_iter().next())
}
