//! How others reach this member, and by which addresses it reaches them.

use std::net::SocketAddr;

use libp2p::core::Endpoint;
use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::{ConnectionId, NetworkBehaviour};
use libp2p::{Multiaddr, PeerId, kad};
use tokio::time::Instant;

use super::super::address::{ip, is_quic};
use super::super::gateway::{Forwarded, Port};
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
            relay.offer(direct && external);
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
        self.note_move(&address);
        if let (Some(gateway), Some(port)) = (&self.gateway, Port::of(&address)) {
            gateway.want(port);
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

    pub(super) fn forward_data(&mut self, socket: SocketAddr) {
        let SocketAddr::V4(socket) = socket else { return };
        self.data_port = Some(Port::Udp(socket));
        if let Some(gateway) = &self.gateway {
            gateway.want(Port::Udp(socket));
        }
    }

    /// The router leads here by other addresses than before. Whether they hold what it says is AutoNAT's to find out.
    pub(super) fn on_forwarded(&mut self, forwarded: Forwarded) {
        tracing::debug!(?forwarded, "the router leads here");
        let control = |forwarded: &Forwarded| {
            let ports = forwarded.iter().filter(|(port, _)| Some(**port) != self.data_port);
            ports.map(|(port, outer)| port.reached_at(*outer)).collect::<Vec<_>>()
        };
        let (gone, new) = (control(&self.forwarded), control(&forwarded));
        if let Some(autonat) = self.swarm.behaviour_mut().autonat_client.as_mut() {
            for address in gone.iter().filter(|address| !new.contains(address)) {
                autonat.withdraw(address);
            }
            for address in new.iter().filter(|address| !gone.contains(address)) {
                autonat.offer(address);
            }
        }
        self.reach.set_data(self.data_port.and_then(|port| forwarded.get(&port)).copied());
        if gone != new {
            self.retests.hurry(Instant::now());
        }
        self.forwarded = forwarded;
        self.update_reach();
    }

    /// Whether AutoNAT's word counts.
    pub(super) fn tests(&self) -> bool {
        self.swarm.behaviour().autonat_client.is_enabled()
    }

    /// Has all addresses tested again, by a member on a new connection.
    pub(super) fn test_again(&mut self) {
        self.retests.started(self.reach.is_surely_direct(), Instant::now());
        let tester = self.members.iter().find_map(|peer| Some((*peer, self.dialled.get(peer)?.clone())));
        let Some((peer, address)) = tester else { return };
        if let Some(autonat) = self.swarm.behaviour_mut().autonat_client.as_mut() {
            autonat.start_again();
        }
        self.dial_besides(peer, vec![address]);
    }

    pub(super) fn on_tested(&mut self, address: &Multiaddr, result: Result<(), String>) {
        tracing::debug!(%address, ?result, "AutoNAT tested an address");
        if result.is_err() && self.reach.is_confirmed(address) {
            if self.reach.failed(address) {
                self.swarm.remove_external_address(address);
                self.reach.expire(address);
                self.update_reach();
            }
            self.retests.again_soon(Instant::now());
        }
    }

    /// Tells others an address that is known to be reachable without AutoNAT's word.
    pub(super) fn tell_external(&mut self, address: &Multiaddr) {
        if self.reach.is_external(address) {
            self.swarm.add_external_address(address.clone());
            self.reach.confirm(address);
            self.update_reach();
        }
    }

    pub(super) fn on_connected(&mut self, peer: PeerId, connection: ConnectionId, dialled: Option<Multiaddr>) {
        if let Some(address) = dialled {
            self.bootstrap.met(&address, peer);
            // Of several, one over QUIC is remembered: see `learn_quic_address`.
            let better = is_quic(&address) || !self.dialled.contains_key(&peer);
            if better && !is_circuit(&address) {
                self.dialled.insert(peer, address);
            }
        }
        self.replace_connections(peer, connection);
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
