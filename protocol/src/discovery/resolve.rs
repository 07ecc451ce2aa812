//! Host names in bootstrap addresses, resolved by the operating system (so that `/etc/hosts` and container names work).

use std::net::IpAddr;

use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;

use super::DiscoveryError;

/// Replaces a leading `/dns`, `/dns4` or `/dns6` of each address by the IP addresses it resolves to.
///
/// # Errors
/// [`DiscoveryError::Resolve`] when no address at all is left; names that fail beside others that resolve are passed over,
/// because one bootstrap member that is gone must not keep anyone out.
pub(crate) async fn resolve_all(addresses: &[Multiaddr]) -> Result<Vec<Multiaddr>, DiscoveryError> {
    let mut resolved = Vec::new();
    let mut failure = None;
    for address in addresses {
        match resolve(address).await {
            Ok(found) => resolved.extend(found),
            Err(reason) => {
                tracing::warn!(%address, %reason, "bootstrap address does not resolve");
                failure = Some(DiscoveryError::Resolve { address: address.clone(), reason });
            }
        }
    }
    match failure {
        Some(error) if resolved.is_empty() => Err(error),
        _ => Ok(resolved),
    }
}

/// Whether an address begins with a host name.
pub(crate) fn is_named(address: &Multiaddr) -> bool {
    matches!(address.iter().next(), Some(Protocol::Dns(_) | Protocol::Dns4(_) | Protocol::Dns6(_)))
}

async fn resolve(address: &Multiaddr) -> Result<Vec<Multiaddr>, String> {
    let (host, wanted): (String, fn(&IpAddr) -> bool) = match address.iter().next() {
        Some(Protocol::Dns(host)) => (host.into_owned(), |_| true),
        Some(Protocol::Dns4(host)) => (host.into_owned(), IpAddr::is_ipv4),
        Some(Protocol::Dns6(host)) => (host.into_owned(), IpAddr::is_ipv6),
        _ => return Ok(vec![address.clone()]),
    };
    let found: Vec<Multiaddr> = tokio::net::lookup_host((host.as_str(), 0))
        .await
        .map_err(|e| e.to_string())?
        .map(|socket| socket.ip())
        .filter(wanted)
        .map(|ip| std::iter::once(Protocol::from(ip)).chain(address.iter().skip(1)).collect())
        .collect();
    if found.is_empty() { Err("the name has no address of that kind".into()) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_host_name_becomes_an_ip_address_and_the_rest_stays() {
        let address: Multiaddr = "/dns4/localhost/udp/4001/quic-v1".parse().unwrap();
        assert_eq!(resolve_all(&[address]).await.unwrap(), ["/ip4/127.0.0.1/udp/4001/quic-v1".parse().unwrap()]);
    }
}
