//! `hanse bench`: the price of distribution, one expert call, and memory, on loopback volunteers; or what drafts bring.

mod draft;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use futures::StreamExt;
use hanse_model::Routing;
use hanse_node::testnet::{Testnet, TestnetConfig, split};
use hanse_protocol::Identity;
use hanse_router::client::layout_of;
use hanse_router::stats::quantile_of;
use hanse_router::{Client, EngineConfig, ExpertLayout, GenerateRequest, ModelConfig, NetworkConfig, Usage};
use serde::Serialize;

use crate::cli::BenchArgs;
use crate::model::Folder;
use crate::output::say;
use crate::{output, paths};

/// Tokens of the prompt; any will do, since speed does not depend on them.
const PROMPT_TOKENS: u32 = 16;

#[derive(Serialize)]
struct Document {
    model: PathBuf,
    nodes: u16,
    wire: String,
    generate: GenerateReport,
    call: CallReport,
    memory: MemoryReport,
}

#[derive(Serialize)]
struct GenerateReport {
    /// Medians over the rounds.
    local_tokens_per_second: f64,
    network_tokens_per_second: f64,
    /// Median of the rounds' ratios, network over local.
    ratio: f64,
    local_step_ms: f64,
    network_step_ms: f64,
    /// The law of the design: MoE layers times the mean duration of a call, the trunk not counted.
    law_ms: f64,
    calls_per_layer: f64,
}

#[derive(Serialize)]
struct CallReport {
    calls: usize,
    p50_us: f64,
    p99_us: f64,
    /// Of which the peer computed.
    compute_p50_us: f64,
    compute_p99_us: f64,
}

#[derive(Serialize)]
struct MemoryReport {
    checkpoint_bytes: u64,
    trunk_bytes: u64,
    /// Peak resident set of a process that generated over the network.
    client_rss_bytes: u64,
    nodes: Vec<NodeMemory>,
}

#[derive(Serialize)]
struct NodeMemory {
    expert_bytes: u64,
    rss_bytes: u64,
}

pub(crate) async fn run(args: BenchArgs) -> anyhow::Result<()> {
    if let Some(round_trips) = &args.drafts {
        return draft::run(&args, round_trips).await;
    }
    let dir = args.model.clone().map_or_else(paths::bundled_model, Ok)?;
    let config = ModelConfig { dir: dir.clone(), threads: 0 };
    let folder = Folder::open(&dir)?;
    let (checkpoint, id) = (folder.checkpoint.clone(), folder.id());
    let layout = layout_of(checkpoint.spec());
    let specs = split(&layout, usize::from(args.nodes), 1);
    let bar = output::spinner("starting volunteers");
    let net = Testnet::start(TestnetConfig::new(std::env::current_exe()?, &dir, specs.clone()), |_| ()).await?;
    let bootstrap = net.bootstrap().context("no volunteer has an address")?.clone();
    let network = NetworkConfig { bootstrap: vec![bootstrap.clone()], wire: args.wire, ..NetworkConfig::default() };
    // The price of a step is measured, not how many are spared.
    let plain = EngineConfig { drafts: false, ..EngineConfig::default() };
    let client = Client::connect(&config, id, &Identity::generate(), network).await?.with_engine(plain);
    let local = {
        let config = config.clone();
        tokio::task::spawn_blocking(move || Client::local(&config)).await??.with_engine(plain)
    };

    // First, so that the peers' statistics are of these calls alone.
    bar.set_message("calling");
    let call = call(&args, &client, &layout).await?;
    bar.set_message("generating");
    let generate = generate(&args, &client, &local, &layout).await?;
    bar.set_message("weighing");
    let client_rss_bytes = client_memory(&args, &dir, &bootstrap.to_string()).await?;
    bar.finish_and_clear();

    let sizes = checkpoint.sizes();
    let bytes_of = |spec: &String| -> anyhow::Result<u64> {
        let experts =
            spec.parse::<hanse_node::ExpertsSpec>()?.resolve(&layout, checkpoint.spec().layers.len() as u32)?;
        Ok(experts.iter().map(|(layer, _)| sizes.bytes_per_expert[*layer as usize]).sum())
    };
    let mut nodes = Vec::new();
    for (node, spec) in net.nodes().iter().zip(&specs) {
        let pid = node.pid().context("a volunteer ended")?;
        let rss_bytes = resident(pid, "VmHWM:").context("cannot read a volunteer's memory")?;
        nodes.push(NodeMemory { expert_bytes: bytes_of(spec)?, rss_bytes });
    }
    client.close().await;
    net.stop().await;
    let memory = MemoryReport {
        checkpoint_bytes: sizes.trunk_bytes + sizes.expert_bytes,
        trunk_bytes: sizes.trunk_bytes,
        client_rss_bytes,
        nodes,
    };
    let document = Document { model: dir, nodes: args.nodes, wire: args.wire.to_string(), generate, call, memory };
    if args.json {
        return output::json(&document);
    }
    print_report(&document)
}

/// Local and network generations take turns, so that a machine that becomes slower meanwhile slows both.
async fn generate(
    args: &BenchArgs,
    client: &Client,
    local: &Client,
    layout: &ExpertLayout,
) -> anyhow::Result<GenerateReport> {
    let vocab = client.spec().vocab_size as u32;
    let prompt = (0..PROMPT_TOKENS).map(|i| (i * 37 + 1) % vocab).collect();
    let mut request = GenerateRequest::greedy(prompt, args.max_tokens);
    request.ignore_eos = true;
    let (mut here, mut there, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    // One round to warm up: connections, page cache, statistics of the peers.
    speed(local, &request).await?;
    speed(client, &request).await?;
    let calls_before: u64 = client.peers().iter().map(|report| report.stats.calls).sum();
    for _ in 0..args.rounds.max(1) {
        let (slow, fast) = (speed(client, &request).await?, speed(local, &request).await?);
        there.push(slow);
        here.push(fast);
        ratios.push(slow / fast);
    }
    let calls: u64 = client.peers().iter().map(|report| report.stats.calls).sum::<u64>() - calls_before;
    // A generation of n tokens is one pass for the prompt and n - 1 steps.
    let passes = args.rounds.max(1) * args.max_tokens * layout.layers.len();
    let reports = client.peers();
    let mean = reports.iter().map(|report| report.stats.mean().as_secs_f64() * 1e3).sum::<f64>() / reports.len() as f64;
    let (local_speed, network_speed) = (quantile_of(here, 0.5), quantile_of(there, 0.5));
    Ok(GenerateReport {
        local_tokens_per_second: local_speed,
        network_tokens_per_second: network_speed,
        ratio: quantile_of(ratios, 0.5),
        local_step_ms: 1e3 / local_speed,
        network_step_ms: 1e3 / network_speed,
        law_ms: mean * layout.layers.len() as f64,
        calls_per_layer: calls as f64 / passes as f64,
    })
}

async fn speed(client: &Client, request: &GenerateRequest) -> anyhow::Result<f64> {
    let mut generation = client.generate(request.clone());
    while let Some(token) = generation.next().await {
        token?;
    }
    let summary = generation.summary().context("the generation ended without a word")?;
    if summary.timings.decode_tokens == 0 {
        bail!("nothing to time: give --max-tokens 2 or more");
    }
    Ok(summary.timings.tokens_per_second())
}

/// Calls of one row to one expert, one at a time.
async fn call(args: &BenchArgs, client: &Client, layout: &ExpertLayout) -> anyhow::Result<CallReport> {
    let network = client.network().context("not on a network")?;
    let (&layer, _) = layout.layers.first_key_value().context("the model has no experts")?;
    let hidden: Vec<f32> = (0..layout.hidden_size).map(|i| (i % 7) as f32 * 0.1 - 0.3).collect();
    let routing = Routing { top_k: 1, experts: vec![0], weights: vec![1.0] };
    let mut usage = Usage::default();
    let mut times = Vec::with_capacity(args.calls);
    for _ in 0..args.calls.max(1) {
        let started = Instant::now();
        network.forward(layer, &hidden, &routing, &mut usage).await?;
        times.push(started.elapsed());
    }
    // Expert 0 is hosted by one peer alone, which was asked for nothing else yet.
    let asked = client.peers().into_iter().find(|report| report.advert.hosted.contains(layer, 0));
    let stats = asked.context("nobody hosts expert 0")?.stats;
    let micros = |duration: Duration| duration.as_secs_f64() * 1e6;
    Ok(CallReport {
        calls: times.len(),
        p50_us: micros(quantile_of(times.clone(), 0.5)),
        p99_us: micros(quantile_of(times, 0.99)),
        compute_p50_us: micros(stats.compute_quantile(0.5)),
        compute_p99_us: micros(stats.compute_quantile(0.99)),
    })
}

/// Peak resident set of `hanse generate` on this network, in bytes.
async fn client_memory(args: &BenchArgs, dir: &Path, bootstrap: &str) -> anyhow::Result<u64> {
    let mut command = tokio::process::Command::new(std::env::current_exe()?);
    command.arg("generate").arg("--model").arg(dir).args(["--bootstrap", bootstrap, "--ignore-eos", "--json"]);
    command.args(["--prompt-ids", "1,2,3", "--wire", &args.wire.to_string()]);
    command.args(["--max-tokens", &args.max_tokens.to_string()]);
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn().context("cannot start a client")?;
    let pid = child.id().context("the client ended at once")?;
    let mut peak = 0;
    loop {
        peak = peak.max(resident(pid, "VmHWM:").unwrap_or(0));
        tokio::select! {
            status = child.wait() => {
                if !status?.success() {
                    bail!("a client that generated over the network failed");
                }
                return Ok(peak);
            }
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
    }
}

/// A line of `/proc/PID/status` that is given in kB, in bytes; `None` where there is no such file.
fn resident(pid: u32, line: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let value = status.lines().find_map(|l| l.strip_prefix(line))?;
    Some(value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

fn print_report(document: &Document) -> anyhow::Result<()> {
    let Document { generate, call, memory, .. } = document;
    say!("{}, {} volunteers on loopback, {} on the wire\n", document.model.display(), document.nodes, document.wire);
    say!("generate   local {:.1} tokens/s ({:.2} ms a step)", generate.local_tokens_per_second, generate.local_step_ms);
    say!(
        "           network {:.1} tokens/s ({:.2} ms a step)",
        generate.network_tokens_per_second,
        generate.network_step_ms
    );
    say!("           network / local {:.3}, median of pairs", generate.ratio);
    say!(
        "           the law: MoE layers x mean call = {:.2} ms a step; {:.2} calls a layer",
        generate.law_ms,
        generate.calls_per_layer
    );
    say!("call       1 row, 1 expert, {} calls: p50 {:.0} us, p99 {:.0} us", call.calls, call.p50_us, call.p99_us);
    say!("           of which computing: p50 {:.0} us, p99 {:.0} us", call.compute_p50_us, call.compute_p99_us);
    let trunk = output::bytes(memory.trunk_bytes);
    say!("memory     checkpoint {}, trunk {trunk}", output::bytes(memory.checkpoint_bytes));
    say!("           client {} at most", output::bytes(memory.client_rss_bytes));
    for node in &memory.nodes {
        say!("           node {} at most, experts {}", output::bytes(node.rss_bytes), output::bytes(node.expert_bytes));
    }
    Ok(())
}
