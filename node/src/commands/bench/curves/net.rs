//! Networks of volunteer processes behind shapers, and what is asked of them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures::StreamExt;
use hanse_model::{Checkpoint, LocalExperts, Trunk, compute_pool};
use hanse_node::ExpertsSpec;
use hanse_node::testnet::{Shape, Testnet, TestnetConfig};
use hanse_protocol::{Identity, ModelId, WireDtype};
use hanse_router::client::layout_of;
use hanse_router::stats::quantile_of;
use hanse_router::{
    Client, EngineConfig, ExpertLayout, GenerateRequest, NetworkConfig, NetworkUse, PassTrace, RemoteExperts, Summary,
};
use indicatif::ProgressBar;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::curve::Parts;
use super::law;
use super::record::{self, Pass};
use crate::cli::BenchArgs;
use crate::model::Folder;
use crate::{output, paths};

/// How long volunteers may take to be found.
const PATIENCE: Duration = Duration::from_secs(30);
/// Tokens after a path has changed that are not timed: QUIC's idea of the round trip and what is known of the peers follow.
const WARM_UP: usize = 4;
/// About how long a point is measured in each round.
const POINT: Duration = Duration::from_millis(1200);
/// The least tokens that a point is measured with.
const LEAST_TOKENS: usize = 6;

/// For how long a layer waits at least, about: a call on loopback.
const PAUSE: Duration = Duration::from_micros(250);
/// Decode steps in which the trunk is timed with such pauses.
const WAITING_PASSES: usize = 16;
/// Times the tokens that were asked for, where they come fast.
const FAST: usize = 4;
/// Below which they do.
const FAST_STEP_MS: f64 = 5.0;

/// What all curves need.
pub(super) struct Setup {
    pub(super) dir: std::path::PathBuf,
    pub(super) checkpoint: Checkpoint,
    pub(super) layout: ExpertLayout,
    pub(super) rounds: usize,
    pub(super) max_tokens: usize,
    pub(super) nodes: usize,
    pub(super) bar: ProgressBar,
    /// Generates in this process.
    pub(super) local: Client,
    id: ModelId,
    trunk: Arc<Trunk>,
    experts: Arc<LocalExperts>,
}

/// The price of a step is measured, not how many are spared.
const PLAIN: fn() -> EngineConfig = || EngineConfig { drafts: false, groups: false, ..EngineConfig::default() };

impl Setup {
    pub(super) fn new(args: &BenchArgs) -> anyhow::Result<Self> {
        let dir = args.model.clone().map_or_else(paths::bundled_model, Ok)?;
        let folder = Folder::open(&dir)?;
        let (checkpoint, id) = (folder.checkpoint.clone(), folder.id());
        let pool = Arc::new(compute_pool(0)?);
        Ok(Self {
            layout: layout_of(checkpoint.spec()),
            rounds: args.rounds.max(1),
            max_tokens: args.max_tokens.max(2),
            nodes: usize::from(args.nodes),
            bar: output::spinner("loading the model"),
            local: Client::local_with(&checkpoint, 0)?.with_engine(PLAIN()),
            trunk: Arc::new(Trunk::load(&checkpoint, pool.clone())?),
            experts: Arc::new(LocalExperts::load(&checkpoint, pool)?),
            dir,
            checkpoint,
            id,
        })
    }

    /// MoE layers.
    pub(super) fn layers(&self) -> usize {
        self.layout.layers.len()
    }

    /// The most tokens of a sequence.
    pub(super) fn context(&self) -> usize {
        self.checkpoint.spec().max_positions
    }

    /// Bytes of keys and values of a token.
    pub(super) fn position_bytes(&self) -> usize {
        self.trunk.new_cache().bytes_per_position()
    }

    /// A prompt unlike that of any other `number` below the vocabulary's size.
    pub(super) fn prompt(&self, number: usize, tokens: usize) -> Vec<u32> {
        let vocab = self.checkpoint.spec().vocab_size;
        (0..tokens).map(|i| ((number * 13 + i * 37 + 1) % vocab) as u32).collect()
    }

    /// Tokens to measure a point with, if a step takes so long.
    pub(super) fn tokens_for(&self, step_ms: f64) -> usize {
        let tokens = (POINT.as_secs_f64() * 1e3 / step_ms.max(0.1)) as usize;
        // Quick ones cost little, and a pass is written down now and then only.
        let most = if step_ms < FAST_STEP_MS { FAST * self.max_tokens } else { self.max_tokens };
        tokens.clamp(LEAST_TOKENS.min(most), most).min(self.context() / 2)
    }

    /// The passes of decoding all of `prompts` together.
    pub(super) async fn record_decoding(
        &self,
        prompts: Vec<Vec<u32>>,
        passes: usize,
    ) -> anyhow::Result<Arc<Vec<Pass>>> {
        let (trunk, experts) = (self.trunk.clone(), self.experts.clone());
        let recording = move || record::decoding(&trunk, &experts, &prompts, passes);
        Ok(Arc::new(tokio::task::spawn_blocking(recording).await??))
    }

    /// The pass over each of `prompts`.
    pub(super) async fn record_prompts(&self, prompts: Vec<Vec<u32>>) -> anyhow::Result<Arc<Vec<Pass>>> {
        let (trunk, experts) = (self.trunk.clone(), self.experts.clone());
        let recording = move || record::prompts(&trunk, &experts, &prompts);
        Ok(Arc::new(tokio::task::spawn_blocking(recording).await??))
    }

    /// A decode step of all of `prompts` in this process without its experts, in milliseconds; and what the trunk takes more because it
    /// waits in each layer, which is measured in this process, too.
    pub(super) async fn trunk_ms(
        &self,
        prompts: Vec<Vec<u32>>,
        tokens: usize,
        passes: &Arc<Vec<Pass>>,
    ) -> anyhow::Result<f64> {
        let step_ms = decode(&self.local, prompts.clone(), tokens).await?.step_ms;
        let (trunk, experts) = (self.trunk.clone(), self.experts.clone());
        let waiting = move || {
            let taken = |pause| record::trunk_ms(&trunk, &experts, &prompts, WAITING_PASSES, pause);
            anyhow::Ok(taken(PAUSE)? - taken(Duration::ZERO)?)
        };
        let more_ms = tokio::task::spawn_blocking(waiting).await??.max(0.0);
        Ok((step_ms - self.experts_ms(passes).await?).max(0.0) + more_ms)
    }

    /// What the experts of a pass take in this process, in milliseconds.
    pub(super) async fn experts_ms(&self, passes: &Arc<Vec<Pass>>) -> anyhow::Result<f64> {
        let (mut experts, passes) = (self.experts.clone(), passes.clone());
        let times = tokio::task::spawn_blocking(move || record::replay(&mut experts, &passes)).await??;
        Ok(record::median_ms(&times))
    }

    /// The same, of each pass.
    pub(super) async fn each_experts_ms(&self, passes: &Arc<Vec<Pass>>) -> anyhow::Result<Vec<f64>> {
        let (mut experts, passes) = (self.experts.clone(), passes.clone());
        let times = tokio::task::spawn_blocking(move || record::replay(&mut experts, &passes)).await??;
        Ok(times.iter().map(|times| record::median_ms(std::slice::from_ref(times))).collect())
    }
}

/// Volunteers whose paths can be changed, and a client.
pub(super) struct Net {
    pub(super) testnet: Testnet,
    pub(super) client: Client,
    /// The (layer, expert) pairs of each volunteer.
    pub(super) hosts: Vec<BTreeSet<(u32, u32)>>,
}

impl Net {
    /// One volunteer per spec of experts, behind paths without delay and loss at first.
    pub(super) async fn start(setup: &Setup, specs: Vec<String>, wire: WireDtype) -> anyhow::Result<Self> {
        Self::behind(setup, specs, wire, Some(Shape::default())).await
    }

    /// The same behind nothing at all: paths cannot be changed.
    pub(super) async fn bare(setup: &Setup, specs: Vec<String>, wire: WireDtype) -> anyhow::Result<Self> {
        Self::behind(setup, specs, wire, None).await
    }

    async fn behind(setup: &Setup, specs: Vec<String>, wire: WireDtype, shape: Option<Shape>) -> anyhow::Result<Self> {
        setup.bar.set_message(format!("starting {}", output::count(specs.len(), "volunteer")));
        let layers = setup.checkpoint.spec().layers.len() as u32;
        let resolve = |spec: &String| {
            let experts = spec.parse::<ExpertsSpec>()?.resolve(&setup.layout, layers)?;
            anyhow::Ok(experts.into_iter().collect())
        };
        let hosts = specs.iter().map(resolve).collect::<anyhow::Result<Vec<BTreeSet<_>>>>()?;
        let config = TestnetConfig { shape, ..TestnetConfig::new(std::env::current_exe()?, &setup.dir, specs) };
        let testnet = Testnet::start(config, |_| ()).await?;
        let client = Self::join(setup, &testnet, wire).await?;
        Ok(Self { testnet, client, hosts })
    }

    /// Another client, connected to all volunteers.
    pub(super) async fn join(setup: &Setup, testnet: &Testnet, wire: WireDtype) -> anyhow::Result<Client> {
        let bootstrap = testnet.bootstrap().context("no volunteer has an address")?.clone();
        let network = NetworkConfig { bootstrap: vec![bootstrap], wire, ..NetworkConfig::default() };
        let client = Client::connect_with(&setup.checkpoint, 0, setup.id, &Identity::generate(), network).await?;
        let nodes = testnet.nodes().len();
        let connected = client.network().context("not on a network")?.wait_for_peers(nodes, PATIENCE).await;
        if connected < nodes {
            bail!("only {connected} of {nodes} volunteers could be reached");
        }
        Ok(client.with_engine(PLAIN()))
    }

    /// Gives every path this round trip and loss, and generates a little over them.
    pub(super) async fn path(&mut self, setup: &Setup, round_trip_ms: f64, loss: f64) -> anyhow::Result<()> {
        let shape = Shape::path(Duration::from_secs_f64(round_trip_ms / 1e3), Duration::ZERO, loss);
        for index in 0..self.testnet.nodes().len() {
            self.testnet.shape(index, shape, shape)?;
        }
        decode(&self.client, vec![setup.prompt(0, PROMPT)], WARM_UP).await?;
        Ok(())
    }

    /// Has the network answer recorded passes; what each layer of each pass took.
    pub(super) async fn replay(&self, passes: &Arc<Vec<Pass>>) -> anyhow::Result<Vec<Vec<Duration>>> {
        let network = self.client.network().context("not on a network")?.clone();
        let (runtime, passes) = (tokio::runtime::Handle::current(), passes.clone());
        let mut experts = RemoteExperts::new(network, runtime, CancellationToken::new());
        tokio::task::spawn_blocking(move || record::replay(&mut experts, &passes)).await?
    }

    /// How the rows' experts are shared out in each layer of each pass of one row: how many each peer is asked for that is asked.
    pub(super) fn shares(&self, passes: &[Pass]) -> Vec<Vec<Vec<usize>>> {
        let layer = |call: &record::LayerCall| law::split(call.layer as u32, &call.routing.experts, &self.hosts);
        passes.iter().map(|pass| pass.iter().map(layer).collect()).collect()
    }

    /// Bytes in all datagrams that came through the shapers so far, both ways.
    pub(super) fn datagram_bytes(&self) -> u64 {
        let shapers = self.testnet.nodes().iter().filter_map(|node| node.shaper());
        shapers.map(|shaper| shaper.counts()).map(|(to, from)| to.passed_bytes + from.passed_bytes).sum()
    }

    pub(super) async fn stop(self) {
        self.client.close().await;
        self.testnet.stop().await;
    }
}

/// Tokens of most prompts.
pub(super) const PROMPT: usize = 16;

/// What generations did that advanced together.
#[derive(Debug)]
pub(super) struct Decoded {
    /// A decode step of all of them, in milliseconds: the median, so that what else the machine does counts less.
    pub(super) step_ms: f64,
    /// Tokens of all of them in a second, if each step took as long as that one.
    pub(super) tokens_per_second: f64,
    /// Tokens of all of them in a second, as they came.
    pub(super) mean_tokens_per_second: f64,
    /// Until the first prompt's last logits.
    pub(super) prefill_ms: f64,
    /// Bytes of hidden states and assignments in the first one's decode steps, by step.
    pub(super) counted_bytes: f64,
    /// What the calls of all layers took in a late decode step, in milliseconds, if one was written down.
    traced_ms: Option<f64>,
}

impl Decoded {
    /// Where the time of a step went, beside what the law says.
    pub(super) fn parts(&self, trunk_ms: f64, calls_ms: f64) -> Option<Parts> {
        let calls = self.traced_ms?;
        Some(Parts { calls, calls_law: calls_ms, rest: (self.step_ms - calls).max(0.0), rest_law: trunk_ms })
    }
}

/// Generates `tokens` tokens after each prompt, and times the steps in which all of them decode.
pub(super) async fn decode(client: &Client, prompts: Vec<Vec<u32>>, tokens: usize) -> anyhow::Result<Decoded> {
    let (count, began) = (prompts.len(), Instant::now());
    let running = prompts.into_iter().map(|prompt| {
        let request = GenerateRequest { ignore_eos: true, ..GenerateRequest::greedy(prompt, tokens) };
        let mut generation = client.generate(request);
        async move {
            let (mut times, mut uses) = (Vec::new(), Vec::new());
            while let Some(token) = generation.next().await {
                token?;
                times.push(Instant::now());
                uses.extend(generation.progress().map(|progress| progress.network.clone()));
            }
            let summary = generation.summary().context("the generation ended without a word")?.clone();
            anyhow::Ok((times, uses, summary))
        }
    });
    let ended: Vec<(Vec<Instant>, Vec<NetworkUse>, Summary)> = futures::future::try_join_all(running).await?;
    let first = ended.iter().filter_map(|(times, ..)| times.first()).max().context("no token")?;
    let last = ended.iter().filter_map(|(times, ..)| times.last()).min().context("no token")?;
    let is_between = |time: &&Instant| *time >= first && *time <= last;
    let between = ended.iter().flat_map(|(times, ..)| times).filter(|time| is_between(time) && *time > first).count();
    let seconds = last.saturating_duration_since(*first).as_secs_f64();
    // All of them get a token in each step.
    let own: Vec<&Instant> = ended.iter().take(1).flat_map(|(times, ..)| times.iter().filter(is_between)).collect();
    let steps = own.windows(2).map(|pair| pair[1].saturating_duration_since(*pair[0]).as_secs_f64() * 1e3).collect();
    let step_ms = quantile_of(steps, 0.5);
    if between == 0 || seconds == 0.0 || step_ms == 0.0 {
        bail!("nothing to time: give more --max-tokens");
    }
    let (_, uses, summary) = ended.first().context("no generation")?;
    let bytes = |used: &NetworkUse| (used.bytes_sent + used.bytes_received) as f64;
    let counted = uses.last().map_or(0.0, bytes) - uses.first().map_or(0.0, bytes);
    let trace = client.network().and_then(|network| network.latest_trace());
    // One of these steps, not of a prompt or of what was before.
    let trace = trace.filter(|(age, trace)| *age < began.elapsed() && trace.rows == count);
    let calls = |trace: &PassTrace| trace.layers.iter().map(|layer| layer.duration.as_secs_f64() * 1e3).sum();
    Ok(Decoded {
        step_ms,
        tokens_per_second: count as f64 * 1e3 / step_ms,
        mean_tokens_per_second: between as f64 / seconds,
        prefill_ms: summary.timings.prefill.as_secs_f64() * 1e3,
        counted_bytes: counted / (uses.len().max(2) - 1) as f64,
        traced_ms: trace.map(|(_, trace)| calls(&trace)),
    })
}
