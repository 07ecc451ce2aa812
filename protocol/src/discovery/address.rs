//! What an address says about where it can be dialled from.

use std::net::{IpAddr, Ipv4Addr};

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};

/// Splits `/p2p/<peer id>` off the end.
pub(super) fn split(address: &Multiaddr) -> (Multiaddr, Option<PeerId>) {
    let mut rest = address.clone();
    match rest.pop() {
        Some(Protocol::P2p(peer)) => (rest, Some(peer)),
        _ => (address.clone(), None),
    }
}

/// The IP address at the beginning: where packets go first, for a circuit the relay's.
pub(super) fn ip(address: &Multiaddr) -> Option<IpAddr> {
    match address.iter().next() {
        Some(Protocol::Ip4(ip)) => Some(ip.into()),
        Some(Protocol::Ip6(ip)) => Some(ip.into()),
        _ => None,
    }
}

/// Whether an address is one of the open internet: neither of this machine, nor of a private or shared range, nor local to a link.
pub(super) fn is_public(address: &Multiaddr) -> bool {
    ip(address).is_some_and(is_public_ip)
}

/// Whether an address is one of the open internet, as [`is_public`].
pub(super) fn is_public_ip(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let carrier_grade_nat = Ipv4Addr::new(100, 64, 0, 0).to_bits() >> 22 == ip.to_bits() >> 22;
            !(ip.is_private()
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_unspecified()
                || ip.is_multicast()
                || ip.is_broadcast()
                || carrier_grade_nat)
        }
        IpAddr::V6(ip) => {
            !(ip.is_loopback()
                || ip.is_unspecified()
                || ip.is_multicast()
                || ip.is_unique_local()
                || ip.is_unicast_link_local())
        }
    }
}

pub(super) fn is_quic(address: &Multiaddr) -> bool {
    address.iter().any(|part| part == Protocol::QuicV1)
}

pub(super) fn is_loopback(address: &Multiaddr) -> bool {
    ip(address).is_some_and(|ip| ip.is_loopback())
}

/// Whether an address stands for all interfaces.
pub(super) fn is_unspecified(address: &Multiaddr) -> bool {
    ip(address).is_some_and(|ip| ip.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_the_open_internet_are_public() {
        let public = |ip: &str| is_public(&format!("{ip}/udp/4001/quic-v1").parse().unwrap());
        for ip in ["/ip4/203.0.113.7", "/ip4/100.128.0.1", "/ip4/172.32.0.1", "/ip6/2001:db8::7"] {
            assert!(public(ip), "{ip}");
        }
        for ip in [
            "/ip4/127.0.0.1",
            "/ip4/10.1.2.3",
            "/ip4/192.168.1.2",
            "/ip4/172.16.0.1",
            "/ip4/169.254.0.1",
            "/ip4/100.64.0.1",
            "/ip4/0.0.0.0",
            "/ip6/::1",
            "/ip6/fe80::1",
            "/ip6/fd00::1",
            "/dns4/example.org",
        ] {
            assert!(!public(ip), "{ip}");
        }
    }
}
