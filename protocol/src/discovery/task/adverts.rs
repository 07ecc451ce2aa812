//! Questions for adverts: asked, answered, and asked again.

use std::time::Duration;

use libp2p::kad::{GetClosestPeersError, GetClosestPeersOk, GetClosestPeersResult, QueryId};
use libp2p::request_response::{OutboundFailure, OutboundRequestId, ResponseChannel};
use libp2p::{Multiaddr, PeerId};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::super::LookupError;
use super::super::exchange::{AdvertRequest, AdvertResponse};
use super::{MAX_ADDRESSES, SwarmTask};

/// A peer that does not answer for so long may have moved: its connection is dead, but nothing says so for ten seconds.
const SILENCE: Duration = Duration::from_secs(1);

type AdvertAnswer = oneshot::Sender<Result<Vec<Vec<u8>>, LookupError>>;

/// A question for a peer's adverts in progress.
pub(super) struct AdvertQuestion {
    peer: PeerId,
    model: AdvertRequest,
    answer: AdvertAnswer,
    /// When it is doubted that the connection on which it was asked is alive.
    doubt_at: Instant,
    /// Whether the DHT was already asked for the peer's addresses.
    searched: bool,
    /// Whether it was asked again on another connection.
    repeated: bool,
}

impl AdvertQuestion {
    pub(super) fn new(peer: PeerId, model: AdvertRequest, answer: AdvertAnswer) -> Self {
        Self { peer, model, answer, doubt_at: Instant::now() + SILENCE, searched: false, repeated: false }
    }
}

impl SwarmTask {
    pub(super) fn ask(&mut self, question: AdvertQuestion, addresses: Vec<Multiaddr>) {
        if question.peer == *self.swarm.local_peer_id() {
            let own = self.adverts_for(question.model);
            let _ = question.answer.send(Ok(own));
            return;
        }
        let request =
            self.swarm.behaviour_mut().adverts.send_request_with_addresses(&question.peer, question.model, addresses);
        self.questions.insert(request, question);
    }

    fn adverts_for(&self, model: AdvertRequest) -> AdvertResponse {
        self.hosted
            .iter()
            .filter(|(models, _)| model.is_none_or(|model| models.contains(&model)))
            .map(|(_, advert)| advert.clone())
            .collect()
    }

    pub(super) fn on_advert_request(&mut self, request: AdvertRequest, channel: ResponseChannel<AdvertResponse>) {
        let adverts = self.adverts_for(request);
        // The asker may have gone meanwhile; there is nobody to tell.
        let _ = self.swarm.behaviour_mut().adverts.send_response(channel, adverts);
    }

    pub(super) fn on_adverts(&mut self, request: OutboundRequestId, adverts: AdvertResponse) {
        if let Some(question) = self.questions.remove(&request) {
            self.doubted.remove(&question.peer);
            // Who asked may have gone meanwhile.
            let _ = question.answer.send(Ok(adverts));
        }
    }

    /// The DHT has said what it knows of a peer's addresses.
    pub(super) fn on_closest(&mut self, id: QueryId, outcome: GetClosestPeersResult) {
        let Some(question) = self.address_searches.remove(&id) else { return };
        let peers = match outcome {
            Ok(GetClosestPeersOk { peers, .. }) | Err(GetClosestPeersError::Timeout { peers, .. }) => peers,
        };
        let addresses = peers.into_iter().filter(|info| info.peer_id == question.peer).flat_map(|info| info.addrs);
        let addresses: Vec<Multiaddr> = addresses.take(MAX_ADDRESSES).collect();
        self.ask(question, addresses);
    }

    /// Whether an advert of the peer is waited for.
    pub(super) fn is_silent(&self, peer: &PeerId) -> bool {
        self.questions.values().any(|question| question.peer == *peer)
    }

    /// Dials peers that do not answer where their records say that they are by now: another connection replaces the one they had.
    pub(super) fn doubt_the_silent(&mut self) {
        let now = Instant::now();
        let silent = self.questions.values_mut().filter(|question| now >= question.doubt_at);
        let peers: Vec<PeerId> = silent
            .map(|question| {
                question.doubt_at = now + SILENCE;
                question.peer
            })
            .collect();
        for peer in peers {
            // Where it has no connection yet, it is being dialled.
            if let (true, Some(addresses)) = (self.swarm.is_connected(&peer), self.hints.get(&peer).cloned()) {
                self.doubted.insert(peer);
                self.dial_besides(peer, addresses);
            }
        }
    }

    pub(super) fn on_unanswered(&mut self, request: OutboundRequestId, error: &OutboundFailure) {
        let Some(mut question) = self.questions.remove(&request) else { return };
        if matches!(error, OutboundFailure::DialFailure) && !question.searched {
            // Its addresses are unknown or old: the DHT may know better ones.
            question.searched = true;
            let query = self.swarm.behaviour_mut().kad.get_closest_peers(question.peer);
            self.address_searches.insert(query, question);
            return;
        }
        if matches!(error, OutboundFailure::ConnectionClosed)
            && !question.repeated
            && self.swarm.is_connected(&question.peer)
        {
            // It was replaced.
            question.repeated = true;
            self.ask(question, Vec::new());
            return;
        }
        let failure = LookupError::Unreachable { peer: question.peer, reason: error.to_string() };
        let _ = question.answer.send(Err(failure));
    }
}
