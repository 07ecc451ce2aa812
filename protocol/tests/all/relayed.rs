//! Frames over the control plane: through a relay, and over a direct connection.

use std::time::{Duration, Instant};

use hanse_protocol::discovery::{Discovery, DiscoveryConfig, ReachConfig, ReachPolicy, Reachability, RelayLimits};
use hanse_protocol::{
    CallError, Combine, DataConnection, ExpertCall, ExpertRows, Frame, FrameLimits, Hello, Identity, ModelId,
    Multiaddr, Path, Refusal, RefusalCode, Welcome, WireDtype,
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

/// Welcomes everybody, but is always busy, and refuses calls of network "wrong" and ends the stream.
async fn welcome(discovery: Discovery) {
    while let Some(connection) = discovery.accept_data().await {
        tokio::spawn(async move {
            while let Some(mut stream) = connection.accept_stream().await {
                tokio::spawn(async move {
                    while let Ok(request) = stream.read(&FrameLimits::default()).await {
                        let Frame::Hello(hello) = request else {
                            let busy = Frame::Refusal(Refusal::new(1, RefusalCode::Busy, "it computes nothing"));
                            stream.write(&busy).await.expect("the client waits");
                            continue;
                        };
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
    behind(relay_identity, relay, punch).await
}

/// A relay with limits, and two that use it.
async fn relayed_within(limits: RelayLimits) -> Relayed {
    let relay_identity = Identity::generate();
    let config = DiscoveryConfig {
        listen: vec!["/ip4/127.0.0.1/udp/0/quic-v1".parse().expect("a multiaddr")],
        reach: ReachConfig { policy: ReachPolicy::Reachable, relay_limits: limits, ..ReachConfig::default() },
        ..DiscoveryConfig::default()
    };
    let relay = Discovery::start(&relay_identity, config).await.expect("a free port");
    behind(relay_identity, relay, false).await
}

async fn behind(relay_identity: Identity, relay: Discovery, punch: bool) -> Relayed {
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

/// Calls again and again, with `body_bytes` each time, for so long: none may fail.
async fn calls_go_on(connection: &DataConnection, body_bytes: usize, time: Duration) {
    let width = u32::try_from(body_bytes / 4).expect("a small body");
    let call = Frame::Call(ExpertCall {
        request_id: 1,
        model: ModelId([7; 32]),
        layer: 0,
        hidden_size: width,
        rows: 1,
        dtype: WireDtype::F32,
        combine: Combine::Peer,
        deadline_ms: 20_000,
        assignments: vec![ExpertRows { expert: 0, rows: vec![0], weights: vec![1.0] }],
        body: vec![0; body_bytes].into(),
    });
    let end = Instant::now() + time;
    while Instant::now() < end {
        let answer = connection.call(&call, PATIENCE).await.expect("an answer");
        assert!(matches!(answer, Frame::Refusal(_)), "{answer:?}");
        assert!(connection.path().is_relayed() && !connection.is_closed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn calls_outlive_the_time_that_a_relay_allows_for_one_circuit() {
    let net = relayed_within(RelayLimits { circuit_time: Duration::from_secs(6), ..RelayLimits::default() }).await;
    calls_go_on(&net.connect().await, 1024, Duration::from_secs(15)).await;
}

#[tokio::test]
async fn calls_outlive_the_bytes_that_a_relay_allows_for_one_circuit() {
    // At most 50 calls in a second: half of it lasts for five seconds.
    let net = relayed_within(RelayLimits { circuit_bytes: 8 << 20, ..RelayLimits::default() }).await;
    calls_go_on(&net.connect().await, 16 << 10, Duration::from_secs(22)).await;
}

#[tokio::test]
async fn a_relay_stands_in_for_its_own_network_only_and_for_no_more_than_its_limits_allow() {
    let relay_identity = Identity::generate();
    let config = |network: &str, bootstrap: Vec<Multiaddr>, policy| DiscoveryConfig {
        network: network.to_owned(),
        listen: vec!["/ip4/127.0.0.1/udp/0/quic-v1".parse().expect("a multiaddr")],
        bootstrap,
        reach: ReachConfig {
            policy,
            relay_limits: RelayLimits { reservations: 2, ..RelayLimits::default() },
            ..ReachConfig::default()
        },
        ..DiscoveryConfig::default()
    };
    let start = async |config| Discovery::start(&Identity::generate(), config).await.expect("a free port");
    let relay = Discovery::start(&relay_identity, config("main", Vec::new(), ReachPolicy::Reachable)).await;
    let relay = relay.expect("a free port");
    let stranger = start(config("other", relay.addresses(), ReachPolicy::Unreachable)).await;
    let mut served = Vec::new();
    for _ in 0..2 {
        let member = start(config("main", relay.addresses(), ReachPolicy::Unreachable)).await;
        becomes(&member, Reachability::Relayed).await;
        served.push(member);
    }
    let third = start(config("main", relay.addresses(), ReachPolicy::Unreachable)).await;
    third.wait_connected(PATIENCE).await.expect("it is a member all the same");
    let refused = async {
        let mut reach = third.reach();
        let relayed = reach.wait_for(|reach| reach.reachability == Reachability::Relayed);
        tokio::time::timeout(Duration::from_secs(2), relayed).await.is_err()
    };
    assert!(refused.await, "there are only two places");
    assert_eq!(stranger.reach().borrow().reachability, Reachability::Unreachable, "it was there first");
}
