//! The data plane over loopback.

mod refusals;
mod strangers;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use hanse_protocol::{
    ALPN, CallError, Combine, ConnectError, DataConnection, DataEndpoint, EstablishError, ExpertAnswer, ExpertCall,
    Frame, FrameError, FrameLimits, FrameStream, Hello, Identity, Path, PeerId, Refusal, RefusalCode, Welcome,
    WireDtype, read_frame,
};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use tokio::sync::mpsc;

use crate::golden::{call, model};

/// Long enough for a busy machine; no test waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(20);
/// A deadline that is meant to pass, but not before a busy machine has carried a frame over loopback.
const SOON: Duration = Duration::from_millis(300);

struct Pair {
    client: DataConnection,
    server: DataConnection,
    client_id: PeerId,
    server_id: PeerId,
    // Kept, since a dropped endpoint stops its connections.
    endpoints: (DataEndpoint, DataEndpoint),
}

async fn pair_at(address: &str) -> Pair {
    let (client_identity, server_identity) = (Identity::generate(), Identity::generate());
    let address: SocketAddr = address.parse().expect("an address");
    let near = DataEndpoint::bind(&client_identity, address).expect("a free port");
    let far = DataEndpoint::bind(&server_identity, address).expect("a free port");
    let far_address = far.local_addr().expect("it is bound");
    let accept = async { far.accept().await.expect("open").establish(PATIENCE).await.expect("a handshake") };
    let (client, server) = tokio::join!(near.connect(server_identity.peer_id(), far_address, PATIENCE), accept);
    Pair {
        client: client.expect("a handshake"),
        server,
        client_id: client_identity.peer_id(),
        server_id: server_identity.peer_id(),
        endpoints: (near, far),
    }
}

async fn pair() -> Pair {
    pair_at("127.0.0.1:0").await
}

/// Answers every call on every stream with its own body, and what cannot be read with a refusal.
async fn echo(connection: DataConnection) {
    while let Some(stream) = connection.accept_stream().await {
        tokio::spawn(echo_stream(stream));
    }
}

async fn echo_stream(mut stream: FrameStream) {
    loop {
        let answer = match stream.read(&FrameLimits::default()).await {
            Ok(Frame::Call(call)) => answer_to(call),
            Ok(Frame::Hello(hello)) => {
                Frame::Welcome(Welcome { model: hello.model, dtypes: vec![WireDtype::F16], max_rows: 8 })
            }
            Ok(_) => return,
            Err(error) => match error.refusal() {
                Some(refusal) => Frame::Refusal(refusal),
                None => return,
            },
        };
        if stream.write(&answer).await.is_err() {
            return;
        }
    }
}

fn answer_to(call: ExpertCall) -> Frame {
    Frame::Answer(ExpertAnswer {
        request_id: call.request_id,
        dtype: call.dtype,
        rows: call.rows,
        hidden_size: call.hidden_size,
        queue_us: 0,
        compute_us: 0,
        queued_rows: 0,
        body: call.body,
    })
}

fn numbered(request_id: u64) -> Frame {
    let body = vec![request_id as u8 & 0x3f; 8].into();
    Frame::Call(ExpertCall { request_id, body, ..call() })
}

fn assert_answers(answer: Frame, request_id: u64) {
    match answer {
        Frame::Answer(answer) => {
            assert_eq!(answer.request_id, request_id);
            assert_eq!(answer.body, vec![request_id as u8 & 0x3f; 8]);
        }
        other => panic!("no answer: {other:?}"),
    }
}

#[tokio::test]
async fn both_sides_learn_who_the_other_is() {
    let pair = pair().await;
    assert_eq!(pair.client.peer_id(), pair.server_id);
    assert_eq!(pair.server.peer_id(), pair.client_id);
    assert!(!pair.client.is_closed() && pair.client.round_trip() > Duration::ZERO);
}

#[tokio::test]
async fn hello_is_answered_over_ipv4_and_ipv6() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let pair = pair_at(address).await;
        tokio::spawn(echo(pair.server.clone()));
        let hello = Frame::Hello(Hello { network: "hanse".into(), model: model() });
        let answer = pair.client.call(&hello, PATIENCE).await.expect("an answer");
        assert!(matches!(answer, Frame::Welcome(welcome) if welcome.model == model()));
    }
}

#[tokio::test]
async fn a_path_over_ipv4_reads_as_the_address_that_was_dialled_whatever_the_socket() {
    // Both versions of IP, as a client binds it, where the system has both.
    let Ok(near) = DataEndpoint::bind(&Identity::generate(), "[::]:0".parse().unwrap()) else { return };
    let identity = Identity::generate();
    let far = DataEndpoint::bind(&identity, "127.0.0.1:0".parse().unwrap()).unwrap();
    let address = far.local_addr().unwrap();
    let accept = async { far.accept().await.unwrap().establish(PATIENCE).await.unwrap() };
    let (client, _server) = tokio::join!(near.connect(identity.peer_id(), address, PATIENCE), accept);
    assert_eq!(client.unwrap().path(), Path::Data(address));
}

#[tokio::test]
async fn a_peer_with_another_identity_than_the_one_dialled_is_refused() {
    let expected = Identity::generate().peer_id();
    let impostor = Identity::generate();
    let far = DataEndpoint::bind(&impostor, "127.0.0.1:0".parse().expect("v4")).expect("a free port");
    let near = DataEndpoint::bind(&Identity::generate(), "127.0.0.1:0".parse().expect("v4")).expect("a free port");
    let address = far.local_addr().expect("it is bound");
    let accept = async { far.accept().await.expect("open").establish(PATIENCE).await };
    let (dialled, accepted) = tokio::join!(near.connect(expected, address, PATIENCE), accept);
    match dialled {
        Err(ConnectError::WrongPeer { expected: e, found, address: a }) => {
            assert_eq!((e, found, a), (expected, impostor.peer_id(), address));
        }
        other => panic!("not refused: {other:?}"),
    }
    assert!(accepted.is_err(), "the impostor does not learn who dialled");
}

#[tokio::test]
async fn an_address_where_nobody_answers_times_out() {
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let near = DataEndpoint::bind(&Identity::generate(), "127.0.0.1:0".parse().expect("v4")).expect("a free port");
    let address = silent.local_addr().expect("it is bound");
    let error = near.connect(Identity::generate().peer_id(), address, SOON).await.expect_err("nobody is there");
    assert!(matches!(error, ConnectError::Timeout { .. }), "{error}");
    let v6 = "[::1]:9".parse().expect("v6");
    let error = near.connect(Identity::generate().peer_id(), v6, PATIENCE).await.expect_err("an IPv4 socket");
    assert!(matches!(error, ConnectError::Address { .. }), "{error}");
}

#[tokio::test]
async fn a_busy_server_that_validates_addresses_still_lets_everyone_in() {
    let identity = Identity::generate();
    let far = DataEndpoint::bind(&identity, "127.0.0.1:0".parse().expect("v4")).expect("a free port");
    let near = DataEndpoint::bind(&Identity::generate(), "127.0.0.1:0".parse().expect("v4")).expect("a free port");
    let address = far.local_addr().expect("it is bound");
    // From 64 connections on a server asks for a second flight before it begins a handshake.
    let mut connections = Vec::new();
    for _ in 0..70 {
        let accept = async { far.accept().await.expect("open").establish(PATIENCE).await.expect("a handshake") };
        let (dialled, accepted) = tokio::join!(near.connect(identity.peer_id(), address, PATIENCE), accept);
        connections.push((dialled.expect("a handshake"), accepted));
    }
    assert!(connections.iter().all(|(dialled, accepted)| !dialled.is_closed() && !accepted.is_closed()));
}

#[tokio::test]
async fn an_address_in_use_is_an_error() {
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let error = DataEndpoint::bind(&Identity::generate(), taken.local_addr().expect("it is bound"));
    assert!(error.expect_err("taken").to_string().contains("cannot bind UDP address"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_calls_each_get_their_own_answer() {
    let pair = pair().await;
    tokio::spawn(echo(pair.server.clone()));
    for round in 0..4 {
        let mut calls = tokio::task::JoinSet::new();
        for id in 0..64 {
            let client = pair.client.clone();
            let id = round * 64 + id;
            calls.spawn(
                async move { assert_answers(client.call(&numbered(id), PATIENCE).await.expect("an answer"), id) },
            );
        }
        calls.join_all().await;
    }
}

#[tokio::test]
async fn a_large_body_arrives_whole() {
    let pair = pair().await;
    tokio::spawn(echo(pair.server.clone()));
    let (rows, hidden_size) = (1024, 2048);
    let body: Vec<u8> = (0..rows * hidden_size * 2).map(|i| (i % 61) as u8).collect();
    let big = ExpertCall { rows, hidden_size, body: body.clone().into(), ..call() };
    match pair.client.call(&Frame::Call(big), PATIENCE).await.expect("an answer") {
        Frame::Answer(answer) => assert!(answer.body == body),
        other => panic!("no answer: {:?}", other.kind()),
    }
}

/// Holds the first call until its caller gives up and reports that; answers the later ones.
async fn hang_once(connection: DataConnection, cancelled: mpsc::Sender<()>, began: mpsc::Sender<()>) {
    let mut stream = connection.accept_stream().await.expect("a stream");
    stream.read(&FrameLimits::default()).await.expect("a call");
    began.send(()).await.expect("the test waits");
    stream.cancelled().await;
    let next = stream.read(&FrameLimits::default()).await;
    assert!(matches!(next, Err(FrameError::Reset)), "the other direction is reset as well, not ended");
    cancelled.send(()).await.expect("the test waits");
    assert!(stream.write(&numbered(0)).await.is_err(), "nobody is there to take an answer");
    echo(connection).await;
}

#[tokio::test]
async fn a_late_call_resets_its_stream_and_the_next_call_works() {
    let pair = pair().await;
    let (cancelled, mut was_cancelled) = mpsc::channel(1);
    let (began, _keep) = mpsc::channel(1);
    tokio::spawn(hang_once(pair.server.clone(), cancelled, began));
    let error = pair.client.call(&numbered(1), SOON).await.expect_err("nobody answers");
    assert!(matches!(error, CallError::Late(deadline) if deadline == SOON), "{error}");
    was_cancelled.recv().await.expect("the server noticed");
    assert_answers(pair.client.call(&numbered(2), PATIENCE).await.expect("an answer"), 2);
}

#[tokio::test]
async fn a_dropped_call_is_noticed_by_the_server() {
    let pair = pair().await;
    let (cancelled, mut was_cancelled) = mpsc::channel(1);
    let (began, mut has_begun) = mpsc::channel(1);
    tokio::spawn(hang_once(pair.server.clone(), cancelled, began));
    let request = numbered(1);
    tokio::select! {
        _ = pair.client.call(&request, PATIENCE) => panic!("nobody answers"),
        _ = has_begun.recv() => {}
    }
    was_cancelled.recv().await.expect("the server noticed");
    assert_answers(pair.client.call(&numbered(2), PATIENCE).await.expect("an answer"), 2);
}

#[tokio::test]
async fn an_idle_stream_that_the_server_ended_is_replaced() {
    let pair = pair().await;
    let server = pair.server.clone();
    tokio::spawn(async move {
        // One call per stream, then the stream is dropped.
        while let Some(mut stream) = server.accept_stream().await {
            if let Ok(Frame::Call(call)) = stream.read(&FrameLimits::default()).await {
                stream.write(&answer_to(call)).await.expect("the client waits");
            }
        }
    });
    for id in 1..6 {
        assert_answers(pair.client.call(&numbered(id), PATIENCE).await.expect("an answer"), id);
    }
}

#[tokio::test]
async fn an_answer_to_something_else_is_the_peers_fault() {
    let pair = pair().await;
    let server = pair.server.clone();
    tokio::spawn(async move {
        while let Some(mut stream) = server.accept_stream().await {
            if let Ok(Frame::Call(call)) = stream.read(&FrameLimits::default()).await {
                let other = ExpertCall { request_id: call.request_id + 1, ..call };
                stream.write(&answer_to(other)).await.expect("the client waits");
            }
        }
    });
    let error = pair.client.call(&numbered(1), PATIENCE).await.expect_err("another request's answer");
    assert!(matches!(error, CallError::BadAnswer(_)), "{error}");
}

#[tokio::test]
async fn requests_that_break_a_rule_are_not_sent() {
    let pair = pair().await;
    let wrong = Frame::Call(ExpertCall { rows: 3, combine: Combine::Peer, ..call() });
    assert!(matches!(pair.client.call(&wrong, PATIENCE).await, Err(CallError::Request(FrameError::Malformed(_)))));
    let refusal = Frame::Refusal(Refusal::new(0, RefusalCode::Busy, ""));
    assert!(matches!(pair.client.call(&refusal, PATIENCE).await, Err(CallError::NotARequest(_))));
}

#[tokio::test]
async fn a_lost_connection_fails_its_calls() {
    let pair = pair().await;
    let server = pair.server.clone();
    tokio::spawn(async move {
        let mut stream = server.accept_stream().await.expect("a stream");
        stream.read(&FrameLimits::default()).await.expect("a call");
        server.close("going home");
    });
    let error = pair.client.call(&numbered(1), PATIENCE).await.expect_err("the server left");
    assert!(matches!(&error, CallError::ConnectionLost(reason) if reason.contains("going home")), "{error}");
    assert!(pair.client.closed().await.contains("going home"));
    assert!(pair.client.is_closed() && pair.server.accept_stream().await.is_none());
    let error = pair.client.call(&numbered(2), PATIENCE).await.expect_err("it stays closed");
    assert!(matches!(error, CallError::ConnectionLost(_)), "{error}");
}

#[tokio::test]
async fn a_closed_endpoint_tells_its_peers_and_accepts_nobody() {
    let pair = pair().await;
    pair.endpoints.1.close().await;
    assert!(pair.endpoints.1.accept().await.is_none());
    assert!(pair.client.closed().await.contains("the endpoint was closed"));
}

/// A call whose answer of 3 MiB fills the congestion window many times over: it is not on its way yet when it is written.
fn long_call() -> ExpertCall {
    let (rows, hidden_size) = (768, 2048);
    ExpertCall { rows, hidden_size, body: vec![0; 3 << 20].into(), ..call() }
}

#[tokio::test]
async fn an_answer_arrives_although_the_server_ends_the_stream_at_once() {
    let pair = pair().await;
    let server = pair.server.clone();
    let serving = tokio::spawn(async move {
        let mut stream = server.accept_stream().await.expect("a stream");
        let Ok(Frame::Call(call)) = stream.read(&FrameLimits::default()).await else { panic!("no call") };
        stream.write(&answer_to(call)).await.expect("the client waits");
        // It waits for the next frame, and is called away.
        assert!(stream.read(&FrameLimits::default()).now_or_never().is_none());
    });
    let answer = pair.client.call(&Frame::Call(long_call()), PATIENCE).await;
    assert!(matches!(answer, Ok(Frame::Answer(_))), "{:?}", answer.map(|frame| frame.kind()));
    serving.await.expect("no panic");
}

#[tokio::test]
async fn an_answer_on_a_finished_stream_arrives_although_the_server_leaves() {
    let pair = pair().await;
    let (server, endpoint) = (pair.server.clone(), pair.endpoints.1.clone());
    tokio::spawn(async move {
        let mut stream = server.accept_stream().await.expect("a stream");
        let Ok(Frame::Call(call)) = stream.read(&FrameLimits::default()).await else { panic!("no call") };
        stream.write(&answer_to(call)).await.expect("the client waits");
        stream.finish().await;
        endpoint.close().await;
    });
    let answer = pair.client.call(&Frame::Call(long_call()), PATIENCE).await;
    assert!(matches!(answer, Ok(Frame::Answer(_))), "{:?}", answer.map(|frame| frame.kind()));
    assert!(pair.client.closed().await.contains("the endpoint was closed"));
}
