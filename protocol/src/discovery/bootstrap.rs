//! The members to join through, and who was met there.

use libp2p::{Multiaddr, PeerId};

use super::address::split;

/// Bootstrap addresses, with the peer that answers at each as far as that is known.
#[derive(Debug)]
pub(super) struct Bootstrap {
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    /// As given, with or without `/p2p/<peer id>`.
    address: Multiaddr,
    /// The peer that was asked for or, where none was, the one that was met last.
    peer: Option<PeerId>,
}

impl Bootstrap {
    /// Leaves out addresses of `own`.
    pub(super) fn new(own: PeerId, addresses: &[Multiaddr]) -> Self {
        let members = addresses.iter().map(|address| Member { address: address.clone(), peer: split(address).1 });
        Self { members: members.filter(|member| member.peer != Some(own)).collect() }
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
        let mut bootstrap = Bootstrap::new(own, std::slice::from_ref(&address));
        assert_eq!(bootstrap.absent(|_| true), [(address.clone(), None)]);
        bootstrap.met(&address.clone().with(Protocol::P2p(peer)), peer);
        assert_eq!(bootstrap.absent(|connected| *connected == peer), []);
        assert_eq!(bootstrap.absent(|_| false), [(address, None)]);
    }

    #[test]
    fn a_member_of_a_given_peer_id_is_no_other_peer_and_not_this_one() {
        let (own, peer) = (PeerId::random(), PeerId::random());
        let plain: Multiaddr = "/ip4/192.0.2.7/udp/4001/quic-v1".parse().unwrap();
        let (mine, other) = (plain.clone().with(Protocol::P2p(own)), plain.clone().with(Protocol::P2p(peer)));
        let mut bootstrap = Bootstrap::new(own, &[mine, other.clone()]);
        bootstrap.met(&plain, PeerId::random());
        assert_eq!(bootstrap.absent(|connected| *connected != peer), [(other, Some(peer))]);
    }
}
