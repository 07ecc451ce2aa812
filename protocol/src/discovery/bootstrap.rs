//! The members to join through, and who was met there.

use libp2p::{Multiaddr, PeerId};

use super::address::split;

/// Why this member has not joined through a bootstrap address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BootstrapFailure {
    /// The address names a peer id, and another peer is there. The address is old, or somebody is in the way.
    #[error("{found} is there, not {expected}")]
    WrongPeer {
        /// The peer id in the address.
        expected: PeerId,
        /// The one that was proved.
        found: PeerId,
    },
    /// A member of another network is there. The network name is wrong, or the address.
    #[error("a member of network {0:?} is there")]
    OtherNetwork(String),
    /// What is there is no member of a Hanse network, or one of a version that this one does not know.
    #[error("no member of a network that this version knows is there")]
    NoMember,
    /// Nobody answered. It is tried again.
    #[error("{0}")]
    Unanswered(String),
}

/// Bootstrap addresses, with the peer that answers at each as far as that is known.
#[derive(Debug)]
pub(super) struct Bootstrap {
    own: PeerId,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    /// As given, with or without `/p2p/<peer id>`.
    address: Multiaddr,
    /// Whether a host name led to it.
    named: bool,
    /// The peer that was asked for or, where none was, the one that was met last.
    peer: Option<PeerId>,
    failure: Option<BootstrapFailure>,
}

impl Bootstrap {
    /// Leaves out addresses of `own`. `named` are those to which host names lead.
    pub(super) fn new(own: PeerId, addresses: &[Multiaddr], named: &[Multiaddr]) -> Self {
        let mut bootstrap = Self { own, members: Vec::new() };
        bootstrap.add(addresses, false);
        bootstrap.add(named, true);
        bootstrap
    }

    /// The host names lead to these addresses now.
    pub(super) fn rename(&mut self, named: &[Multiaddr]) {
        self.members.retain(|member| !member.named || named.contains(&member.address));
        self.add(named, true);
    }

    fn add(&mut self, addresses: &[Multiaddr], named: bool) {
        for address in addresses {
            let peer = split(address).1;
            let known = self.members.iter().any(|member| member.address == *address);
            if !known && peer != Some(self.own) {
                self.members.push(Member { address: address.clone(), named, peer, failure: None });
            }
        }
    }

    /// `peer` answered when `address` was dialled.
    pub(super) fn met(&mut self, address: &Multiaddr, peer: PeerId) {
        let (dialled, _) = split(address);
        for member in &mut self.members {
            if split(&member.address) == (dialled.clone(), None) {
                member.peer = Some(peer);
            }
        }
    }

    /// It was not joined through `address`; the bootstrap address of which that is news.
    pub(super) fn failed(&mut self, address: &Multiaddr, failure: &BootstrapFailure) -> Option<Multiaddr> {
        let mut news = None;
        for member in self.members.iter_mut().filter(|member| split(&member.address).0 == split(address).0) {
            if member.failure.replace(failure.clone()).as_ref() != Some(failure) {
                news = Some(member.address.clone());
            }
        }
        news
    }

    /// The peer id that a bootstrap address names.
    pub(super) fn expected(&self, address: &Multiaddr) -> Option<PeerId> {
        let here = self.members.iter().find(|member| split(&member.address).0 == split(address).0)?;
        split(&here.address).1
    }

    /// `peer` is a member of this network.
    pub(super) fn joined(&mut self, peer: &PeerId) {
        for member in self.members.iter_mut().filter(|member| member.peer.as_ref() == Some(peer)) {
            member.failure = None;
        }
    }

    /// What is wrong with each address that nobody was joined through.
    pub(super) fn failures(&self) -> Vec<(Multiaddr, BootstrapFailure)> {
        let failed = |member: &Member| Some((member.address.clone(), member.failure.clone()?));
        self.members.iter().filter_map(failed).collect()
    }

    /// Addresses and known peers of the members that are not connected.
    pub(super) fn absent(&self, is_connected: impl Fn(&PeerId) -> bool) -> Vec<(Multiaddr, Option<PeerId>)> {
        let absent = self.members.iter().filter(|member| !member.peer.as_ref().is_some_and(&is_connected));
        absent.map(|member| (member.address.clone(), split(&member.address).1)).collect()
    }
}

#[cfg(test)]
mod tests {
    use libp2p::multiaddr::Protocol;

    use super::*;

    #[test]
    fn a_member_met_at_an_address_without_peer_id_counts_as_connected() {
        let (own, peer) = (PeerId::random(), PeerId::random());
        let address: Multiaddr = "/ip4/192.0.2.7/udp/4001/quic-v1".parse().unwrap();
        let mut bootstrap = Bootstrap::new(own, std::slice::from_ref(&address), &[]);
        assert_eq!(bootstrap.absent(|_| true), [(address.clone(), None)]);
        bootstrap.met(&address.clone().with(Protocol::P2p(peer)), peer);
        assert_eq!(bootstrap.absent(|connected| *connected == peer), []);
        assert_eq!(bootstrap.absent(|_| false), [(address, None)]);
    }

    #[test]
    fn a_member_of_a_given_peer_id_is_no_other_peer_and_not_this_one() {
        let (own, peer) = (PeerId::random(), PeerId::random());
        let found = PeerId::random();
        let plain: Multiaddr = "/ip4/192.0.2.7/udp/4001/quic-v1".parse().unwrap();
        let (mine, other) = (plain.clone().with(Protocol::P2p(own)), plain.clone().with(Protocol::P2p(peer)));
        let mut bootstrap = Bootstrap::new(own, &[mine, other.clone()], &[]);
        bootstrap.met(&plain, PeerId::random());
        assert_eq!(bootstrap.absent(|connected| *connected != peer), [(other.clone(), Some(peer))]);
        assert_eq!(bootstrap.expected(&plain), Some(peer));
        let failure = BootstrapFailure::WrongPeer { expected: peer, found };
        assert_eq!(bootstrap.failed(&plain, &failure), Some(other.clone()));
        assert_eq!(bootstrap.failed(&plain, &failure), None, "told once");
        assert_eq!(bootstrap.failures(), [(other, failure)]);
        bootstrap.joined(&peer);
        assert_eq!(bootstrap.failures(), []);
    }

    #[test]
    fn a_host_name_that_leads_elsewhere_replaces_what_it_led_to_and_nothing_else() {
        let address = |ip: &str| -> Multiaddr { format!("/ip4/{ip}/udp/4001/quic-v1").parse().unwrap() };
        let (given, before, after) = (address("192.0.2.1"), address("192.0.2.2"), address("192.0.2.3"));
        let mut bootstrap = Bootstrap::new(PeerId::random(), std::slice::from_ref(&given), &[before]);
        bootstrap.rename(std::slice::from_ref(&after));
        assert_eq!(bootstrap.absent(|_| false), [(given, None), (after, None)]);
    }
}
