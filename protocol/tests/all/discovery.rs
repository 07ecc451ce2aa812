//! The control plane on loopback: members that come, are found, and come back.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use hanse_protocol::discovery::keys::{DEFAULT_NETWORK, ProviderKey};
use hanse_protocol::discovery::{Discovery, DiscoveryConfig, DiscoveryError};
use hanse_protocol::multiaddr::Protocol;
use hanse_protocol::{Identity, Multiaddr, PeerId};

const PATIENCE: Duration = Duration::from_secs(30);

async fn start(identity: &Identity, listen: &[&str], bootstrap: &[Multiaddr]) -> Result<Discovery, DiscoveryError> {
    let config = DiscoveryConfig {
        network: DEFAULT_NETWORK.to_owned(),
        listen: listen.iter().map(|address| address.parse().expect("a multiaddr")).collect(),
        bootstrap: bootstrap.to_vec(),
        ..DiscoveryConfig::default()
    };
    Discovery::start(identity, config).await
}

async fn member(identity: &Identity, listen: &[&str], bootstrap: &[Multiaddr]) -> Discovery {
    start(identity, listen, bootstrap).await.expect("a free port on loopback")
}

/// A member that can be found under the key of volunteers.
async fn volunteer(identity: &Identity, bootstrap: &[Multiaddr]) -> Discovery {
    let discovery = member(identity, &[ANY_PORT], bootstrap).await;
    announce(&discovery).await;
    discovery
}

async fn announce(discovery: &Discovery) {
    discovery.announce(Vec::new(), vec![ProviderKey::volunteers()]).await.expect("it runs");
}

/// The peers found by one look-up.
async fn found(discovery: &Discovery) -> HashSet<PeerId> {
    let mut providers = discovery.providers(ProviderKey::volunteers()).await.expect("it runs");
    let mut found = HashSet::new();
    while let Some(peer) = providers.recv().await {
        found.insert(peer);
    }
    found
}

/// Looks up until all of `wanted` are found.
async fn wait_for(discovery: &Discovery, wanted: &[PeerId]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = found(discovery).await;
        if wanted.iter().all(|peer| found.contains(peer)) {
            return;
        }
        assert!(Instant::now() < deadline, "found only {found:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

const ANY_PORT: &str = "/ip4/127.0.0.1/udp/0/quic-v1";

/// The address that it listens on, without `/p2p/<peer id>`.
fn plain_address(discovery: &Discovery) -> Multiaddr {
    let mut address = discovery.addresses().remove(0);
    assert!(matches!(address.pop(), Some(Protocol::P2p(_))));
    address
}

#[tokio::test]
async fn an_address_in_use_is_refused_with_that_reason() {
    let first = member(&Identity::generate(), &[ANY_PORT], &[]).await;
    let address = plain_address(&first);
    let error = start(&Identity::generate(), &[&address.to_string()], &[]).await.expect_err("it is in use").to_string();
    assert!(error.starts_with(&format!("cannot listen on {address}: Address already in use")), "{error}");
}

#[tokio::test]
async fn the_first_lookup_finds_providers_through_an_address_without_peer_id() {
    let first = volunteer(&Identity::generate(), &[]).await;
    let address = plain_address(&first);
    let second = volunteer(&Identity::generate(), std::slice::from_ref(&address)).await;
    wait_for(&first, &[second.peer_id()]).await;
    for _ in 0..5 {
        let client = member(&Identity::generate(), &[], std::slice::from_ref(&address)).await;
        client.wait_connected(PATIENCE).await.expect("the first member answers");
        assert_eq!(found(&client).await, HashSet::from([first.peer_id(), second.peer_id()]));
        client.shutdown().await;
    }
}

#[tokio::test]
async fn a_bootstrap_member_that_was_started_again_leads_newcomers_to_the_others() {
    let identity = Identity::generate();
    let first = volunteer(&identity, &[]).await;
    let address = plain_address(&first);
    let others = [
        volunteer(&Identity::generate(), std::slice::from_ref(&address)).await,
        volunteer(&Identity::generate(), std::slice::from_ref(&address)).await,
    ];
    let ids = others.each_ref().map(Discovery::peer_id);
    wait_for(&first, &ids).await;
    // They are connected with each other, so that losing the first member does not leave them alone.
    assert_eq!(others[0].adverts(ids[1], None).await.expect("it answers").len(), 0);

    // What they publish on meeting each other must be over: it would lead them back by chance.
    tokio::time::sleep(Duration::from_secs(1)).await;

    first.shutdown().await;
    let deadline = Instant::now() + PATIENCE;
    let again = loop {
        // The system may take a moment to give the port back.
        match start(&identity, &[&address.to_string()], &[]).await {
            Ok(again) => break again,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    announce(&again).await;
    let client = member(&Identity::generate(), &[], &[address]).await;
    client.wait_connected(PATIENCE).await.expect("the first member is back");
    wait_for(&client, &ids).await;
    wait_for(&again, &ids).await;
}
