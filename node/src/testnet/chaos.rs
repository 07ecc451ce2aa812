//! Breaks a network for a while under load, and checks that nobody notices more than a short stall.
//!
//! Volunteers of unequal size host every expert twice. One client keeps many generations going; first in peace, then while
//! volunteers are killed, hang, start again, crawl, or are heard no more. Every generation must end with exactly the tokens of
//! the undisturbed computation in one process. Trouble never takes an expert's last replica.

mod breaker;
mod load;
mod report;
mod stalls;
mod trouble;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use hanse_model::{Checkpoint, CheckpointError};
use hanse_protocol::{Identity, ModelId};
use hanse_router::client::layout_of;
use hanse_router::{Client, ClientError, GenerateError, ModelConfig, NetworkConfig};

use super::{Shape, Testnet, TestnetConfig, TestnetError, split_unequally, weights};
use breaker::Breaker;
use load::Load;
pub use report::{ChaosReport, Event};
pub use stalls::Quantiles;
pub use trouble::Tally;
use trouble::{Hosts, Kind};

/// How long the client may take to find every volunteer at first.
const FIND_TIMEOUT: Duration = Duration::from_secs(30);
/// Stalls this soon after a disturbance are put down to it.
const AFTERMATH: Duration = Duration::from_secs(1);

/// What to do to how large a network for how long.
#[derive(Debug, Clone)]
pub struct ChaosConfig {
    /// The program `hanse`.
    pub program: PathBuf,
    /// The model's folder.
    pub model: PathBuf,
    /// The id of the model.
    pub id: ModelId,
    /// Decides the sizes of the volunteers, what happens to whom, and what the shapers lose.
    pub seed: u64,
    /// How long the load runs undisturbed.
    pub peace: Duration,
    /// How long things break.
    pub chaos: Duration,
    /// Volunteers.
    pub nodes: usize,
    /// Hosts of each expert; at least 2.
    pub replicas: usize,
    /// Generations in progress at any time.
    pub streams: usize,
    /// Tokens of each generation.
    pub max_tokens: usize,
    /// The time between two disturbances, on average.
    pub pause: Duration,
    /// The path to every volunteer in peace.
    pub shape: Shape,
}

impl ChaosConfig {
    /// Eight volunteers, two replicas, 16 generations at a time.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>, model: impl Into<PathBuf>, id: ModelId, seed: u64) -> Self {
        Self {
            program: program.into(),
            model: model.into(),
            id,
            seed,
            peace: Duration::from_secs(30),
            chaos: Duration::from_secs(150),
            nodes: 8,
            replicas: 2,
            streams: 16,
            max_tokens: 48,
            pause: Duration::from_secs(3),
            shape: Shape::default(),
        }
    }
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChaosError {
    /// Nothing can be broken without breaking the network.
    #[error("every expert needs two hosts or more, and fewer than there are volunteers")]
    Replicas,
    /// The model cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The volunteers do not run.
    #[error(transparent)]
    Testnet(#[from] TestnetError),
    /// The client does not run.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The undisturbed computation failed.
    #[error("the computation in one process failed: {0}")]
    Reference(GenerateError),
    /// A task of this program died; this is a defect.
    #[error("an internal task ended unexpectedly: {0}")]
    Task(String),
}

/// Starts a network and a client, breaks the one and listens to the other. `say` is told what is done.
///
/// # Errors
/// See [`ChaosError`]. Wrong tokens and failed generations are no error but in the report.
pub async fn run(config: ChaosConfig, say: impl Fn(&str)) -> Result<ChaosReport, ChaosError> {
    if config.replicas < 2 || config.replicas >= config.nodes {
        return Err(ChaosError::Replicas);
    }
    let layout = layout_of(Checkpoint::open(&config.model)?.spec());
    let specs = split_unequally(&layout, &weights(config.seed, config.nodes), config.replicas);
    let hosts = Hosts::new(&layout, &specs);
    let started = TestnetConfig {
        program: config.program.clone(),
        model: config.model.clone(),
        specs,
        shape: Some(config.shape),
        seed: config.seed,
    };
    let net = Testnet::start(started, |running| say(&format!("{running} volunteers run"))).await?;
    let trunk = ModelConfig { dir: config.model.clone(), threads: 1 };
    let network = NetworkConfig {
        bootstrap: net.bootstrap().cloned().into_iter().collect(),
        join_timeout: FIND_TIMEOUT,
        ..NetworkConfig::default()
    };
    let client = Client::connect(&trunk, config.id, &Identity::generate(), network).await?;
    if let Some(network) = client.network() {
        network.wait_for_peers(config.nodes, FIND_TIMEOUT).await;
    }
    let local = tokio::task::spawn_blocking(move || Client::local(&trunk));
    let local = local.await.map_err(|e| ChaosError::Task(e.to_string()))??;
    say("computing in one process what must come out");
    let load = Load::start(&local, &client, config.streams, config.max_tokens).await?;
    drop(local);

    let mut breaker = Breaker::new(net, client.clone(), hosts, &config);
    say("peace");
    let peaceful = Instant::now();
    tokio::time::sleep(config.peace).await;
    let before = load.counts();
    let began = Instant::now();
    let outcome = breaker.break_things(config.chaos, &say).await;
    let ended = Instant::now();
    let results = load.finish().await;
    client.close().await;
    let Breaker { net, noted, experts, .. } = breaker;
    net.stop().await;
    outcome?;

    let peace = results.gaps.in_time(peaceful, began).quantiles();
    let usual = peace.p50_ms;
    let aftermath = |kinds: &[Kind]| {
        let times = noted.begun.iter().filter(|(_, _, kind)| kinds.contains(kind)).map(|(at, ..)| *at);
        Quantiles::of(
            times.flat_map(|at| results.gaps.longest_per_stream(at, at + AFTERMATH)).map(|ms| (ms - usual).max(0.0)),
        )
    };
    let both = |before: u64, all: u64| [before, all - before];
    Ok(ChaosReport {
        seed: config.seed,
        experts,
        generations: results.generations,
        failed: results.failures.len(),
        different: results.different,
        failures: results.failures.iter().take(5).cloned().collect(),
        peace,
        chaos: results.gaps.in_time(began, ended).quantiles(),
        killed: aftermath(&[Kind::Kill]),
        hung: aftermath(&[Kind::Hang]),
        left: aftermath(&[Kind::Leave, Kind::Rest]),
        disturbances: noted.tally,
        events: noted
            .begun
            .iter()
            .map(|(at, node, kind)| Event {
                after_s: (*at - began).as_secs_f64(),
                node: *node,
                what: kind.to_string(),
                longest_ms: Quantiles::of(results.gaps.longest_per_stream(*at, *at + AFTERMATH)).max_ms,
            })
            .collect(),
        longest_in_routes_ms: noted.longest_in_routes.as_secs_f64() * 1e3,
        return_ms: Quantiles::of(noted.returns.iter().map(|took| took.as_secs_f64() * 1e3)),
        frames: both(before.frames, results.network.frames),
        hedged: both(before.hedged, results.network.hedged),
        retries: both(before.retries, results.network.retries),
    })
}
