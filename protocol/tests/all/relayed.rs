//! Frames over the control plane: through a relay, and over a direct connection.

use std::time::{Duration, Instant};

use hanse_protocol::discovery::{Discovery, DiscoveryConfig, ReachConfig, ReachPolicy, Reachability};
use hanse_protocol::{
    CallError, DataConnection, Frame, FrameLimits, Hello, Identity, ModelId, Multiaddr, Path, Refusal, RefusalCode,
    Welcome, WireDtype,
};

const PATIENCE: Duration = Duration::from_secs(30);

async fn member(identity: &Identity, bootstrap: &[Multiaddr], policy: ReachPolicy, punch: bool) -> Discovery {
    member_at("/ip4/127.0.0.1/udp/0/quic-v1".parse().expect("a multiaddr"), identity, bootstrap, policy, punch).await
}

async fn member_at(
    address: Multiaddr,
    identity: &Identity,
    bootstrap: &[Multiaddr],
    policy: ReachPolicy,
    punch: bool,
) -> Discovery {
    let config = DiscoveryConfig {
        listen: vec![address],
        bootstrap: bootstrap.to_vec(),
        reach: ReachConfig { policy, punch, ..ReachConfig::default() },
        ..DiscoveryConfig::default()
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Discovery::start(identity, config.clone()).await {
            Ok(member) => return member,
            // The socket of one that was shut down lives until its last packet is sent.
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn client(bootstrap: &[Multiaddr], punch: bool) -> Discovery {
    let config = DiscoveryConfig {
        bootstrap: bootstrap.to_vec(),
        reach: ReachConfig { punch, ..ReachConfig::default() },
        ..DiscoveryConfig::default()
    };
    let client = Discovery::start(&Identity::generate(), config).await.expect("nothing to bind");
    client.wait_connected(PATIENCE).await.expect("the relay runs");
    client
}

fn hello() -> Frame {
    Frame::Hello(Hello { network: "main".into(), model: ModelId([7; 32]) })
}

/// Welcomes everybody, but refuses calls of network "wrong" and ends the stream.
async fn welcome(discovery: Discovery) {
    while let Some(connection) = discovery.accept_data().await {
        tokio::spawn(async move {
            while let Some(mut stream) = connection.accept_stream().await {
                tokio::spawn(async move {
                    while let Ok(Frame::Hello(hello)) = stream.read(&FrameLimits::default()).await {
                        let answer = match hello.network.as_str() {
                            "wrong" => Frame::Refusal(Refusal::new(0, RefusalCode::Malformed, "no such network")),
                            "silence" => {
                                stream.cancelled().await;
                                return;
                            }
                            _ => {
                                let (model, dtypes) = (hello.model, WireDtype::ALL.to_vec());
                                Frame::Welcome(Welcome { model, dtypes, max_rows: 1 })
                            }
                        };
                        stream.write(&answer).await.expect("the client waits");
                    }
                });
            }
        });
    }
}

/// A relay, a member behind it that welcomes, and a client that knows both.
struct Relayed {
    relay_identity: Identity,
    relay: Discovery,
    hidden: Discovery,
    client: Discovery,
}

async fn becomes(member: &Discovery, wanted: Reachability) {
    let mut reach = member.reach();
    let reached = reach.wait_for(|reach| reach.reachability == wanted);
    tokio::time::timeout(PATIENCE, reached).await.expect("in time").expect("it runs");
}

async fn relayed(punch: bool) -> Relayed {
    let relay_identity = Identity::generate();
    let relay = member(&relay_identity, &[], ReachPolicy::Reachable, punch).await;
    let hidden = member(&Identity::generate(), &relay.addresses(), ReachPolicy::Unreachable, punch).await;
    tokio::spawn(welcome(hidden.clone()));
    becomes(&hidden, Reachability::Relayed).await;
    let client = client(&relay.addresses(), punch).await;
    Relayed { relay_identity, relay, hidden, client }
}

impl Relayed {
    async fn connect(&self) -> DataConnection {
        let circuits = self.hidden.reach().borrow().circuits.clone();
        self.client.connect_data(self.hidden.peer_id(), circuits, PATIENCE).await.expect("a circuit")
    }
}

async fn is_welcomed(connection: &DataConnection) {
    let answer = connection.call(&hello(), PATIENCE).await.expect("an answer");
    assert!(matches!(answer, Frame::Welcome(_)), "{answer:?}");
}

#[tokio::test]
async fn frames_pass_through_a_relay() {
    let net = relayed(false).await;
    let connection = net.connect().await;
    assert!(connection.path().is_relayed(), "{}", connection.path());
    assert_eq!(connection.peer_id(), net.hidden.peer_id());
    for _ in 0..3 {
        is_welcomed(&connection).await;
    }
    let wrong = Frame::Hello(Hello { network: "wrong".into(), model: ModelId([7; 32]) });
    let answer = connection.call(&wrong, PATIENCE).await.expect("a refusal is an answer");
    assert!(matches!(answer, Frame::Refusal(_)), "{answer:?}");
    is_welcomed(&connection).await;
}

#[tokio::test]
async fn a_relay_that_vanishes_closes_the_connections_through_it_and_is_used_again_when_it_returns() {
    let net = relayed(false).await;
    let connection = net.connect().await;
    is_welcomed(&connection).await;
    net.relay.shutdown().await;
    tokio::time::timeout(PATIENCE, connection.closed()).await.expect("it is noticed");
    assert!(matches!(connection.call(&hello(), PATIENCE).await, Err(CallError::ConnectionLost(_))));
    becomes(&net.hidden, Reachability::Unreachable).await;
    let mut address = net.relay.addresses().remove(0);
    address.pop();
    let _relay = member_at(address, &net.relay_identity, &[], ReachPolicy::Reachable, false).await;
    becomes(&net.hidden, Reachability::Relayed).await;
    is_welcomed(&net.connect().await).await;
}

#[tokio::test]
async fn a_call_given_up_over_libp2p_is_noticed_by_the_server_and_disturbs_no_other() {
    let net = relayed(false).await;
    let connection = net.connect().await;
    let silence = Frame::Hello(Hello { network: "silence".into(), model: ModelId([7; 32]) });
    let late = connection.call(&silence, Duration::from_millis(100)).await;
    assert!(matches!(late, Err(CallError::Late(_))), "{late:?}");
    is_welcomed(&connection).await;
    connection.close("enough");
    assert!(connection.is_closed());
    assert!(connection.call(&hello(), PATIENCE).await.is_err());
    // The control plane's connection lives on, and carries the next one.
    is_welcomed(&net.connect().await).await;
}

#[tokio::test]
async fn a_relayed_connection_is_followed_by_a_punched_one() {
    let net = relayed(true).await;
    is_welcomed(&net.connect().await).await;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let connection = net.connect().await;
        if let Path::Control(_) = connection.path() {
            is_welcomed(&connection).await;
            return;
        }
        assert!(Instant::now() < deadline, "still relayed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_peer_that_nobody_knows_cannot_be_connected_to() {
    let relay = member(&Identity::generate(), &[], ReachPolicy::Reachable, false).await;
    let client = client(&relay.addresses(), false).await;
    let nobody = Identity::generate().peer_id();
    let error = client.connect_data(nobody, Vec::new(), PATIENCE).await.expect_err("nobody is there");
    assert!(error.to_string().contains(&nobody.to_string()), "{error}");
}
