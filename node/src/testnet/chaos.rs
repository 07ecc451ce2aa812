//! Breaks a network for a while under load, and checks that nobody notices more than a short stall.
//!
//! Volunteers of unequal size host every expert twice. One client keeps many generations going; first in peace, then while
//! volunteers are killed, hang, start again, crawl, or are heard no more. Every generation must end with exactly the tokens of
//! the undisturbed computation in one process. Trouble never takes an expert's last replica.

mod load;
mod stalls;
mod trouble;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use hanse_model::{Checkpoint, CheckpointError};
use hanse_protocol::{Identity, ModelId};
use hanse_router::client::layout_of;
use hanse_router::{Client, ClientError, GenerateError, ModelConfig, NetworkConfig, PeerReport};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::Serialize;

use super::{Shape, Testnet, TestnetConfig, TestnetError, split_unequally, weights};
use load::Load;
pub use stalls::Quantiles;
pub use trouble::Tally;
use trouble::{Hosts, Kind, Schedule, Trouble};

/// How often the state of things is looked at.
const TICK: Duration = Duration::from_millis(50);
/// How long the client may take to find every volunteer at first.
const FIND_TIMEOUT: Duration = Duration::from_secs(30);
/// A volunteer that has been connected for so long after its return is well even if nobody called it.
const SETTLED: Duration = Duration::from_secs(3);
/// Stalls this soon after a disturbance are put down to it.
const AFTERMATH: Duration = Duration::from_secs(1);
/// A slowed volunteer gets one part in so many of the time.
const SLOWER: u32 = 10;

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

/// What happened.
#[derive(Debug, Clone, Serialize)]
pub struct ChaosReport {
    /// Runs the same again.
    pub seed: u64,
    /// Experts that each volunteer hosts.
    pub experts: Vec<usize>,
    /// Generations that ended, in peace and in chaos.
    pub generations: usize,
    /// Of which failed.
    pub failed: usize,
    /// Of which gave other tokens than one process.
    pub different: usize,
    /// What the first few that failed said.
    pub failures: Vec<String>,
    /// Time from one token to the next of the same generation, undisturbed.
    pub peace: Quantiles,
    /// The same while things break.
    pub chaos: Quantiles,
    /// Time beyond the usual that the tokens in progress took when a volunteer was killed, up to a second later.
    pub killed: Quantiles,
    /// The same when one hung.
    pub hung: Quantiles,
    /// The same when one left politely or was paused by its owner.
    pub left: Quantiles,
    /// How often what was done.
    pub disturbances: Tally,
    /// What was done, one after the other.
    pub events: Vec<Event>,
    /// Latest time after its death or hang that a volunteer was still sent a call.
    pub longest_in_routes_ms: f64,
    /// Time from a volunteer's return until it answered a call.
    pub return_ms: Quantiles,
    /// Calls sent, in peace and in chaos.
    pub frames: [u64; 2],
    /// Of which because another one was late.
    pub hedged: [u64; 2],
    /// Of which because another one failed.
    pub retries: [u64; 2],
}

/// Something that was done to a volunteer.
#[derive(Debug, Clone, Serialize)]
pub struct Event {
    /// Seconds after the peace ended.
    pub after_s: f64,
    /// Which volunteer.
    pub node: usize,
    /// What.
    pub what: String,
    /// The longest time from token to token within a second of it.
    pub longest_ms: f64,
}

impl ChaosReport {
    /// Whether every generation ended with the right tokens.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.failed == 0 && self.different == 0 && self.generations > 0
    }

    /// Share of the calls in peace that were sent a second time because the first was late.
    #[must_use]
    pub fn hedged_in_peace(&self) -> f64 {
        let [hedged, frames] = [self.hedged[0] as f64, self.frames[0] as f64];
        if frames == 0.0 { 0.0 } else { hedged / (frames - hedged).max(1.0) }
    }
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

/// What was done and seen.
#[derive(Debug, Default)]
struct Noted {
    tally: Tally,
    begun: Vec<(Instant, usize, Kind)>,
    longest_in_routes: Duration,
    returns: Vec<Duration>,
}

/// How a volunteer is, as far as the one who breaks things knows.
#[derive(Debug, Clone, Copy)]
enum Health {
    Well,
    Ill(Trouble),
    /// Its trouble is over, but the client has not had an answer since.
    Returning {
        since: Instant,
        calls: u64,
    },
}

struct Breaker {
    net: Testnet,
    client: Client,
    hosts: Hosts,
    schedule: Schedule,
    health: Vec<Health>,
    /// The one that crawls.
    slowed: Option<usize>,
    noted: Noted,
    experts: Vec<usize>,
}

impl Breaker {
    fn new(net: Testnet, client: Client, hosts: Hosts, config: &ChaosConfig) -> Self {
        let schedule = Schedule::new(StdRng::seed_from_u64(config.seed), config.pause);
        let experts = net.nodes().iter().map(super::Node::experts).collect();
        let health = vec![Health::Well; config.nodes];
        let (slowed, noted) = (None, Noted::default());
        Self { net, client, hosts, schedule, health, slowed, noted, experts }
    }

    async fn break_things(&mut self, duration: Duration, say: &impl Fn(&str)) -> Result<(), TestnetError> {
        let began = Instant::now();
        let mut next = began;
        while began.elapsed() < duration {
            for index in 0..self.health.len() {
                self.look_after(index, say).await?;
            }
            let slow_is_due = self.slowed.is_none() && began.elapsed() > duration / 2;
            if slow_is_due {
                // From the middle on one volunteer crawls; nobody else is disturbed until one may.
                self.slow_one(say).await?;
            } else if Instant::now() >= next {
                // If nobody may be disturbed now, somebody may be a moment later.
                let disturbed = self.disturb(say).await?;
                next = Instant::now() + if disturbed { self.schedule.pause() } else { TICK };
            }
            tokio::time::sleep(TICK).await;
        }
        for index in 0..self.health.len() {
            if let Health::Ill(trouble) = self.health[index] {
                self.end(index, trouble, say).await?;
            }
        }
        Ok(())
    }

    /// What the client knows of a volunteer; nothing if it has forgotten it.
    fn report(&self, index: usize) -> Option<PeerReport> {
        let peer = self.net.nodes().get(index)?.peer_id();
        self.client.peers().into_iter().find(|report| report.peer == peer)
    }

    /// Calls that a volunteer has answered so far.
    fn calls(&self, index: usize) -> u64 {
        self.report(index).map_or(0, |report| report.stats.calls)
    }

    async fn look_after(&mut self, index: usize, say: &impl Fn(&str)) -> Result<(), TestnetError> {
        match self.health[index] {
            Health::Well => {}
            Health::Ill(trouble) => {
                if trouble.kind.is_silent()
                    && let Some(sent) = self.report(index).and_then(|report| report.stats.last_sent)
                {
                    let after = sent.saturating_duration_since(trouble.since);
                    self.noted.longest_in_routes = self.noted.longest_in_routes.max(after);
                }
                if Instant::now() >= trouble.until {
                    self.end(index, trouble, say).await?;
                }
            }
            Health::Returning { since, calls } => {
                let Some(report) = self.report(index) else { return Ok(()) };
                // A client that had forgotten it counts from nothing again.
                let called = report.stats.calls > 0
                    && report.stats.calls != calls
                    && report.stats.last_sent.is_some_and(|sent| sent > since);
                if called {
                    self.noted.returns.push(since.elapsed());
                }
                // One that is not needed may be connected and not be called.
                if called || (report.address.is_some() && since.elapsed() > SETTLED) {
                    self.health[index] = Health::Well;
                }
            }
        }
        Ok(())
    }

    /// Whether a volunteer may be taken away now: whatever it hosts must have another host that is well and quick.
    fn is_dispensable(&self, index: usize) -> bool {
        let usable = |other: usize| {
            other != index && Some(other) != self.slowed && matches!(self.health.get(other), Some(Health::Well))
        };
        matches!(self.health.get(index), Some(Health::Well)) && self.hosts.covered_by(usable)
    }

    async fn disturb(&mut self, say: &impl Fn(&str)) -> Result<bool, TestnetError> {
        let able: Vec<usize> =
            (0..self.health.len()).filter(|&i| Some(i) != self.slowed && self.is_dispensable(i)).collect();
        let Some(index) = self.schedule.pick(&able) else { return Ok(false) };
        let (kind, lasts) = self.schedule.trouble();
        say(&format!("volunteer {index}: {kind}"));
        let since = Instant::now();
        match kind {
            Kind::Kill | Kind::Restart => self.net.kill(index).await?,
            Kind::Hang => self.net.pause(index).await?,
            Kind::Deaf => self.net.cut(index, true, false)?,
            Kind::Mute => self.net.cut(index, false, true)?,
            Kind::Leave => self.net.leave(index).await?,
            Kind::Rest => self.net.rest(index).await?,
        }
        self.noted.tally.count(kind);
        self.noted.begun.push((since, index, kind));
        self.health[index] = Health::Ill(Trouble { kind, since, until: since + lasts });
        Ok(true)
    }

    async fn end(&mut self, index: usize, trouble: Trouble, say: &impl Fn(&str)) -> Result<(), TestnetError> {
        let calls = self.calls(index);
        match trouble.kind {
            Kind::Kill | Kind::Restart | Kind::Leave => self.net.restart(index).await?,
            Kind::Rest => self.net.wake(index).await?,
            Kind::Hang => self.net.resume(index).await?,
            Kind::Deaf | Kind::Mute => self.net.cut(index, false, false)?,
        }
        say(&format!("volunteer {index}: back"));
        self.health[index] = Health::Returning { since: Instant::now(), calls };
        Ok(())
    }

    async fn slow_one(&mut self, say: &impl Fn(&str)) -> Result<(), TestnetError> {
        let able: Vec<usize> = (0..self.health.len()).filter(|&i| self.is_dispensable(i)).collect();
        let Some(index) = self.schedule.pick(&able) else { return Ok(()) };
        say(&format!("volunteer {index}: {SLOWER} times slower from now on"));
        self.net.slow(index, SLOWER).await?;
        self.noted.tally.slowed += 1;
        self.slowed = Some(index);
        Ok(())
    }
}
