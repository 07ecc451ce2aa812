//! Volunteers that die, hang, crawl and come back, as processes: no generation fails, and no token changes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hanse_model::Checkpoint;
use hanse_node::testnet::chaos::{self, ChaosConfig};
use hanse_protocol::ModelId;

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
        chaos: Duration::from_secs(12),
        pause: Duration::from_millis(1500),
        max_tokens: 24,
        ..ChaosConfig::new(PROGRAM, &model, id(&model), 7)
    };
    let report = chaos::run(config, |line| println!("{line}")).await.unwrap();
    println!("{report:#?}");
    assert!(report.is_exact(), "{report:#?}");
    assert!(report.generations > 16, "{report:#?}");
    assert!(report.disturbances.killed >= 1 && report.disturbances.hung >= 1, "{report:#?}");
    assert!(report.longest_in_routes_ms < 2000.0, "a dead peer is out of every route within 2 s: {report:#?}");
    // Generous: the goal of 300 ms is for a machine with nothing else to do.
    assert!(report.killed.p99_ms < 2000.0, "{report:#?}");
}
