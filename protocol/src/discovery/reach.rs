//! Whether others can dial this member, and what it does when they cannot.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::address::{self, is_public};
use super::{DiscoveryConfig, RelayLimits};
use crate::relayed::is_circuit;

/// Relays that are used at a time: when one vanishes, the other still leads here.
const MAX_RELAYS: usize = 2;
/// Addresses that are believed of one relay.
const MAX_CIRCUITS_PER_RELAY: usize = 4;
/// A relay that refused is asked again after this.
const RELAY_RETRY: Duration = Duration::from_secs(10);
/// One that had agreed and was lost is asked again after this.
const RELAY_RETURN: Duration = Duration::from_secs(1);
/// A confirmed address is given up when so many tests in a row have failed: one tester may be wrong.
const MAX_FAILURES: u32 = 2;
/// Relays remembered.
const MAX_CANDIDATES: usize = 64;

/// Members that tell where they see this one: enough to know how its router maps ports.
const MAX_OBSERVERS: usize = 8;

/// What a member believes of its own reachability.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ReachPolicy {
    /// On the open internet AutoNAT says whether others can dial it; where all bootstrap addresses are loopback or private, or there
    /// are none, it takes itself for reachable.
    #[default]
    Detect,
    /// Others can dial it.
    Reachable,
    /// Others cannot dial it: it is always reached through relays.
    Unreachable,
}

/// How a member deals with routers that stand before it and before others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReachConfig {
    /// What it believes of itself.
    pub policy: ReachPolicy,
    /// Whether it relays for others of its network once it is reachable.
    pub serve_relay: bool,
    /// Within which limits.
    pub relay_limits: RelayLimits,
    /// Whether it asks its router for a port (UPnP). Only done while it is not known to be reachable.
    pub upnp: bool,
    /// Whether relayed connections are replaced by hole-punched ones (DCUtR) where that succeeds.
    pub punch: bool,
}

impl Default for ReachConfig {
    /// Detects, relays and punches, but leaves the router alone.
    fn default() -> Self {
        Self {
            policy: ReachPolicy::Detect,
            serve_relay: true,
            relay_limits: RelayLimits::default(),
            upnp: false,
            punch: true,
        }
    }
}

/// How others reach a member.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Reachability {
    /// They dial it.
    #[default]
    Direct = 0,
    /// They go through a relay, and punch a hole where that succeeds.
    Relayed = 1,
    /// Not at all, or not yet.
    Unreachable = 2,
}

impl std::fmt::Display for Reachability {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::Relayed => "relayed",
            Self::Unreachable => "unreachable",
        })
    }
}

/// What is known of how others reach this member.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reach {
    /// How.
    pub reachability: Reachability,
    /// Its addresses at the relays that hold a reservation for it.
    pub circuits: Vec<Multiaddr>,
    /// Addresses of the open internet at which it was seen to be reachable.
    pub public_ips: BTreeSet<IpAddr>,
    /// Where members that were dialled over QUIC saw it on the open internet; the first few of them.
    pub observed: BTreeMap<PeerId, Multiaddr>,
    /// Where its router leads to the data plane (see [`Discovery::forward_data`](super::Discovery::forward_data)).
    pub data: Option<SocketAddr>,
}

/// What a member took itself for when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It does not listen.
    Client,
    /// It can be dialled.
    Reachable,
    /// AutoNAT or UPnP must say so first.
    Unconfirmed,
    /// It cannot be dialled.
    Unreachable,
}

impl Standing {
    pub(super) fn of(config: &DiscoveryConfig) -> Self {
        match config.reach.policy {
            _ if config.listen.is_empty() => Self::Client,
            ReachPolicy::Reachable => Self::Reachable,
            ReachPolicy::Unreachable => Self::Unreachable,
            ReachPolicy::Detect if config.bootstrap.iter().any(is_public) => Self::Unconfirmed,
            ReachPolicy::Detect => Self::Reachable,
        }
    }
}

/// A relay that was asked to lead others here.
#[derive(Debug)]
struct Reservation {
    relay: PeerId,
    /// One for each of the relay's addresses, known once the relay has agreed.
    circuits: Vec<Multiaddr>,
}

/// Keeps account of confirmed addresses and of relays; what is to be done about them is the swarm task's.
#[derive(Debug)]
pub(super) struct ReachState {
    standing: Standing,
    policy: ReachPolicy,
    loopback_only: bool,
    /// With the number of tests that each has failed since it was confirmed.
    confirmed: BTreeMap<Multiaddr, u32>,
    data: Option<SocketAddr>,
    observed: BTreeMap<PeerId, Multiaddr>,
    /// Connected members that relay, with the address at which they were dialled.
    candidates: HashMap<PeerId, Multiaddr>,
    reservations: HashMap<ListenerId, Reservation>,
    not_before: HashMap<PeerId, Instant>,
}

impl ReachState {
    pub(super) fn new(config: &DiscoveryConfig) -> Self {
        Self {
            standing: Standing::of(config),
            policy: config.reach.policy,
            loopback_only: config.listen.iter().all(address::is_loopback),
            confirmed: BTreeMap::new(),
            data: None,
            observed: BTreeMap::new(),
            candidates: HashMap::new(),
            reservations: HashMap::new(),
            not_before: HashMap::new(),
        }
    }

    /// Whether others can dial this member, as far as is known.
    pub(super) fn is_direct(&self) -> bool {
        match self.standing {
            Standing::Reachable => true,
            Standing::Unconfirmed => !self.confirmed.is_empty(),
            Standing::Client | Standing::Unreachable => false,
        }
    }

    /// Whether an address that this member listens on, or was seen at, is one to tell others without AutoNAT's word.
    pub(super) fn is_external(&self, address: &Multiaddr) -> bool {
        if self.standing != Standing::Reachable || is_circuit(address) {
            return false;
        }
        let told = self.policy == ReachPolicy::Reachable
            && (self.loopback_only || !address::is_loopback(address))
            && !address::is_unspecified(address);
        told || is_public(address)
    }

    /// An address was confirmed by AutoNAT, by the router, or by [`is_external`](Self::is_external).
    pub(super) fn confirm(&mut self, address: &Multiaddr) {
        if is_public(address) && !is_circuit(address) {
            self.confirmed.insert(address.clone(), 0);
        }
    }

    /// A member that was dialled saw this one at `address`.
    pub(super) fn observed_by(&mut self, peer: PeerId, address: Multiaddr) {
        let is_told = is_public(&address) && address::is_quic(&address) && !is_circuit(&address);
        if is_told && self.observed.len() < MAX_OBSERVERS {
            self.observed.entry(peer).or_insert(address);
        }
    }

    pub(super) fn is_confirmed(&self, address: &Multiaddr) -> bool {
        self.confirmed.contains_key(address)
    }

    /// AutoNAT found that nobody can dial `address`; whether that is to be believed of one that was confirmed.
    pub(super) fn failed(&mut self, address: &Multiaddr) -> bool {
        let Some(failures) = self.confirmed.get_mut(address) else { return false };
        *failures += 1;
        *failures >= MAX_FAILURES
    }

    /// Whether others can dial this member and no test has put that into question.
    pub(super) fn is_surely_direct(&self) -> bool {
        self.is_direct() && self.confirmed.values().all(|failures| *failures == 0)
    }

    pub(super) fn set_data(&mut self, data: Option<SocketAddr>) {
        self.data = data;
    }

    pub(super) fn expire(&mut self, address: &Multiaddr) {
        self.confirmed.remove(address);
    }

    /// `peer` was seen to relay, or not to; `dialled` is the address by which we reached it.
    pub(super) fn note_relay(&mut self, peer: PeerId, relays: bool, dialled: Option<&Multiaddr>) {
        let (address, _) = match dialled {
            Some(address) if relays => address::split(address),
            _ => {
                self.candidates.remove(&peer);
                return;
            }
        };
        // From outside, a relay on our own network would be no help.
        let usable = !is_circuit(&address) && (self.standing == Standing::Unreachable || is_public(&address));
        if usable && self.candidates.len() < MAX_CANDIDATES {
            self.candidates.insert(peer, address);
        }
    }

    pub(super) fn forget_relay(&mut self, peer: &PeerId) {
        self.candidates.remove(peer);
    }

    /// The circuit addresses to listen on now.
    pub(super) fn wanted_relays(&self, now: Instant) -> Vec<(PeerId, Multiaddr)> {
        let behind = matches!(self.standing, Standing::Unconfirmed | Standing::Unreachable);
        if !behind || self.is_direct() {
            return Vec::new();
        }
        let asked = |peer: &PeerId| self.reservations.values().any(|reservation| reservation.relay == *peer);
        let may = |peer: &PeerId| self.not_before.get(peer).is_none_or(|time| *time <= now);
        self.candidates
            .iter()
            .filter(|(peer, _)| !asked(peer) && may(peer))
            .take(MAX_RELAYS.saturating_sub(self.reservations.len()))
            .map(|(peer, address)| (*peer, address.clone().with(Protocol::P2p(*peer)).with(Protocol::P2pCircuit)))
            .collect()
    }

    /// Reservations that are of no more use.
    pub(super) fn needless_relays(&self) -> Vec<ListenerId> {
        if self.is_direct() { self.reservations.keys().copied().collect() } else { Vec::new() }
    }

    pub(super) fn asked(&mut self, listener: ListenerId, relay: PeerId) {
        self.reservations.insert(listener, Reservation { relay, circuits: Vec::new() });
    }

    /// A relay that could not even be asked, or refused.
    pub(super) fn refused(&mut self, relay: PeerId, now: Instant) {
        self.not_before.retain(|_, time| *time > now);
        self.not_before.insert(relay, now + RELAY_RETRY);
    }

    pub(super) fn reserved(&mut self, listener: ListenerId, circuit: &Multiaddr) {
        if let Some(reservation) = self.reservations.get_mut(&listener)
            && reservation.circuits.len() < MAX_CIRCUITS_PER_RELAY
            && !reservation.circuits.contains(circuit)
        {
            reservation.circuits.push(circuit.clone());
        }
    }

    /// The listener has closed: the relay refused, or it is gone.
    pub(super) fn lost(&mut self, listener: ListenerId, now: Instant) {
        let Some(reservation) = self.reservations.remove(&listener) else { return };
        self.refused(reservation.relay, now);
        if !reservation.circuits.is_empty() {
            self.not_before.insert(reservation.relay, now + RELAY_RETURN);
        }
    }

    pub(super) fn reach(&self) -> Reach {
        let mut circuits: Vec<Multiaddr> =
            self.reservations.values().flat_map(|reservation| &reservation.circuits).cloned().collect();
        circuits.sort_by_key(|circuit| !address::is_quic(circuit));
        let reachability = if self.is_direct() {
            Reachability::Direct
        } else if circuits.is_empty() {
            Reachability::Unreachable
        } else {
            Reachability::Relayed
        };
        let public_ips = self.confirmed.keys().filter_map(address::ip).collect();
        Reach { reachability, circuits, public_ips, data: self.data, observed: self.observed.clone() }
    }
}

#[cfg(test)]
mod tests;
