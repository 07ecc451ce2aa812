//! Standing in for members behind routers: for whom, and within which limits.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroU32;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::{
    CloseConnection, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId, relay};

/// Requests of one peer that wait until it has said who it is.
const MAX_WAITING: usize = 8;
/// Reservations are for so long; libp2p renews them before.
const RESERVATION_TIME: Duration = Duration::from_secs(60 * 60);
/// Circuits that one peer, and one IP address, may open at once, and the time in which it gains another. A client that joins opens one to
/// each peer behind a router, and some more while holes are not punched.
const CIRCUITS_OF_PEER: (u32, Duration) = (128, Duration::from_secs(10));
const CIRCUITS_OF_IP: (u32, Duration) = (512, Duration::from_secs(5));

/// The most that a member gives to others by relaying for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayLimits {
    /// Members that it stands in for at a time.
    pub reservations: usize,
    /// Circuits through it at a time.
    pub circuits: usize,
    /// Of these, circuits that one peer opened.
    pub circuits_per_peer: usize,
    /// Bytes over one circuit, both ways together, before it ends. Who uses it opens another when half of them are used up.
    pub circuit_bytes: u64,
    /// A circuit ends after so long; another is opened after half of it. Whole seconds.
    pub circuit_time: Duration,
}

impl Default for RelayLimits {
    /// 128 members, 256 circuits, 64 of one peer, each for 2 GiB or an hour.
    ///
    /// libp2p's own 128 KiB and 2 minutes are for signalling; a token of a large model takes some 400 KiB of hidden states, so 2 GiB
    /// are about five thousand tokens.
    fn default() -> Self {
        Self {
            reservations: 128,
            circuits: 256,
            circuits_per_peer: 64,
            circuit_bytes: 2 << 30,
            circuit_time: Duration::from_secs(60 * 60),
        }
    }
}

impl RelayLimits {
    fn config(&self) -> relay::Config {
        let config = relay::Config {
            max_reservations: self.reservations,
            reservation_duration: RESERVATION_TIME,
            max_circuits: self.circuits,
            max_circuits_per_peer: self.circuits_per_peer,
            max_circuit_bytes: self.circuit_bytes,
            max_circuit_duration: self.circuit_time,
            circuit_src_rate_limiters: Vec::new(),
            // The default number of reservations of one peer (one for each of its connections), and their default rates, stay.
            ..relay::Config::default()
        };
        let limit = |(burst, interval): (u32, Duration)| (NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN), interval);
        let (of_peer, of_ip) = (limit(CIRCUITS_OF_PEER), limit(CIRCUITS_OF_IP));
        config.circuit_src_per_peer(of_peer.0, of_peer.1).circuit_src_per_ip(of_ip.0, of_ip.1)
    }
}

type Request = THandlerOutEvent<relay::Behaviour>;

/// What is known of a connected peer.
enum Standing {
    /// It has not said yet of which network it is: what it asks for waits.
    Unknown(Vec<(ConnectionId, Request)>),
    /// Of this network: it is served.
    Ours,
    /// Of another, or of none: what it asks for is dropped, which resets its stream.
    Stranger,
}

/// libp2p's relay, which serves everybody; this one serves members and clients of its own network.
pub(crate) struct Relay {
    relay: relay::Behaviour,
    peers: HashMap<PeerId, Standing>,
    /// The connection on which each member made its last reservation.
    reserved: HashMap<PeerId, ConnectionId>,
    events: VecDeque<ToSwarm<relay::Event, THandlerInEvent<relay::Behaviour>>>,
}

impl Relay {
    /// One that offers nothing yet.
    pub(crate) fn new(own: PeerId, limits: &RelayLimits) -> Self {
        let mut relay = relay::Behaviour::new(own, limits.config());
        relay.set_status(Some(relay::Status::Disable));
        Self { relay, peers: HashMap::new(), reserved: HashMap::new(), events: VecDeque::new() }
    }

    /// Whether it is offered to others.
    pub(crate) fn offer(&mut self, offered: bool) {
        self.relay.set_status(Some(if offered { relay::Status::Enable } else { relay::Status::Disable }));
    }

    /// `peer` has said whether it is of this network.
    pub(crate) fn identified(&mut self, peer: PeerId, ours: bool) {
        // It may have gone meanwhile.
        let Some(standing) = self.peers.get_mut(&peer) else { return };
        let now = if ours { Standing::Ours } else { Standing::Stranger };
        if let (Standing::Unknown(waiting), true) = (std::mem::replace(standing, now), ours) {
            for (connection, request) in waiting {
                self.serve(peer, connection, request);
            }
        }
    }

    /// Hands a request, or what became of one, to the relay.
    ///
    /// A member that reserves on another connection than before has moved. libp2p would lead circuits to any of the two, and the older
    /// one is dead: it is closed.
    fn serve(&mut self, peer: PeerId, connection: ConnectionId, request: Request) {
        self.relay.on_connection_handler_event(peer, connection, request);
        // The swarm polls after this in any case, so that no waker is needed.
        let mut cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(event) = self.relay.poll(&mut cx) {
            if let ToSwarm::GenerateEvent(relay::Event::ReservationReqAccepted { src_peer_id, .. }) = &event
                && *src_peer_id == peer
                && let Some(older) = self.reserved.insert(peer, connection)
                && older != connection
            {
                let connection = CloseConnection::One(older);
                self.events.push_back(ToSwarm::CloseConnection { peer_id: peer, connection });
            }
            self.events.push_back(event);
        }
    }
}

impl NetworkBehaviour for Relay {
    type ConnectionHandler = THandler<relay::Behaviour>;
    type ToSwarm = relay::Event;

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.relay.handle_established_inbound_connection(connection, peer, local, remote)
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.relay.handle_established_outbound_connection(connection, peer, address, role, port)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match &event {
            // It gives these a handler that takes no orders, and then gives it orders when the offer changes, which is a panic.
            FromSwarm::ConnectionEstablished(established) if established.endpoint.is_relayed() => return,
            FromSwarm::ConnectionEstablished(established) => {
                self.peers.entry(established.peer_id).or_insert_with(|| Standing::Unknown(Vec::new()));
            }
            FromSwarm::ConnectionClosed(closed) if closed.remaining_established == 0 => {
                self.peers.remove(&closed.peer_id);
                self.reserved.remove(&closed.peer_id);
            }
            FromSwarm::ConnectionClosed(closed) => {
                if let Some(Standing::Unknown(waiting)) = self.peers.get_mut(&closed.peer_id) {
                    waiting.retain(|(connection, _)| *connection != closed.connection_id);
                }
            }
            _ => {}
        }
        self.relay.on_swarm_event(event);
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, connection: ConnectionId, event: Request) {
        match self.peers.get_mut(&peer) {
            Some(Standing::Ours) => self.serve(peer, connection, event),
            Some(Standing::Unknown(waiting)) if waiting.len() < MAX_WAITING => waiting.push((connection, event)),
            _ => tracing::debug!(%peer, "a stranger is not relayed"),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<relay::Event, THandlerInEvent<Self>>> {
        // What is in its own queue came later.
        self.events.pop_front().map_or_else(|| self.relay.poll(cx), Poll::Ready)
    }
}

#[cfg(test)]
mod tests {
    use libp2p::core::ConnectedPoint;
    use libp2p::swarm::behaviour::ConnectionEstablished;

    use super::*;

    /// What is sent to the handler of a connection over `address` when the offer changes.
    fn orders(address: &str) -> usize {
        let (own, peer) = (PeerId::random(), PeerId::random());
        let mut relay = Relay::new(own, &RelayLimits::default());
        let endpoint = ConnectedPoint::Dialer {
            address: address.replace("PEER", &peer.to_string()).parse().unwrap(),
            role_override: Endpoint::Dialer,
            port_use: PortUse::New,
        };
        relay.on_swarm_event(FromSwarm::ConnectionEstablished(ConnectionEstablished {
            peer_id: peer,
            connection_id: ConnectionId::new_unchecked(1),
            endpoint: &endpoint,
            failed_addresses: &[],
            other_established: 0,
        }));
        relay.offer(true);
        let mut cx = Context::from_waker(Waker::noop());
        std::iter::from_fn(|| relay.poll(&mut cx).is_ready().then_some(())).count()
    }

    #[test]
    fn regression_a_member_with_relayed_connections_may_begin_to_relay() {
        assert_eq!(orders("/ip4/203.0.113.7/udp/1/quic-v1"), 1);
        assert_eq!(orders("/ip4/203.0.113.7/udp/1/quic-v1/p2p/PEER/p2p-circuit/p2p/PEER"), 0);
    }
}
