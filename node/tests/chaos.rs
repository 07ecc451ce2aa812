//! Volunteers that die, hang, crawl and come back, as processes: no generation fails, and no token changes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use hanse_model::Checkpoint;
use hanse_node::testnet::chaos::{self, ChaosConfig};
use hanse_node::testnet::{Shape, Testnet, TestnetConfig, split};
use hanse_protocol::{Identity, ModelId};
use hanse_router::client::layout_of;
use hanse_router::{Client, GenerateRequest, ModelConfig, NetworkConfig};

const PROGRAM: &str = env!("CARGO_BIN_EXE_hanse");

fn tiny_moe() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("examples/models/tiny-moe")
}

fn id(model: &Path) -> ModelId {
    hanse_router::weights::model_id(&Checkpoint::open(model).unwrap()).unwrap()
}

/// The short form; `hanse testnet chaos` runs as long as one likes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_generation_gives_the_undisturbed_tokens_while_volunteers_die_hang_and_crawl() {
    let model = tiny_moe();
    let config = ChaosConfig {
        peace: Duration::from_secs(4),
        chaos: Duration::from_secs(18),
        pause: Duration::from_secs(2),
        max_tokens: 24,
        ..ChaosConfig::new(PROGRAM, &model, id(&model), 7)
    };
    let report = chaos::run(config, |line| println!("{line}")).await.unwrap();
    println!("{report:#?}");
    assert!(report.is_exact(), "{report:#?}");
    assert!(report.generations > 16, "{report:#?}");
    let done = report.disturbances;
    assert!(done.killed >= 1 && done.hung >= 1 && done.cut >= 1 && done.slowed == 1, "{report:#?}");
    assert!(done.left >= 1 && done.rested >= 1, "{report:#?}");
    assert!(report.longest_in_routes_ms < 2000.0, "a dead peer is out of every route: {report:#?}");
    // Generous: the goal of 300 ms is for a machine with nothing else to do.
    assert!(report.killed.p99_ms < 2000.0, "{report:#?}");
}

/// A network of two, each with half of the experts, and a client of it that waits for `patience` for experts to come back.
async fn halves(patience: Duration) -> (Testnet, Client) {
    let model = tiny_moe();
    let layout = layout_of(Checkpoint::open(&model).unwrap().spec());
    let config =
        TestnetConfig { shape: Some(Shape::default()), ..TestnetConfig::new(PROGRAM, &model, split(&layout, 2, 1)) };
    let net = Testnet::start(config, |_| ()).await.unwrap();
    let network = NetworkConfig {
        bootstrap: vec![net.bootstrap().unwrap().clone()],
        replica_patience: patience,
        ..NetworkConfig::default()
    };
    let trunk = ModelConfig { dir: model.clone(), threads: 1 };
    let client = Client::connect(&trunk, id(&model), &Identity::generate(), network).await.unwrap();
    (net, client)
}

async fn expected(request: &GenerateRequest) -> Vec<u32> {
    let local = tokio::task::spawn_blocking(|| Client::local(&ModelConfig { dir: tiny_moe(), threads: 1 }));
    let tokens = local.await.unwrap().unwrap().generate(request.clone());
    tokens.map(|token| token.unwrap().id).collect().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_waits_for_the_only_host_of_its_experts_to_return_and_completes() {
    let (mut net, client) = halves(Duration::from_secs(60)).await;
    let request = GenerateRequest { ignore_eos: true, ..GenerateRequest::greedy(vec![1, 2, 3], 24) };
    let expected = expected(&request).await;
    let mut generation = client.generate(request);
    let mut tokens = Vec::new();
    while tokens.len() < 4 {
        tokens.push(generation.next().await.unwrap().unwrap().id);
    }
    net.kill(1).await.unwrap();
    // Steps that do not need the dead one's experts may still come; then it waits.
    while let Ok(token) = tokio::time::timeout(Duration::from_secs(2), generation.next()).await {
        tokens.push(token.unwrap().unwrap().id);
    }
    assert!(tokens.len() < expected.len(), "it waits");
    net.restart(1).await.unwrap();
    while let Some(token) = generation.next().await {
        tokens.push(token.unwrap().id);
    }
    assert_eq!(tokens, expected);
    client.close().await;
    net.stop().await;
}
