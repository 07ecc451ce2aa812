//! `hanse bench`: what distribution costs, on loopback volunteers, and what this machine could do at best.
//!
//! One file for each part; `--part` chooses. What drafts bring (`--drafts`) and how cost grows (`--curves`) is measured on networks of their
//! own.

mod batch;
mod call;
mod crowd;
mod curves;
mod draft;
mod experts;
mod floor;
mod generate;
mod limits;
mod memory;
mod trunk;
mod wire;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use hanse_node::testnet::{Shape, Testnet, TestnetConfig, split};
use hanse_protocol::Identity;
use hanse_router::client::layout_of;
use hanse_router::stats::quantile_of;
use hanse_router::{Client, EngineConfig, ModelConfig, NetworkConfig};
use serde::Serialize;

use crate::cli::{BenchArgs, BenchPart};
use crate::model::Folder;
use crate::output::say;
use crate::{output, paths};

#[derive(Serialize)]
struct Document {
    model: PathBuf,
    nodes: u16,
    wire: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<limits::Report>,
    #[serde(rename = "dtypes", skip_serializing_if = "Option::is_none")]
    codecs: Option<wire::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    experts: Option<experts::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trunk: Option<trunk::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    call: Option<call::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    floor: Option<floor::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    crowd: Option<crowd::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    generate: Option<generate::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    batch: Option<batch::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<memory::Report>,
}

/// The middle and the tail of what was timed, in microseconds.
#[derive(Serialize, Clone, Copy)]
struct Micros {
    p50: f64,
    p99: f64,
}

impl Micros {
    fn of(times: &[Duration]) -> Self {
        let micros = |quantile| quantile_of(times.to_vec(), quantile).as_secs_f64() * 1e6;
        Self { p50: micros(0.5), p99: micros(0.99) }
    }
}

impl std::fmt::Display for Micros {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "p50 {:.1} us, p99 {:.1} us", self.p50, self.p99)
    }
}

pub(crate) async fn run(args: BenchArgs) -> anyhow::Result<()> {
    if let Some(round_trips) = &args.drafts {
        return draft::run(&args, round_trips).await;
    }
    if let Some(dir) = &args.curves {
        return curves::run(&args, dir).await;
    }
    let wanted = |part| args.part.contains(&part);
    let dir = args.model.clone().map_or_else(paths::bundled_model, Ok)?;
    let bar = output::spinner("measuring the machine");
    let limits = if wanted(BenchPart::Limits) { Some(tokio::task::spawn_blocking(limits::run).await??) } else { None };
    let codecs = if wanted(BenchPart::Wire) { Some(tokio::task::spawn_blocking(wire::run).await??) } else { None };
    let experts = if wanted(BenchPart::Experts) {
        bar.set_message("computing experts");
        let dir = dir.clone();
        Some(tokio::task::spawn_blocking(move || experts::run(&dir)).await??)
    } else {
        None
    };
    let trunk = if wanted(BenchPart::Trunk) {
        bar.set_message("computing the trunk");
        let dir = dir.clone();
        let device = args.device.clone();
        Some(tokio::task::spawn_blocking(move || trunk::run(&dir, &device)).await??)
    } else {
        None
    };
    let mut document = Document {
        model: dir.clone(),
        nodes: args.nodes,
        wire: args.wire.to_string(),
        limits,
        codecs,
        experts,
        trunk,
        call: None,
        floor: None,
        crowd: None,
        generate: None,
        batch: None,
        memory: None,
    };
    if args.part.iter().any(|part| part.needs_network()) {
        let config = ModelConfig { dir: dir.clone(), threads: 0 };
        let folder = Folder::open(&dir)?;
        let (checkpoint, id) = (folder.checkpoint.clone(), folder.id());
        let layout = layout_of(checkpoint.spec());
        let specs = split(&layout, usize::from(args.nodes), 1);
        bar.set_message("starting volunteers");
        let shape = (!args.rtt.is_zero()).then(|| Shape::path(args.rtt, Duration::ZERO, 0.0));
        let testnet = TestnetConfig { shape, ..TestnetConfig::new(std::env::current_exe()?, &dir, specs) };
        let net = Testnet::start(testnet, |_| ()).await?;
        let bootstrap = net.bootstrap().context("no volunteer has an address")?.clone();
        let network = NetworkConfig { bootstrap: vec![bootstrap], wire: args.wire, ..NetworkConfig::default() };
        // The price of a step is measured, not how many are spared.
        let plain = EngineConfig { drafts: false, ..EngineConfig::default() };
        let client = Client::connect(&config, id, &Identity::generate(), network).await?.with_engine(plain);
        // First, so that the peers' statistics are of these calls alone.
        if wanted(BenchPart::Call) {
            bar.set_message("calling");
            document.call = Some(call::run(args.calls, &client, &layout).await?);
        }
        if wanted(BenchPart::Floor) {
            bar.set_message("calling and echoing");
            document.floor = Some(floor::run(args.calls, args.wire, &client, &layout).await?);
        }
        if wanted(BenchPart::Crowd) {
            bar.set_message("crowding");
            document.crowd = Some(crowd::run(&args, id, &layout, &net).await?);
        }
        if wanted(BenchPart::Generate) || wanted(BenchPart::Batch) {
            bar.set_message("generating");
            let local = tokio::task::spawn_blocking(move || Client::local(&config)).await??.with_engine(plain);
            if wanted(BenchPart::Generate) {
                document.generate = Some(generate::run(&args, &client, &local, &layout).await?);
            }
            if wanted(BenchPart::Batch) {
                document.batch = Some(batch::run(&args, &client, &local).await?);
            }
        }
        if wanted(BenchPart::Memory) {
            bar.set_message("weighing");
            document.memory = Some(memory::run(&args, &dir, &checkpoint, &layout, &net).await?);
        }
        client.close().await;
        net.stop().await;
    }
    bar.finish_and_clear();
    if args.json { output::json(&document) } else { print_report(&document) }
}

fn print_report(document: &Document) -> anyhow::Result<()> {
    say!("{}, {} volunteers on loopback, {} on the wire\n", document.model.display(), document.nodes, document.wire);
    document.limits.as_ref().map_or(Ok(()), limits::Report::print)?;
    document.codecs.as_ref().map_or(Ok(()), wire::Report::print)?;
    document.experts.as_ref().map_or(Ok(()), experts::Report::print)?;
    document.trunk.as_ref().map_or(Ok(()), trunk::Report::print)?;
    document.call.as_ref().map_or(Ok(()), call::Report::print)?;
    document.floor.as_ref().map_or(Ok(()), floor::Report::print)?;
    document.crowd.as_ref().map_or(Ok(()), crowd::Report::print)?;
    document.generate.as_ref().map_or(Ok(()), generate::Report::print)?;
    document.batch.as_ref().map_or(Ok(()), batch::Report::print)?;
    document.memory.as_ref().map_or(Ok(()), memory::Report::print)
}
