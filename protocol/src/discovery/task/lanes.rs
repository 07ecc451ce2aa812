//! Connections that carry frames: found, dialled, punched, handed over.

use std::collections::hash_map::Entry;
use std::time::Duration;

use libp2p::multiaddr::Protocol;
use libp2p::swarm::DialError;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::super::LookupError;
use super::{LaneAnswer, MAX_ADDRESSES, MAX_HINTS, SwarmTask};
use crate::relayed::{CircuitLimit, Lane, is_circuit};

/// A circuit that could not be renewed is tried again after this.
const RENEWAL_RETRY: Duration = Duration::from_secs(5);

/// The relay that a circuit's address names.
fn relay_of(circuit: &Multiaddr) -> Option<PeerId> {
    circuit.iter().find_map(|part| match part {
        Protocol::P2p(peer) => Some(peer),
        _ => None,
    })
}

impl SwarmTask {
    pub(super) fn find_lane(&mut self, peer: PeerId, mut addresses: Vec<Multiaddr>, answer: LaneAnswer) {
        if let Some(lane) = self.swarm.behaviour().frames.best(&peer) {
            let _ = answer.send(Ok(lane));
            return;
        }
        addresses.truncate(MAX_ADDRESSES);
        addresses.extend(self.hints.get(&peer).into_iter().flatten().cloned());
        let dial = DialOpts::peer_id(peer).addresses(addresses).extend_addresses_through_behaviour().build();
        // It also fails where a dial is under way already, whose end answers this question too.
        if let Err(error @ DialError::NoAddresses) = self.swarm.dial(dial) {
            let _ = answer.send(Err(LookupError::Unreachable { peer, reason: error.to_string() }));
            return;
        }
        let waiting = self.lane_questions.entry(peer).or_default();
        waiting.retain(|answer| !answer.is_closed());
        waiting.push(answer);
    }

    /// DCUtR begins with each new relayed connection.
    pub(super) fn punch(&mut self, peer: PeerId, mut circuits: Vec<Multiaddr>) {
        circuits.retain(is_circuit);
        circuits.truncate(MAX_ADDRESSES);
        if self.punches && self.swarm.behaviour().frames.best(&peer).is_some_and(|lane| lane.is_relayed()) {
            self.dial_besides(peer, circuits);
        }
    }

    /// Dials although there is a connection already.
    pub(super) fn dial_besides(&mut self, peer: PeerId, addresses: Vec<Multiaddr>) {
        let dial = DialOpts::peer_id(peer).addresses(addresses).condition(PeerCondition::Always).build();
        if let Err(error) = self.swarm.dial(dial) {
            tracing::debug!(%peer, %error, "not dialled once more");
        }
    }

    /// `relay` has opened a circuit for us. Its limit is the same for all.
    pub(super) fn note_limit(&mut self, relay: PeerId, (bytes, time): (Option<u64>, Option<Duration>)) {
        if self.circuit_limits.len() >= MAX_HINTS {
            self.circuit_limits.clear();
        }
        // Zero stands for no limit.
        let limit = CircuitLimit { bytes: bytes.filter(|n| *n > 0), time: time.filter(|t| !t.is_zero()) };
        self.circuit_limits.insert(relay, limit);
    }

    /// Opens other circuits in time for those that their relays will end.
    pub(super) fn renew_circuits(&mut self) {
        let now = Instant::now();
        let limits = &self.circuit_limits;
        let worn = self.swarm.behaviour().frames.worn(|circuit| limits.get(&relay_of(circuit)?).copied());
        // A renewal that has succeeded does not hold up the next one.
        self.renewals.retain(|peer, at| now < *at + RENEWAL_RETRY && worn.iter().any(|(other, _)| other == peer));
        for (peer, circuit) in worn {
            if let Entry::Vacant(renewal) = self.renewals.entry(peer) {
                renewal.insert(now);
                tracing::debug!(%peer, %circuit, "circuit renewed before it ends");
                self.dial_besides(peer, vec![circuit]);
            }
        }
    }

    pub(super) fn answer_lanes(&mut self, peer: PeerId, failure: Option<String>) {
        let lane = self.swarm.behaviour().frames.best(&peer);
        let Some(result) = lane.map(Ok).or(failure.map(Err)) else { return };
        for answer in self.lane_questions.remove(&peer).into_iter().flatten() {
            let _ = answer.send(result.clone().map_err(|reason| LookupError::Unreachable { peer, reason }));
        }
    }

    /// A connection that nobody takes is not served; the caller asks another replica.
    pub(super) fn hand_over(&mut self, lane: Lane) {
        if self.reports.lanes.try_send(lane).is_err() {
            tracing::debug!("too many connections wait to be served");
        }
    }
}
