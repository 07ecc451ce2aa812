//! AutoNAT's client, which by itself tests each address once and never again.

use std::collections::{BTreeSet, HashSet};
use std::task::{Context, Poll};
use std::time::Duration;

use libp2p::autonat::v2::client::{Behaviour, Event};
use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::behaviour::NewExternalAddrCandidate;
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use crate::relayed::is_circuit;

/// Addresses that are tested again. A member has few; what others claim to see of it is bounded.
const MAX_CANDIDATES: usize = 16;

/// A member that cannot be dialled looks again after this, and after twice as long each time: perhaps its owner has set up its router.
const FIRST_PAUSE: Duration = Duration::from_secs(15);
const LONGEST_PAUSE: Duration = Duration::from_secs(2 * 60);
/// One that can be dialled sees whether that is still so.
const DIRECT_PAUSE: Duration = Duration::from_secs(5 * 60);

/// When addresses are tested again.
#[derive(Debug)]
pub(super) struct RetestTimes {
    next: Instant,
    pause: Duration,
}

impl RetestTimes {
    pub(super) fn new(now: Instant) -> Self {
        Self { next: now + FIRST_PAUSE, pause: FIRST_PAUSE }
    }

    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// All addresses are tested again now. `direct`: whether one of them was found to be reachable, and none was not since.
    pub(super) fn started(&mut self, direct: bool, now: Instant) {
        self.pause = if direct { FIRST_PAUSE } else { (self.pause * 2).min(LONGEST_PAUSE) };
        self.next = now + if direct { DIRECT_PAUSE } else { self.pause };
    }

    /// A test is in doubt: another follows, but not at once.
    pub(super) fn again_soon(&mut self, now: Instant) {
        *self = Self::new(now);
    }

    /// Something has changed: the pauses begin anew.
    pub(super) fn hurry(&mut self, now: Instant) {
        *self = Self { next: now, pause: FIRST_PAUSE / 2 };
    }
}

/// Tests whether others can dial this member at the addresses at which it was seen, and again when told to.
///
/// A new test is a new client of AutoNAT, which knows nothing of the tests before, and no connection but those made from then on:
/// whoever calls [`start_again`](Self::start_again) makes one.
#[derive(Default)]
pub(crate) struct AutonatClient {
    client: Behaviour,
    /// Connections that the present client knows.
    known: HashSet<ConnectionId>,
    candidates: BTreeSet<Multiaddr>,
}

impl AutonatClient {
    /// Has `address` tested, now and whenever all are tested again.
    pub(crate) fn offer(&mut self, address: &Multiaddr) {
        // Relays are seen to work by other means.
        if is_circuit(address) {
            return;
        }
        if self.candidates.len() < MAX_CANDIDATES {
            self.candidates.insert(address.clone());
        }
        self.client.on_swarm_event(FromSwarm::NewExternalAddrCandidate(NewExternalAddrCandidate { addr: address }));
    }

    /// `address` is not this member's any more.
    pub(crate) fn withdraw(&mut self, address: &Multiaddr) {
        self.candidates.remove(address);
    }

    /// Forgets what was tested.
    pub(crate) fn start_again(&mut self) {
        self.client = Behaviour::default();
        self.known.clear();
        for address in std::mem::take(&mut self.candidates) {
            self.offer(&address);
        }
    }
}

impl NetworkBehaviour for AutonatClient {
    type ConnectionHandler = THandler<Behaviour>;
    type ToSwarm = Event;

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.client.handle_established_inbound_connection(connection, peer, local, remote)
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.client.handle_established_outbound_connection(connection, peer, address, role, port)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::NewExternalAddrCandidate(candidate) => return self.offer(candidate.addr),
            FromSwarm::ConnectionEstablished(established) => _ = self.known.insert(established.connection_id),
            // The client takes one that it does not know for a mistake, and panics.
            FromSwarm::ConnectionClosed(closed) if !self.known.remove(&closed.connection_id) => return,
            _ => {}
        }
        self.client.on_swarm_event(event);
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, connection: ConnectionId, event: THandlerOutEvent<Self>) {
        // As above.
        if self.known.contains(&connection) {
            self.client.on_connection_handler_event(peer, connection, event);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Event, THandlerInEvent<Self>>> {
        self.client.poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_failed_is_tested_again_within_two_minutes_for_ever() {
        let start = Instant::now();
        let mut times = RetestTimes::new(start);
        let mut pauses = Vec::new();
        for _ in 0..6 {
            let now = times.next();
            times.started(false, now);
            pauses.push((times.next() - now).as_secs());
        }
        assert_eq!(times.next() - start, Duration::from_secs(15 + pauses.iter().sum::<u64>()));
        assert_eq!(pauses, [30, 60, 120, 120, 120, 120]);
        times.hurry(start);
        assert_eq!(times.next(), start);
        times.started(false, start);
        assert_eq!(times.next(), start + FIRST_PAUSE);
        times.started(true, start);
        assert_eq!(times.next(), start + DIRECT_PAUSE);
    }
}
