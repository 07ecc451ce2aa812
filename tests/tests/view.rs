//! A network as a client sees it: what is hosted by whom, who has gone, and what was called.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use hanse_protocol::Identity;
use hanse_router::client::layout_of;
use hanse_router::view::{NetworkView, ViewSource, routes};
use hanse_router::{ExpertNetwork, NetworkConfig, PeerState};
use hanse_tests::net::{Net, eventually, greedy, halves, runtime, tokens};
use hanse_tests::reference::tiny_moe;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// A peer that dies shows within this.
const NOTICED: Duration = Duration::from_secs(3);
/// A page that has been open for so long may have to make place for another one.
const LEAST_OPEN: Duration = Duration::from_secs(5);

const LAYERS: usize = 6;
const EXPERTS: usize = 16;

async fn watcher(net: &Net) -> Arc<ExpertNetwork> {
    let layout = layout_of(hanse_model::Checkpoint::open(&net.dir).unwrap().spec());
    Arc::new(ExpertNetwork::watch(&Identity::generate(), net.model, layout, net.config()).await.unwrap())
}

fn state_of(view: &NetworkView, peer: &str) -> Option<PeerState> {
    view.peers.iter().find(|row| row.peer_id == peer).map(|row| row.state)
}

#[test]
fn calls_and_a_trace_of_them_are_those_of_the_client() {
    runtime().block_on(async {
        let net = Net::halves(&tiny_moe()).await;
        let client = net.client().await;
        let source = ViewSource::client(&client, "tiny", true).unwrap();
        assert_eq!(source.view().trace, None);
        tokens(&client, greedy(&[1, 2, 3], 20)).await.unwrap();
        let view = source.view();
        assert_eq!((view.missing, view.layers.len(), view.chat), (0, LAYERS, true));
        // Two experts for each of three rows of the prompt and nineteen of the answer.
        let top_k = client.spec().moe_layers().next().unwrap().1.top_k as u64;
        for layer in &view.layers {
            assert_eq!(layer.replicas, [1; EXPERTS]);
            assert_eq!(layer.calls.iter().sum::<u64>(), 22 * top_k, "{layer:?}");
        }
        let trace = view.trace.unwrap().pass;
        assert_eq!(trace.layers.len(), LAYERS);
        let ends: Vec<_> = trace.layers.iter().map(|layer| layer.start + layer.duration).collect();
        assert!(ends.is_sorted() && ends[LAYERS - 1] <= trace.total, "{trace:?}");
        for layer in &trace.layers {
            assert!((1..=2).contains(&layer.calls.len()), "{layer:?}");
            assert!(layer.calls.iter().all(|call| call.duration <= layer.duration && call.rows >= 1), "{layer:?}");
        }
        let sums = |view: &NetworkView| view.peers.iter().map(|peer| peer.rows).sum::<u64>();
        assert_eq!(sums(&source.view()), LAYERS as u64 * 22 * top_k);
        client.close().await;
    });
}

#[test]
fn a_peer_that_dies_while_nothing_runs_leaves_holes_within_three_seconds_and_comes_back() {
    runtime().block_on(async {
        let mut net = Net::halves(&tiny_moe()).await;
        let network = watcher(&net).await;
        let source = ViewSource::network(network.clone(), "tiny");
        eventually("all are connected", || {
            source.view().peers.iter().filter(|peer| peer.state == PeerState::Connected).count() == 2
        })
        .await;
        assert_eq!(source.view().engine, None);
        let _watching = network.directory().watch();
        let killed = net.volunteers.pop().unwrap();
        let id = killed.peer_id().to_string();
        let began = Instant::now();
        drop(killed);
        eventually("its experts are holes", || source.view().missing == LAYERS * EXPERTS / 2).await;
        assert!(began.elapsed() < NOTICED, "after {:?}", began.elapsed());
        eventually("it is lost", || state_of(&source.view(), &id) == Some(PeerState::Lost)).await;
        let [_, odd] = halves(&tiny_moe());
        net.add(&odd).await;
        eventually("the holes are filled", || source.view().missing == 0).await;
        assert_eq!(state_of(&source.view(), &id), Some(PeerState::Lost), "it is told of for a minute");
        network.shutdown().await;
    });
}

/// Serves a view on a free port: its address, and what ends its streams.
async fn serve(source: ViewSource) -> (std::net::SocketAddr, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, ended) = (listener.local_addr().unwrap(), CancellationToken::new());
    let app = routes(source, ended.clone());
    tokio::spawn(async move { axum::serve(listener, app).await });
    (address, ended)
}

async fn ask(address: std::net::SocketAddr, path: &str) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    BufReader::new(stream)
}

/// Status line, headers and body of a short answer.
async fn answer(address: std::net::SocketAddr, path: &str) -> (String, String) {
    let mut text = String::new();
    ask(address, path).await.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.to_ascii_lowercase(), body.to_owned())
}

/// The next document of a stream of events; `None` at its end.
async fn event(stream: &mut BufReader<TcpStream>) -> Option<Value> {
    let mut line = String::new();
    while stream.read_line(&mut line).await.unwrap() > 0 {
        if let Some(document) = line.strip_prefix("data: ") {
            return Some(serde_json::from_str(document).unwrap());
        }
        line.clear();
    }
    None
}

#[test]
fn the_page_and_its_documents_are_served_and_streams_end_when_the_server_does() {
    runtime().block_on(async {
        let net = Net::halves(&tiny_moe()).await;
        let client = net.client().await;
        let (address, ended) = serve(ViewSource::client(&client, "tiny", true).unwrap()).await;
        let (head, page) = answer(address, "/").await;
        assert!(
            head.starts_with("http/1.1 200") && head.contains("content-security-policy: default-src 'none'"),
            "{head}"
        );
        let assets = page.split('"').filter(|text| text.starts_with("/assets/"));
        let modules = ["/assets/feed.js", "/assets/format.js"];
        for asset in assets.chain(modules) {
            let (head, body) = answer(address, asset).await;
            assert!(head.starts_with("http/1.1 200") && !body.is_empty(), "{asset}: {head}");
        }
        for absent in ["/assets/none.js", "/assets/..%2f..%2fCargo.toml", "/api/none"] {
            assert!(answer(address, absent).await.0.starts_with("http/1.1 404"), "{absent}");
        }
        let document: Value = serde_json::from_str(&answer(address, "/api/network").await.1).unwrap();
        assert_eq!(document["model_id"], net.model.to_string());
        assert_eq!(document["peers"][0]["state"], "connected");
        assert_eq!(document["peers"][0]["hosted"][0][0], "0-5");

        let mut events = ask(address, "/api/events").await;
        let mut generation = client.generate(greedy(&[1, 2, 3], 100_000));
        generation.next().await.unwrap().unwrap();
        let reading = tokio::spawn(async move { while generation.next().await.is_some() {} });
        let speeds =
            async { while event(&mut events).await.unwrap()["tokens_per_second"].as_f64().unwrap_or(0.0) == 0.0 {} };
        tokio::time::timeout(hanse_tests::net::PATIENCE, speeds).await.expect("a speed");
        reading.abort();
        ended.cancel();
        let rest = async { while event(&mut events).await.is_some() {} };
        tokio::time::timeout(hanse_tests::net::PATIENCE, rest).await.expect("an end");
        client.close().await;
    });
}

#[test]
fn so_many_pages_may_be_open_and_one_more_is_refused_until_another_leaves() {
    runtime().block_on(async {
        let net = Net::start(&tiny_moe(), &["all"]).await;
        let network = watcher(&net).await;
        let (address, _) = serve(ViewSource::network(network.clone(), "tiny")).await;
        let (mut open, began) = (Vec::new(), Instant::now());
        for _ in 0..64 {
            let mut events = ask(address, "/api/events").await;
            assert!(event(&mut events).await.is_some());
            open.push(events);
        }
        let (head, _) = answer(address, "/api/events").await;
        let refused = head.starts_with("http/1.1 503") && head.contains("retry-after: ");
        assert!(refused || began.elapsed() > LEAST_OPEN, "{head}");
        open.pop();
        let another = async {
            loop {
                let mut events = ask(address, "/api/events").await;
                if event(&mut events).await.is_some() {
                    return;
                }
            }
        };
        tokio::time::timeout(hanse_tests::net::PATIENCE, another).await.expect("a place");
        network.shutdown().await;
    });
}

#[test]
fn a_network_can_be_watched_while_experts_are_missing_and_not_where_nobody_answers() {
    runtime().block_on(async {
        let net = Net::start(&tiny_moe(), &["0-2"]).await;
        let network = watcher(&net).await;
        let source = ViewSource::network(network.clone(), "tiny");
        eventually("half is there", || source.view().missing == LAYERS * EXPERTS / 2).await;
        network.shutdown().await;
        let layout = layout_of(hanse_model::Checkpoint::open(&net.dir).unwrap().spec());
        let nobody = NetworkConfig {
            bootstrap: vec!["/ip4/127.0.0.1/udp/9/quic-v1".parse().unwrap()],
            join_timeout: Duration::from_secs(1),
            ..NetworkConfig::default()
        };
        let error = ExpertNetwork::watch(&Identity::generate(), net.model, layout, nobody).await.unwrap_err();
        assert!(matches!(error, hanse_router::JoinError::Unreachable { .. }), "{error}");
    });
}

#[test]
fn pages_that_are_open_but_not_read_keep_nobody_out() {
    runtime().block_on(async {
        let net = Net::start(&tiny_moe(), &["all"]).await;
        let client = net.client().await;
        let (address, ended) = serve(ViewSource::client(&client, "tiny", true).unwrap()).await;
        let (mut stalled, began) = (Vec::new(), Instant::now());
        for _ in 0..64 {
            stalled.push(ask(address, "/api/events").await);
        }
        // Not all of them need have been taken in when the next one comes.
        let mut refused = false;
        while !refused && stalled.len() < 128 {
            let mut late = ask(address, "/api/events").await;
            let mut status = String::new();
            late.read_line(&mut status).await.unwrap();
            refused = status.starts_with("HTTP/1.1 503");
            stalled.push(late);
        }
        assert!(refused || began.elapsed() > LEAST_OPEN, "nobody is sent away at once");
        let began = Instant::now();
        loop {
            let mut newcomer = ask(address, "/api/events").await;
            if event(&mut newcomer).await.is_some() {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(20));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        ended.cancel();
        client.close().await;
    });
}
