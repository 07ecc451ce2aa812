//! `hanse demo`: a small network on this machine, and proof that it computes what one process computes.

use std::time::Duration;

use anyhow::{Context as _, bail};
use futures::StreamExt;
use hanse_node::testnet::{Node, Testnet, TestnetConfig, split};
use hanse_protocol::{Identity, PeerId};
use hanse_router::client::layout_of;
use hanse_router::{Client, GenerateRequest, Generation, ModelConfig, NetworkConfig, PeerReport};
use serde::Serialize;

use super::generate::show;
use crate::cli::DemoArgs;
use crate::model::Folder;
use crate::output::say;
use crate::signals::told_to_end;
use crate::{output, paths};

const DEFAULT_PROMPT: &str = "Once upon a time, there was a little fox named Pip.";

/// How long the demo waits for the volunteers that are not needed to cover every expert.
const FIND_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Serialize)]
struct Document {
    prompt: String,
    text: String,
    tokens: Vec<u32>,
    local_tokens: Vec<u32>,
    identical: bool,
    tokens_per_second: f64,
    killed: Option<String>,
    peers: Vec<PeerRow>,
}

#[derive(Serialize)]
struct PeerRow {
    peer_id: String,
    experts: usize,
    calls: u64,
    rows: u64,
    mean_ms: f64,
    p99_ms: f64,
    alive: bool,
}

pub(crate) async fn run(args: DemoArgs) -> anyhow::Result<()> {
    if args.replicas >= args.nodes {
        crate::cli::usage_error(
            "--replicas must be smaller than --nodes, or every volunteer would hold the whole model",
        );
    }
    if args.kill && args.replicas < 2 {
        crate::cli::usage_error("--kill needs --replicas 2 or more: with one replica the killed experts are gone");
    }
    let ended = told_to_end()?;
    // Dropping the demo's future ends its volunteers.
    tokio::select! {
        outcome = demo(args) => outcome,
        why = ended => bail!("{why}"),
    }
}

async fn demo(args: DemoArgs) -> anyhow::Result<()> {
    let dir = args.model.clone().map_or_else(paths::bundled_model, Ok)?;
    let tell = |line: String| -> anyhow::Result<()> {
        if !args.json {
            say!("{line}");
        }
        Ok(())
    };
    let config = ModelConfig { dir: dir.clone(), threads: 1 };
    let opening = {
        let (dir, config) = (dir.clone(), config.clone());
        move || -> anyhow::Result<_> {
            let folder = Folder::open(&dir)?;
            let (checkpoint, id) = (folder.checkpoint.clone(), folder.id());
            Ok((layout_of(checkpoint.spec()), checkpoint.spec().family, id, Client::local(&config)?))
        }
    };
    let (layout, family, id, local) = tokio::task::spawn_blocking(opening).await??;
    let total: u32 = layout.layers.values().sum();
    let nodes = usize::from(args.nodes);
    tell(format!("{}: {family}, {} MoE layers, {total} experts", dir.display(), layout.layers.len()))?;

    let tokenizer = local.tokenizer().context("the model folder has no tokenizer.json")?.clone();
    let bar = output::count_bar("starting volunteers");
    bar.set_length(nodes as u64);
    let specs = split(&layout, nodes, usize::from(args.replicas));
    let mut net = Testnet::start(TestnetConfig::new(std::env::current_exe()?, &dir, specs), |running| {
        bar.set_position(running as u64)
    })
    .await?;
    bar.finish_and_clear();
    tell(format!(
        "started {nodes} volunteer processes; each expert has {} replicas, nobody has the whole model",
        args.replicas
    ))?;

    let network = NetworkConfig {
        bootstrap: vec![net.bootstrap().context("no volunteer has an address")?.clone()],
        ..NetworkConfig::default()
    };
    let client = Client::connect(&config, id, &Identity::generate(), network).await?;
    let joined = client.network().context("not on a network")?;
    let found = joined.wait_for_peers(nodes, FIND_TIMEOUT).await;
    tell(format!("found {found} peers through the DHT, starting from one address\n"))?;

    let prompt = args.prompt.clone().unwrap_or_else(|| DEFAULT_PROMPT.to_owned());
    let request = GenerateRequest::greedy(tokenizer.encode(&prompt, true)?, args.max_tokens);
    if !args.json {
        show(&prompt)?;
    }
    let run = stream(&args, &client, client.generate(request.clone()), &mut net).await?;
    let reference = local.generate(request).collect::<Vec<_>>().await;
    let local_tokens = reference.into_iter().map(|token| token.map(|t| t.id)).collect::<Result<Vec<u32>, _>>()?;

    let identical = run.tokens == local_tokens;
    let peers = rows(&mut net, &client.peers());
    client.close().await;
    net.stop().await;
    let document = Document {
        prompt,
        text: run.text,
        tokens: run.tokens,
        local_tokens,
        identical,
        tokens_per_second: run.tokens_per_second,
        killed: run.killed.map(|peer| peer.to_string()),
        peers,
    };
    if args.json {
        output::json(&document)?;
    } else {
        print_report(&document)?;
    }
    if !identical {
        bail!("the network's tokens differ from those computed locally");
    }
    Ok(())
}

struct Run {
    tokens: Vec<u32>,
    text: String,
    tokens_per_second: f64,
    killed: Option<PeerId>,
}

/// Streams the answer; with `--kill` a third of the way through it kills the volunteer that has done most so far.
async fn stream(
    args: &DemoArgs,
    client: &Client,
    mut generation: Generation,
    net: &mut Testnet,
) -> anyhow::Result<Run> {
    let (mut tokens, mut text, mut killed) = (Vec::new(), String::new(), None);
    while let Some(token) = generation.next().await {
        let token = token?;
        tokens.push(token.id);
        text.push_str(&token.text);
        if !args.json {
            show(&token.text)?;
        }
        if args.kill && killed.is_none() && tokens.len() * 3 >= args.max_tokens {
            killed = Some(kill_busiest(client, net).await?);
        }
    }
    let summary = generation.summary().context("the generation ended without a word")?;
    text.push_str(&summary.rest);
    if !args.json {
        show(&summary.rest)?;
        say!("\n");
    }
    if args.kill && killed.is_none() {
        bail!("the answer was over before a volunteer could be killed: give a larger --max-tokens");
    }
    Ok(Run { tokens, text, tokens_per_second: summary.timings.tokens_per_second(), killed })
}

async fn kill_busiest(client: &Client, net: &mut Testnet) -> anyhow::Result<PeerId> {
    let busiest = client.peers().into_iter().max_by_key(|report| report.stats.calls).context("no peer is known")?;
    let node = net.nodes().iter().find(|node| node.peer_id() == busiest.peer);
    let index = node.context("the busiest peer is not one of the volunteers started here")?.index();
    net.kill(index).await?;
    Ok(busiest.peer)
}

/// One row per volunteer that was started, also for one that is gone from the client's list.
fn rows(net: &mut Testnet, reports: &[PeerReport]) -> Vec<PeerRow> {
    let row = |node: &mut Node| {
        let stats = reports.iter().find(|r| r.peer == node.peer_id()).map(|r| r.stats.clone()).unwrap_or_default();
        PeerRow {
            peer_id: node.peer_id().to_string(),
            experts: node.experts(),
            calls: stats.calls,
            rows: stats.rows,
            mean_ms: stats.mean().as_secs_f64() * 1e3,
            p99_ms: stats.quantile(0.99).as_secs_f64() * 1e3,
            alive: node.is_alive(),
        }
    };
    net.nodes_mut().iter_mut().map(row).collect()
}

fn print_report(document: &Document) -> anyhow::Result<()> {
    let mut table = output::table(&["peer id", "experts", "calls", "rows", "mean ms", "p99 ms", ""]);
    for peer in &document.peers {
        table.add_row([
            peer.peer_id.clone(),
            peer.experts.to_string(),
            peer.calls.to_string(),
            peer.rows.to_string(),
            format!("{:.2}", peer.mean_ms),
            format!("{:.2}", peer.p99_ms),
            if peer.alive { String::new() } else { "killed".to_owned() },
        ]);
    }
    say!("{table}\n");
    let verdict = if document.identical { "identical to" } else { "DIFFERENT FROM" };
    let (count, speed) = (document.tokens.len(), document.tokens_per_second);
    say!("{count} tokens, {speed:.1} tokens/s over the network: {verdict} the same model computed in one process");
    Ok(())
}
