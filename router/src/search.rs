//! Finding a model's peers on the control plane: who the DHT names, and what they say of themselves.

use std::time::Duration;

use hanse_protocol::discovery::Discovery;
use hanse_protocol::discovery::keys::ProviderKey;
use hanse_protocol::{Advert, ModelId, PeerId};
use tokio::sync::mpsc;

/// Look-ups follow each other this fast while experts are missing.
pub const EAGER_INTERVAL: Duration = Duration::from_millis(300);
/// A look-up may take this long; the DHT's own queries end sooner.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(12);
/// How long reading an advert may take: a peer that has just started again is not to be waited for on a connection that is gone.
pub(crate) const ADVERT_TIMEOUT: Duration = Duration::from_secs(4);
/// Look-ups follow each other this fast once every expert has a peer, in a network of up to [`FEW_TO_FIND`] peers: how soon one that joins is
/// noticed. In a larger one an expert depends less on each, and a look-up costs more.
const CALM_INTERVAL: Duration = Duration::from_secs(3);
const FEW_TO_FIND: usize = 16;
/// How often a peer's advert is read again, in a network of up to [`FEW_TO_READ`] peers; in a larger one so that as many are read in a second.
const ADVERT_INTERVAL: Duration = Duration::from_secs(5);
const FEW_TO_READ: usize = 32;
/// However many there are, this is often enough for peers to be found and adverts to be read well within their lifetime.
const LONGEST_INTERVAL: Duration = Duration::from_secs(60);

/// A peer's valid advert, if it gave one; or why it cannot be known.
pub type AdvertRead = Result<Option<Advert>, String>;

/// How long to wait with the next look-up when every expert has a peer and `peers` are known.
#[must_use]
pub fn calm_pause(peers: usize) -> Duration {
    stretched(CALM_INTERVAL, peers, FEW_TO_FIND)
}

/// How long to wait before a peer's advert is read again when `peers` are known.
#[must_use]
pub fn advert_pause(peers: usize) -> Duration {
    stretched(ADVERT_INTERVAL, peers, FEW_TO_READ)
}

fn stretched(interval: Duration, peers: usize, few: usize) -> Duration {
    interval.mul_f64((peers as f64 / few as f64).max(1.0)).min(LONGEST_INTERVAL)
}

/// Looks for the peers of one model.
#[derive(Debug, Clone)]
pub struct PeerSearch {
    discovery: Discovery,
    model: ModelId,
    keys: Vec<ProviderKey>,
}

impl PeerSearch {
    /// For the peers that host experts of some of `layers`.
    pub fn new(discovery: Discovery, model: ModelId, layers: impl IntoIterator<Item = u32>) -> Self {
        Self { discovery, model, keys: ProviderKey::covering(model, layers) }
    }

    /// The control plane that is searched.
    #[must_use]
    pub fn discovery(&self) -> &Discovery {
        &self.discovery
    }

    /// The model whose peers are wanted.
    #[must_use]
    pub fn model(&self) -> ModelId {
        self.model
    }

    /// Looks the providers up again and again, `pause` after each time, and reports each as soon as the DHT names it, again at every
    /// look-up. Ends when the receiver of `found` is dropped, at the latest after the next pause.
    pub async fn run(&self, found: mpsc::Sender<PeerId>, pause: impl Fn() -> Duration) {
        while !found.is_closed() {
            self.look_up(&found).await;
            tokio::time::sleep(pause()).await;
        }
    }

    /// Looks all keys up once.
    pub async fn look_up(&self, found: &mpsc::Sender<PeerId>) {
        let lookups = self.keys.iter().map(|&key| self.look_up_key(key, found));
        // Running out of time is not an error: what was found so far has been reported.
        let _ = tokio::time::timeout(LOOKUP_TIMEOUT, futures::future::join_all(lookups)).await;
    }

    async fn look_up_key(&self, key: ProviderKey, found: &mpsc::Sender<PeerId>) {
        let Ok(mut providers) = self.discovery.providers(key).await else { return };
        while let Some(peer) = providers.recv().await {
            if peer != self.discovery.peer_id() && found.send(peer).await.is_err() {
                return;
            }
        }
    }

    /// The peer's valid advert of the model; `None` when it says that it hosts none of it.
    ///
    /// # Errors
    /// Why it gave none, in words.
    pub async fn advert(&self, peer: PeerId) -> AdvertRead {
        let reading = tokio::time::timeout(ADVERT_TIMEOUT, self.discovery.adverts(peer, Some(self.model)));
        let adverts = reading.await.map_err(|_| "it gave no advert in time".to_owned())?.map_err(|e| e.to_string())?;
        Ok(adverts.into_iter().next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_reads_no_more_in_a_second_of_a_large_network_than_of_a_small_one() {
        assert_eq!(advert_pause(3), ADVERT_INTERVAL);
        assert_eq!(calm_pause(0), CALM_INTERVAL);
        let per_second = |peers: usize| peers as f64 / advert_pause(peers).as_secs_f64();
        assert!((per_second(320) - per_second(FEW_TO_READ)).abs() < 0.01);
        assert_eq!(calm_pause(usize::MAX), LONGEST_INTERVAL);
    }
}
