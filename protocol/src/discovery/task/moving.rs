//! What is done when this member's own addresses change: another network, a new lease, a cable pulled out.

use std::time::Duration;

use libp2p::multiaddr::Protocol;
use libp2p::swarm::ConnectionId;
use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::super::address::is_loopback;
use super::super::gateway::Port;
use super::SwarmTask;

/// Addresses come and go together: what is to be done is done once, so long after the first of them.
const MOVE_DELAY: Duration = Duration::from_millis(300);
/// Members that are dialled again after a move; others are when they are needed.
const MAX_REDIALS: usize = 16;

impl SwarmTask {
    /// An address that this member does not listen on any more.
    pub(super) fn on_expired(&mut self, address: Multiaddr) {
        if let (Some(gateway), Some(port)) = (&self.gateway, Port::of(&address)) {
            gateway.give_back(port);
        }
        if let Some(autonat) = self.swarm.behaviour_mut().autonat_client.as_mut() {
            autonat.withdraw(&address);
        }
        self.swarm.remove_external_address(&address);
        self.reach.expire(&address);
        self.update_reach();
        self.note_move(&address);
        let own = address.with(Protocol::P2p(*self.swarm.local_peer_id()));
        self.reports.addresses.send_modify(|all| all.retain(|known| *known != own));
    }

    /// An address was lost or won.
    pub(super) fn note_move(&mut self, address: &Multiaddr) {
        if !is_loopback(address) {
            self.move_at.get_or_insert(Instant::now() + MOVE_DELAY);
        }
    }

    /// Connections from a lost address are dead, but nothing says so for ten seconds. Those members through which this one is found are
    /// dialled anew, learn its new addresses, and get its records again.
    pub(super) fn move_on(&mut self) {
        self.move_at = None;
        self.retests.hurry(Instant::now());
        self.publish_pace.moved(Instant::now());
        let mut known: Vec<(PeerId, Multiaddr)> =
            self.dialled.iter().map(|(peer, address)| (*peer, address.clone())).collect();
        known.sort_by_key(|(peer, _)| !self.members.contains(peer));
        known.truncate(MAX_REDIALS);
        tracing::info!(members = known.len(), "own addresses changed");
        self.redialled = known.iter().map(|(peer, _)| *peer).collect();
        for (peer, address) in known {
            self.dial_besides(peer, vec![address]);
        }
        self.dial_bootstrap();
    }

    /// A connection made after a move, ours or the peer's, replaces those made before.
    pub(super) fn replace_connections(&mut self, peer: PeerId, connection: ConnectionId) {
        let moved = self.doubted.remove(&peer) && self.is_silent(&peer);
        if !self.redialled.remove(&peer) && !moved {
            return;
        }
        for older in self.swarm.behaviour().frames.connections(&peer) {
            if older != connection {
                self.swarm.close_connection(older);
            }
        }
        self.publish_pace.news(Instant::now());
    }
}
