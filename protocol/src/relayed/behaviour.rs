//! The swarm's part: knows the lanes to each connected peer.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::task::{Context, Poll};
use std::time::Duration;

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::{ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, ToSwarm};
use libp2p::{Multiaddr, PeerId};

use super::handler::{FirstStream, Handler};
use super::{CircuitLimit, Lane, is_circuit};

/// Keeps a [`Lane`] for each connection; reports those on which the other side wants to be served.
#[derive(Debug)]
pub(crate) struct Behaviour {
    serves: bool,
    lanes: HashMap<PeerId, Vec<(ConnectionId, Lane)>>,
    /// Circuits that this side dialled, and to whom.
    circuits: HashMap<ConnectionId, PeerId>,
    wanted: VecDeque<Lane>,
}

impl Behaviour {
    /// `serves`: whether streams of others are accepted.
    pub(crate) fn new(serves: bool) -> Self {
        Self { serves, lanes: HashMap::new(), circuits: HashMap::new(), wanted: VecDeque::new() }
    }

    /// The best way to a connected peer: direct rather than relayed, young rather than old.
    pub(crate) fn best(&self, peer: &PeerId) -> Option<Lane> {
        let lanes = self.lanes.get(peer)?;
        let direct = lanes.iter().rev().find(|(_, lane)| !lane.is_relayed());
        direct.or(lanes.last()).map(|(_, lane)| lane.clone())
    }

    /// Notes what the connection's round trip was.
    pub(crate) fn measured(&self, peer: &PeerId, connection: ConnectionId, round_trip: Duration) {
        if let Some(lane) = self.lane(peer, connection) {
            lane.measured(round_trip);
        }
    }

    /// The circuits that are to be succeeded, one of each peer; `limit` is what their relays allow, by the circuit's address.
    pub(crate) fn worn(&self, limit: impl Fn(&Multiaddr) -> Option<CircuitLimit>) -> Vec<(PeerId, Multiaddr)> {
        let dialled =
            self.circuits.iter().filter_map(|(connection, peer)| Some((*peer, self.lane(peer, *connection)?)));
        let worn = dialled.filter(|(_, lane)| limit(&lane.inner.address).is_some_and(|limit| lane.is_worn(limit)));
        let worn: HashMap<PeerId, Multiaddr> = worn.map(|(peer, lane)| (peer, lane.inner.address.clone())).collect();
        worn.into_iter().collect()
    }

    /// A circuit that this side dialled stands: it succeeds the older ones.
    fn succeed(&self, peer: PeerId, connection: ConnectionId) {
        let Some(younger) = self.lane(&peer, connection) else { return };
        for (other, lane) in self.lanes.get(&peer).into_iter().flatten() {
            if *other != connection && self.circuits.contains_key(other) {
                lane.succeed(younger);
            }
        }
    }

    /// The connections to a peer.
    pub(crate) fn connections(&self, peer: &PeerId) -> Vec<ConnectionId> {
        self.lanes.get(peer).into_iter().flatten().map(|(connection, _)| *connection).collect()
    }

    fn lane(&self, peer: &PeerId, connection: ConnectionId) -> Option<&Lane> {
        self.lanes.get(peer)?.iter().find(|(id, _)| *id == connection).map(|(_, lane)| lane)
    }

    fn handler(&mut self, connection: ConnectionId, peer: PeerId, address: &Multiaddr, relayed: bool) -> Handler {
        let (lane, ends) = Lane::new(peer, address.clone(), relayed);
        self.lanes.entry(peer).or_default().push((connection, lane));
        Handler::new(ends, self.serves)
    }

    fn forget(&mut self, peer: &PeerId, connection: ConnectionId) {
        self.circuits.remove(&connection);
        let Some(lanes) = self.lanes.get_mut(peer) else { return };
        if let Some(place) = lanes.iter().position(|(id, _)| *id == connection) {
            let (_, lane) = lanes.remove(place);
            lane.inner.closed.cancel();
        }
        if lanes.is_empty() {
            self.lanes.remove(peer);
        }
    }
}

impl Drop for Behaviour {
    fn drop(&mut self) {
        for (_, lane) in self.lanes.values().flatten() {
            lane.inner.closed.cancel();
        }
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    /// A lane on which the other side opened its first stream.
    type ToSwarm = Lane;

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(self.handler(connection, peer, remote, is_circuit(local) || is_circuit(remote)))
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<Handler, ConnectionDenied> {
        if is_circuit(address) {
            self.circuits.insert(connection, peer);
        }
        Ok(self.handler(connection, peer, address, is_circuit(address)))
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(established) if self.circuits.contains_key(&established.connection_id) => {
                self.succeed(established.peer_id, established.connection_id);
            }
            FromSwarm::ConnectionClosed(closed) => self.forget(&closed.peer_id, closed.connection_id),
            // Another behaviour denied a connection for which a handler was made.
            FromSwarm::DialFailure(failure) => {
                if let Some(peer) = failure.peer_id {
                    self.forget(&peer, failure.connection_id);
                }
            }
            FromSwarm::ListenFailure(failure) => {
                if let Some(peer) = failure.peer_id {
                    self.forget(&peer, failure.connection_id);
                }
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, connection: ConnectionId, _: FirstStream) {
        if let Some(lane) = self.lane(&peer, connection) {
            self.wanted.push_back(lane.clone());
        }
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Lane, Infallible>> {
        self.wanted.pop_front().map_or(Poll::Pending, |lane| Poll::Ready(ToSwarm::GenerateEvent(lane)))
    }
}
