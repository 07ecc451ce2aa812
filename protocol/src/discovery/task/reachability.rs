//! How others reach this member, and by which addresses it reaches them.

use libp2p::core::Endpoint;
use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::{ConnectionId, NetworkBehaviour};
use libp2p::{Multiaddr, PeerId, kad, relay};
use tokio::time::Instant;

use super::super::address::{ip, is_quic};
use super::super::in_process::is_memory;
use super::{MAX_ADDRESSES, MAX_HINTS, SwarmTask};
use crate::relayed::is_circuit;

impl SwarmTask {
    /// Tells the DHT, relays and handles what has changed in how others reach this member.
    pub(super) fn update_reach(&mut self) {
        let direct = self.reach.is_direct();
        let external = self.swarm.external_addresses().any(|address| !is_circuit(address));
        let behaviour = self.swarm.behaviour_mut();
        let mode = if direct { kad::Mode::Server } else { kad::Mode::Client };
        if behaviour.kad.mode() != mode {
            tracing::info!(direct, "reachability changed");
            behaviour.kad.set_mode(Some(mode));
        }
        if let Some(relay) = behaviour.relay.as_mut() {
            let serves = direct && external;
            relay.set_status(Some(if serves { relay::Status::Enable } else { relay::Status::Disable }));
        }
        for listener in self.reach.needless_relays() {
            self.swarm.remove_listener(listener);
        }
        let reach = self.reach.reach();
        if *self.reports.reach.borrow() != reach {
            self.reports.reach.send_replace(reach);
            // The provider records carry addresses.
            self.publish_pace.news(Instant::now());
        }
    }

    pub(super) fn use_relays(&mut self) {
        for (relay, circuit) in self.reach.wanted_relays(Instant::now()) {
            match self.swarm.listen_on(circuit.clone()) {
                Ok(listener) => self.reach.asked(listener, relay),
                Err(error) => {
                    tracing::debug!(%circuit, %error, "relay not asked");
                    self.reach.refused(relay, Instant::now());
                }
            }
        }
    }

    pub(super) fn on_listening(&mut self, listener: ListenerId, address: Multiaddr) {
        if is_circuit(&address) {
            tracing::info!(%address, "reached through a relay");
            self.reach.reserved(listener, &address);
            self.update_reach();
            return;
        }
        self.tell_external(&address);
        if is_memory(&address) {
            // Whoever is there reaches it, as a member of the open internet is reached.
            self.swarm.add_external_address(address.clone());
        }
        let own = address.with(Protocol::P2p(*self.swarm.local_peer_id()));
        self.reports.addresses.send_modify(|all| {
            if !all.contains(&own) {
                all.push(own);
                // Over QUIC holes are punched most easily, so those who join should rather use it.
                all.sort_by_key(|address| !is_quic(address));
            }
        });
    }

    /// Tells others an address that is known to be reachable without AutoNAT's word.
    pub(super) fn tell_external(&mut self, address: &Multiaddr) {
        if self.reach.is_external(address) {
            self.swarm.add_external_address(address.clone());
            self.reach.confirm(address);
            self.update_reach();
        }
    }

    pub(super) fn on_connected(&mut self, peer: PeerId, dialled: Option<Multiaddr>) {
        if let Some(address) = dialled {
            self.bootstrap.met(&address, peer);
            // Of several, one over QUIC is remembered: see `learn_quic_address`.
            let better = is_quic(&address) || !self.dialled.contains_key(&peer);
            if better && !is_circuit(&address) {
                self.dialled.insert(peer, address);
            }
        }
        self.answer_lanes(peer, None);
    }

    pub(super) fn on_disconnected(&mut self, peer: PeerId) {
        self.dialled.remove(&peer);
        self.reach.forget_relay(&peer);
        if self.members.remove(&peer) {
            self.reports.connected.send_replace(self.members.len());
        }
    }

    /// What those who store a provider's record know of its addresses, for as long as the query lasts.
    pub(super) fn note_addresses(&mut self, peer: PeerId) {
        let kad = &mut self.swarm.behaviour_mut().kad;
        let known = kad.handle_pending_outbound_connection(
            ConnectionId::new_unchecked(usize::MAX),
            Some(peer),
            &[],
            Endpoint::Dialer,
        );
        let mut addresses = known.unwrap_or_default();
        addresses.truncate(MAX_ADDRESSES);
        if !addresses.is_empty() {
            if self.hints.len() >= MAX_HINTS {
                self.hints.clear();
            }
            self.hints.insert(peer, addresses);
        }
    }

    /// A relay that was dialled over TCP is dialled over QUIC too: it then says at which address it sees this member's QUIC, and
    /// holes are punched in QUIC rather than in TCP.
    pub(super) fn learn_quic_address(&mut self, peer: PeerId, listens: &[Multiaddr]) {
        let Some(dialled) = self.dialled.get(&peer).filter(|address| !is_quic(address)) else { return };
        let same_host = |address: &&Multiaddr| is_quic(address) && !is_circuit(address) && ip(address) == ip(dialled);
        if let Some(address) = listens.iter().find(same_host).cloned() {
            self.dial_besides(peer, vec![address]);
        }
    }
}
