//! Networks that cannot serve a client, each with its own error.

use std::time::Duration;

use hanse_protocol::multiaddr::Protocol;
use hanse_protocol::{
    ConnectError, DataConnection, ExpertCall, Frame, Hello, Identity, ModelId, Multiaddr, Refusal, RefusalCode,
};
use hanse_router::network::bind_any;
use hanse_router::{Client, ClientError, JoinError, NetworkConfig};
use hanse_tests::fake::{FakePeer, Manner};
use hanse_tests::net::{Net, changed_copy, greedy, halves, model_config, model_id, runtime, tokens};
use hanse_tests::reference::tiny_moe;
use hanse_tests::stranger::call;

const SOON: Duration = Duration::from_secs(5);

async fn join_error(net: &Net, config: NetworkConfig) -> JoinError {
    let joined = Client::connect(&model_config(&net.dir), net.model, &Identity::generate(), config).await;
    match joined {
        Err(ClientError::Join(error)) => error,
        other => panic!("no join error: {other:?}"),
    }
}

#[test]
fn without_a_reachable_member_the_error_says_so() {
    runtime().block_on(async {
        let net = Net::start(&tiny_moe(), &["all"]).await;
        let config = |bootstrap| NetworkConfig { bootstrap, join_timeout: Duration::from_secs(1), ..net.config() };
        let error = join_error(&net, config(Vec::new())).await;
        assert!(matches!(error, JoinError::NoBootstrap), "{error}");

        let closed = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address: Multiaddr = format!("/ip4/127.0.0.1/udp/{closed}/quic-v1").parse().unwrap();
        let error = join_error(&net, config(vec![address])).await;
        assert!(matches!(error, JoinError::Unreachable { .. }), "{error}");
        assert!(error.to_string().starts_with("no peer reachable"), "{error}");
    });
}

#[test]
fn a_bootstrap_address_with_another_identity_is_not_joined_through() {
    runtime().block_on(async {
        let net = Net::start(&tiny_moe(), &["all"]).await;
        let mut address = net.bootstrap();
        assert!(matches!(address.pop(), Some(Protocol::P2p(_))));
        let (expected, found) = (Identity::generate().peer_id(), net.bootstrap());
        address.push(Protocol::P2p(expected));
        let Some(Protocol::P2p(found)) = found.iter().last() else { panic!("{found} names a peer") };
        let config = NetworkConfig { bootstrap: vec![address], join_timeout: Duration::from_secs(1), ..net.config() };
        let error = join_error(&net, config).await;
        assert!(matches!(error, JoinError::Unreachable { .. }), "{error}");
        assert!(error.to_string().contains(&format!("{found} is there, not {expected}")), "{error}");
    });
}

#[test]
fn experts_that_nobody_hosts_are_named() {
    runtime().block_on(async {
        let net = Net::start(&tiny_moe(), &["0-1,2:0-13,3-5", "0-1,3-5"]).await;
        let config = NetworkConfig { join_timeout: Duration::from_secs(2), ..net.config() };
        let error = join_error(&net, config).await;
        let JoinError::Incomplete { missing, .. } = &error else { panic!("{error}") };
        assert_eq!(missing.0, [(2, vec![14, 15])].into());
        assert_eq!(error.to_string(), "no peer hosts these experts: layer 2: 14-15");
    });
}

#[test]
fn peers_with_other_weights_are_not_used_and_named() {
    runtime().block_on(async {
        let changed = changed_copy(&tiny_moe());
        let net = Net::start(changed.path(), &["all"]).await;
        let ours = model_id(&tiny_moe());
        let joined = Client::connect(&model_config(&tiny_moe()), ours, &Identity::generate(), net.config()).await;
        let Err(ClientError::Join(error)) = joined else { panic!("joined a network of another model") };
        let JoinError::OtherModels { ours: named, others } = &error else { panic!("{error}") };
        assert_eq!((*named, others.as_slice()), (ours, [net.model].as_slice()));
        let text = error.to_string();
        assert!(text.contains(&ours.to_string()) && text.contains(&net.model.to_string()), "{text}");
    });
}

async fn dial(net: &Net) -> DataConnection {
    let volunteer = &net.volunteers[0];
    let endpoint = bind_any(&Identity::generate()).unwrap();
    endpoint.connect(volunteer.peer_id(), volunteer.data_addresses()[0], SOON).await.unwrap()
}

async fn refusal(connection: &DataConnection, frame: Frame) -> Refusal {
    match connection.call(&frame, SOON).await.unwrap() {
        Frame::Refusal(refusal) => refusal,
        other => panic!("no refusal: {other:?}"),
    }
}

#[test]
fn another_model_or_network_is_refused_on_the_data_plane() {
    runtime().block_on(async {
        let net = Net::start(&tiny_moe(), &["0:0"]).await;
        let connection = dial(&net).await;
        let network = net.config().network;
        let other = ModelId([7; 32]);
        let refused = refusal(&connection, Frame::Hello(Hello { network: network.clone(), model: other })).await;
        assert_eq!(refused.code, RefusalCode::ModelMismatch);
        assert!(refused.message.contains(&net.model.to_string()), "{}", refused.message);
        let elsewhere = Hello { network: "elsewhere".to_owned(), model: net.model };
        assert_eq!(refusal(&connection, Frame::Hello(elsewhere)).await.code, RefusalCode::NetworkMismatch);

        let good = call(&net, 0, 0);
        let refused = refusal(&connection, Frame::Call(ExpertCall { model: other, ..good.clone() })).await;
        assert_eq!(refused.code, RefusalCode::ModelMismatch);
        let refused = refusal(&connection, Frame::Call(call(&net, 3, 5))).await;
        assert_eq!(refused.code, RefusalCode::NotHosted);
        assert!(refused.message.contains("expert 5 of layer 3"), "{}", refused.message);
        let late = ExpertCall { deadline_ms: 0, ..good.clone() };
        assert_eq!(refusal(&connection, Frame::Call(late)).await.code, RefusalCode::DeadlinePassed);
        let narrow = ExpertCall { hidden_size: 8, body: vec![0; 32].into(), ..good.clone() };
        assert_eq!(refusal(&connection, Frame::Call(narrow)).await.code, RefusalCode::Malformed);
        assert_eq!(net.volunteers[0].counts().calls, 0);

        // After all that the same connection is served.
        assert!(matches!(connection.call(&Frame::Call(good), SOON).await, Ok(Frame::Answer(_))));
        assert_eq!(net.volunteers[0].counts().calls, 1);
    });
}

#[test]
fn a_volunteer_is_not_taken_for_somebody_else() {
    runtime().block_on(async {
        let net = Net::halves(&tiny_moe()).await;
        let volunteer = &net.volunteers[0];
        let endpoint = bind_any(&Identity::generate()).unwrap();
        let stranger = Identity::generate().peer_id();
        let error = endpoint.connect(stranger, volunteer.data_addresses()[0], SOON).await.unwrap_err();
        let ConnectError::WrongPeer { expected, found, .. } = error else { panic!("{error}") };
        assert_eq!((expected, found), (stranger, volunteer.peer_id()));

        // Nor when an advert says that somebody else's data plane is its own: the network is used without that peer.
        let fake = FakePeer::join(&net, Manner::PointsTo(volunteer.data_addresses()[0])).await;
        let client = net.client().await;
        let local = Client::local(&model_config(&tiny_moe())).unwrap();
        let found = tokens(&client, greedy(&[1, 2, 3], 40)).await.unwrap().0;
        assert_eq!(found, tokens(&local, greedy(&[1, 2, 3], 40)).await.unwrap().0);
        assert!(client.peers().iter().all(|peer| peer.peer != fake.peer_id || peer.address.is_none()));
    });
}

#[test]
fn a_network_of_another_name_is_not_joined() {
    runtime().block_on(async {
        let [even, _] = halves(&tiny_moe());
        let net = Net::start(&tiny_moe(), &[&even]).await;
        let config =
            NetworkConfig { network: "elsewhere".to_owned(), join_timeout: Duration::from_secs(2), ..net.config() };
        let error = join_error(&net, config).await;
        assert!(matches!(error, JoinError::Unreachable { .. }), "{error}");
    });
}
