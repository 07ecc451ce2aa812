//! What the swarm tells, and what follows.

use libp2p::kad::{GetProvidersOk, QueryId, QueryResult};
use libp2p::request_response::Message;
use libp2p::swarm::SwarmEvent;
use libp2p::{PeerId, identify, kad, mdns, ping, relay, request_response};
use tokio::time::Instant;

use super::{MAX_ADDRESSES, SwarmTask};
use crate::discovery::behaviour::BehaviourEvent;

impl SwarmTask {
    pub(super) fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::NewListenAddr { listener_id, address } => self.on_listening(listener_id, address),
            SwarmEvent::ExpiredListenAddr { address, .. } => self.on_expired(address),
            SwarmEvent::ListenerClosed { listener_id, .. } => {
                self.reach.lost(listener_id, Instant::now());
                self.update_reach();
            }
            SwarmEvent::NewExternalAddrCandidate { address } => self.tell_external(&address),
            SwarmEvent::ExternalAddrConfirmed { address } => {
                self.reach.confirm(&address);
                self.update_reach();
            }
            SwarmEvent::ExternalAddrExpired { address } => {
                self.reach.expire(&address);
                self.update_reach();
            }
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                let dialled = endpoint.is_dialer().then(|| endpoint.get_remote_address().clone());
                self.on_connected(peer_id, connection_id, dialled);
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established: 0, .. } => self.on_disconnected(peer_id),
            SwarmEvent::OutgoingConnectionError { peer_id, error, .. } => {
                tracing::debug!(?peer_id, ?error, "dial failed");
                self.note_failed_dial(&error);
                if let Some(peer) = peer_id {
                    self.answer_lanes(peer, Some(error.to_string()));
                }
            }
            SwarmEvent::Behaviour(event) => self.on_behaviour(event),
            _ => {}
        }
    }

    fn on_behaviour(&mut self, event: BehaviourEvent) {
        match event {
            BehaviourEvent::Identify(identify::Event::Received { peer_id, info, .. }) => {
                self.on_identified(peer_id, info)
            }
            BehaviourEvent::Ping(ping::Event { peer, connection, result: Ok(round_trip) }) => {
                self.swarm.behaviour().frames.measured(&peer, connection, round_trip)
            }
            // QUIC finds out by itself; TCP would keep a dead connection for a quarter of an hour.
            BehaviourEvent::Ping(ping::Event { connection, result: Err(ping::Failure::Timeout), .. }) => {
                self.swarm.close_connection(connection);
            }
            BehaviourEvent::RelayClient(relay::client::Event::OutboundCircuitEstablished { relay_peer_id, limit }) => {
                let limit = limit.map(|limit| (limit.data_in_bytes(), limit.duration()));
                self.note_limit(relay_peer_id, limit.unwrap_or_default());
            }
            BehaviourEvent::Frames(lane) => self.hand_over(lane),
            BehaviourEvent::Dcutr(event) => match event.result {
                Ok(_) => tracing::debug!(peer = %event.remote_peer_id, "hole punched"),
                Err(error) => tracing::debug!(peer = %event.remote_peer_id, %error, "no hole punched"),
            },
            BehaviourEvent::AutonatClient(event) => {
                self.on_tested(&event.tested_addr, event.result.map_err(|e| e.to_string()))
            }
            BehaviourEvent::Mdns(mdns::Event::Discovered(found)) => {
                for (peer, address) in found {
                    self.swarm.behaviour_mut().kad.add_address(&peer, address.clone());
                    if !self.swarm.is_connected(&peer) {
                        // A failed dial is reported as an event.
                        let _ = self.swarm.dial(address);
                    }
                }
            }
            BehaviourEvent::Kad(kad::Event::RoutingUpdated { is_new_peer: true, .. }) => {
                self.publish_pace.new_peer(Instant::now());
            }
            BehaviourEvent::Kad(kad::Event::OutboundQueryProgressed { id, result, step, .. }) => {
                self.on_query(id, result, step.last)
            }
            BehaviourEvent::Adverts(request_response::Event::Message { message, .. }) => match message {
                Message::Request { request, channel, .. } => self.on_advert_request(request, channel),
                Message::Response { request_id, response } => self.on_adverts(request_id, response),
            },
            BehaviourEvent::Adverts(request_response::Event::OutboundFailure { request_id, error, .. }) => {
                self.on_unanswered(request_id, &error)
            }
            _ => {}
        }
    }

    fn on_identified(&mut self, peer: PeerId, info: identify::Info) {
        let ours = info.protocol_version == self.identify_version;
        if let Some(relay) = self.swarm.behaviour_mut().relay.as_mut() {
            relay.identified(peer, ours);
        }
        self.note_network(peer, &info.protocol_version);
        // Relays of other networks do not serve this one.
        let relays = ours && info.protocols.contains(&relay::HOP_PROTOCOL_NAME);
        if relays && self.punches {
            self.learn_quic_address(peer, &info.listen_addrs);
        }
        self.reach.note_relay(peer, relays, self.dialled.get(&peer));
        self.use_relays();
        // Clients are not part of the DHT, and nor are members of other networks.
        if !info.protocols.contains(&self.kad_protocol) {
            return;
        }
        if self.dialled.contains_key(&peer) {
            self.reach.observed_by(peer, info.observed_addr);
            self.update_reach();
        }
        for address in info.listen_addrs.into_iter().take(MAX_ADDRESSES) {
            self.swarm.behaviour_mut().kad.add_address(&peer, address);
        }
        if self.swarm.is_connected(&peer) && self.members.insert(peer) {
            self.reports.connected.send_replace(self.members.len());
        }
    }

    fn on_query(&mut self, id: QueryId, result: QueryResult, last: bool) {
        match result {
            QueryResult::StartProviding(outcome) if self.publishing.remove(&id) => {
                if outcome.is_err() {
                    // It ran out of time: some that should keep the record do not have it, as if they had just come.
                    self.publish_pace.new_peer(Instant::now());
                }
                if self.publishing.is_empty() {
                    self.reports.published.send_replace(true);
                }
            }
            QueryResult::GetProviders(outcome) => {
                if let Ok(GetProvidersOk::FoundProviders { providers, .. }) = &outcome {
                    for peer in providers {
                        self.note_addresses(*peer);
                    }
                }
                let Some(search) = self.searches.get_mut(&id) else { return };
                if let Ok(GetProvidersOk::FoundProviders { providers, .. }) = outcome {
                    for peer in providers.into_iter().filter(|peer| search.seen.insert(*peer)) {
                        // A reader that is gone, or so slow that its queue is full, gets no more.
                        if search.found.try_send(peer).is_err() {
                            if let Some(mut query) = self.swarm.behaviour_mut().kad.query_mut(&id) {
                                query.finish();
                            }
                            break;
                        }
                    }
                }
                if last {
                    self.searches.remove(&id);
                }
            }
            QueryResult::GetClosestPeers(outcome) if last => self.on_closest(id, outcome),
            _ => {}
        }
    }
}
