//! `hanse testnet`: a network of volunteer processes on this machine, and trouble for it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use hanse_node::testnet::chaos::{self, ChaosConfig, ChaosReport, Quantiles};
use hanse_node::testnet::control::{self, Asked, Control, Order};
use hanse_node::testnet::{Shape, State, Testnet, TestnetConfig, split, split_unequally, weights};
use hanse_protocol::ModelId;
use hanse_router::ExpertLayout;
use hanse_router::client::layout_of;
use rand::seq::IndexedRandom;
use serde::Serialize;
use tokio::time::Instant;

use crate::cli::{ChaosArgs, OrderArgs, TestnetCommand, UpArgs};
use crate::model::Folder;
use crate::signals::told_to_end;
use crate::{output, paths};

/// A volunteer that `--kill-every` killed is started again after this part of the interval.
const AWAY: f64 = 0.5;

#[derive(Serialize)]
struct Up {
    model: PathBuf,
    model_id: String,
    state: PathBuf,
    #[serde(flatten)]
    status: control::StatusDocument,
}

pub(crate) async fn run(command: TestnetCommand) -> anyhow::Result<()> {
    match command {
        TestnetCommand::Up(args) => up(args).await,
        TestnetCommand::Chaos(args) => run_chaos(args).await,
        TestnetCommand::Status(args) => status(args).await,
        TestnetCommand::Kill(node) => order(&node.order, Order::Kill { node: node.node }).await,
        TestnetCommand::Pause(node) => order(&node.order, Order::Pause { node: node.node }).await,
        TestnetCommand::Resume(node) => order(&node.order, Order::Resume { node: node.node }).await,
        TestnetCommand::Restart(node) => order(&node.order, Order::Restart { node: node.node }).await,
        TestnetCommand::Slow(slow) => {
            order(&slow.node.order, Order::Slow { node: slow.node.node, times: slow.times }).await
        }
        TestnetCommand::Cut(cut) => {
            // Without a direction: both.
            let (to, from) = (cut.to || !cut.from, cut.from || !cut.to);
            order(&cut.node.order, Order::Cut { node: cut.node.node, to, from }).await
        }
        TestnetCommand::Heal(args) => order(&args, Order::Heal).await,
        TestnetCommand::Down(args) => order(&args, Order::Down).await,
    }
}

/// What the commands that start volunteers need to know of the model.
async fn model(dir: Option<PathBuf>) -> anyhow::Result<(PathBuf, ModelId, ExpertLayout)> {
    let dir = dir.map_or_else(paths::bundled_model, Ok)?;
    let opening = move || {
        let folder = Folder::open(&dir)?;
        let (checkpoint, id) = (folder.checkpoint.clone(), folder.id());
        anyhow::Ok((dir, id, layout_of(checkpoint.spec())))
    };
    tokio::task::spawn_blocking(opening).await?
}

async fn up(args: UpArgs) -> anyhow::Result<()> {
    if args.replicas > args.nodes {
        crate::cli::usage_error("--replicas must not be larger than --nodes: a volunteer hosts an expert once");
    }
    let ended = told_to_end()?;
    let state = state_dir(args.state.as_deref());
    let control = Control::open(&state).await?;
    // Dropping the future ends its volunteers.
    tokio::select! {
        outcome = serve(&args, &control, &state) => outcome,
        _ = ended => Ok(()),
    }
}

async fn serve(args: &UpArgs, control: &Control, state: &Path) -> anyhow::Result<()> {
    let (dir, id, layout) = model(args.model.clone()).await?;
    let (nodes, replicas) = (usize::from(args.nodes), usize::from(args.replicas));
    let specs = match args.unequal {
        Some(seed) => split_unequally(&layout, &weights(seed, nodes), replicas),
        None => split(&layout, nodes, replicas),
    };
    let bar = output::count_bar("starting volunteers");
    bar.set_length(nodes as u64);
    let mut config = TestnetConfig::new(std::env::current_exe()?, &dir, specs);
    config.shape = Some(Shape::path(args.rtt, args.jitter, args.loss));
    config.seed = args.seed;
    let mut net = Testnet::start(config, |running| bar.set_position(running as u64)).await?;
    bar.finish_and_clear();
    let up = Up { model: dir, model_id: id.to_string(), state: state.to_owned(), status: control::status(&mut net) };
    if args.json {
        output::json(&up)?;
    } else {
        print_up(&up, args);
    }
    let mut killer = args.kill_every.map(Killer::new);
    // Kept while volunteers are killed: an order that is being read at that moment would be lost.
    let next = control.next();
    tokio::pin!(next);
    loop {
        let kill = async {
            match &killer {
                Some(killer) => tokio::time::sleep_until(killer.next).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            asked = &mut next => {
                next.set(control.next());
                let asked = asked.context("no orders can be taken any more")?;
                if matches!(asked.order, Order::Down) {
                    net.stop().await;
                    asked.reply(Ok(serde_json::Value::Null)).await;
                    return Ok(());
                }
                carry_out(&mut net, asked).await;
            }
            () = kill => if let Some(killer) = &mut killer {
                killer.act(&mut net, args.json).await?;
            }
        }
    }
}

async fn carry_out(net: &mut Testnet, asked: Asked) {
    let outcome = match control::obey(net, &asked.order).await {
        Ok(()) => serde_json::to_value(control::status(net)).map_err(|e| e.to_string()),
        Err(error) => Err(error.to_string()),
    };
    asked.reply(outcome).await;
}

/// Kills one volunteer after another, and starts each again before the next.
struct Killer {
    every: Duration,
    next: Instant,
    victim: Option<usize>,
}

impl Killer {
    fn new(every: Duration) -> Self {
        Self { every, next: Instant::now() + every, victim: None }
    }

    async fn act(&mut self, net: &mut Testnet, quiet: bool) -> anyhow::Result<()> {
        let say = |line: String| {
            if !quiet {
                println!("{line}");
            }
        };
        if let Some(victim) = self.victim.take() {
            // It may have been started by an order meanwhile.
            if net.nodes().get(victim).is_some_and(|node| node.state() == State::Killed) {
                net.restart(victim).await?;
                say(format!("volunteer {victim} is back"));
            }
            self.next = Instant::now() + self.every.mul_f64(1.0 - AWAY);
            return Ok(());
        }
        let running: Vec<usize> =
            net.nodes().iter().filter(|node| node.state() == State::Running).map(|node| node.index()).collect();
        if let Some(&victim) = running.choose(&mut rand::rng()) {
            net.kill(victim).await?;
            say(format!("volunteer {victim} was killed"));
            self.victim = Some(victim);
        }
        self.next = Instant::now() + self.every.mul_f64(AWAY);
        Ok(())
    }
}

fn print_up(up: &Up, args: &UpArgs) {
    println!("{} volunteers run; each expert has {} replicas", up.status.nodes.len(), args.replicas);
    let bootstrap = up.status.bootstrap.as_deref().unwrap_or_default();
    println!("\nuse it:   hanse generate --model {} --bootstrap {bootstrap} --prompt TEXT", up.model.display());
    let state = args.state.as_ref().map(|dir| format!(" --state {}", dir.display())).unwrap_or_default();
    println!("break it: hanse testnet kill|pause|resume|restart|slow|cut N{state}");
    println!("          hanse testnet status|heal|down{state}");
    println!("\nctrl-C ends it");
}

async fn order(args: &OrderArgs, order: Order) -> anyhow::Result<()> {
    control::give(&state_dir(args.state.as_deref()), &order).await?;
    Ok(())
}

async fn status(args: crate::cli::TestnetStatusArgs) -> anyhow::Result<()> {
    let document = control::give(&state_dir(args.order.state.as_deref()), &Order::Status).await?;
    if args.json {
        return output::json(&document);
    }
    let text = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let path = |value: &serde_json::Value| match value["cut"].as_bool() {
        Some(true) => "cut".to_owned(),
        _ => {
            let lost = value["loss"].as_f64().unwrap_or_default() * 100.0;
            format!(
                "{:.1}+{:.1} ms {lost:.1} %",
                value["delay"].as_f64().unwrap_or(0.0),
                value["jitter"].as_f64().unwrap_or(0.0)
            )
        }
    };
    let mut table = output::table(&["node", "state", "experts", "pid", "path", "peer id"]);
    for node in document["nodes"].as_array().into_iter().flatten() {
        let pid = if node["pid"].is_null() { String::new() } else { text(&node["pid"]) };
        let (to, from) = (path(&node["to"]), path(&node["from"]));
        let both = if to == from { to } else { format!("to {to},\nfrom {from}") };
        let [number, state, experts, peer] = ["node", "state", "experts", "peer_id"].map(|name| text(&node[name]));
        let peer = peer.parse().map_or(peer, |id| output::short(&id));
        table.add_row([number, state, experts, pid, both, peer]);
    }
    println!("{table}");
    println!("\njoin through --bootstrap {}", text(&document["bootstrap"]));
    Ok(())
}

/// Where orders are taken: the folder given, else one of the user's that is gone with the session.
fn state_dir(given: Option<&Path>) -> PathBuf {
    if let Some(dir) = given {
        return dir.to_owned();
    }
    match dirs::runtime_dir() {
        Some(dir) => dir.join("hanse-testnet"),
        None => std::env::temp_dir().join(format!("hanse-testnet-{}", rustix::process::geteuid().as_raw())),
    }
}

async fn run_chaos(args: ChaosArgs) -> anyhow::Result<()> {
    let (dir, id, _) = model(args.model.clone()).await?;
    let seed = args.seed.unwrap_or_else(rand::random);
    let all = Duration::from_secs(args.seconds);
    let peace = (all / 6).clamp(Duration::from_secs(2), Duration::from_secs(60));
    let config = ChaosConfig {
        peace,
        chaos: all.saturating_sub(peace),
        nodes: usize::from(args.nodes),
        replicas: usize::from(args.replicas),
        streams: usize::from(args.streams),
        shape: Shape::path(args.rtt, args.jitter, args.loss),
        ..ChaosConfig::new(std::env::current_exe()?, dir, id, seed)
    };
    let began = Instant::now();
    let ended = told_to_end()?;
    let say = |line: &str| eprintln!("{:7.1} s  {line}", began.elapsed().as_secs_f64());
    let report = tokio::select! {
        report = chaos::run(config, say) => report?,
        why = ended => bail!("{why}"),
    };
    if args.json {
        output::json(&report)?;
    } else {
        print_chaos(&report);
    }
    if !report.is_exact() {
        bail!("{} generations failed and {} gave other tokens (--seed {seed})", report.failed, report.different);
    }
    Ok(())
}

fn print_chaos(report: &ChaosReport) {
    let ChaosReport { generations, failed, different, disturbances: done, .. } = report;
    println!("seed {}, experts per volunteer {:?}", report.seed, report.experts);
    println!("{generations} generations: {failed} failed, {different} gave other tokens than one process");
    println!(
        "{} killed, {} restarted, {} hung, {} cut off one way, {} left, {} paused by the owner, {} slowed down\n",
        done.killed, done.restarted, done.hung, done.cut, done.left, done.rested, done.slowed
    );
    let mut table = output::table(&["milliseconds", "count", "p50", "p99", "max"]);
    let mut row = |name: &str, of: &Quantiles| {
        let numbers = [of.p50_ms, of.p99_ms, of.max_ms].map(|ms| format!("{ms:.1}"));
        table.add_row([name.to_owned(), of.count.to_string()].into_iter().chain(numbers));
    };
    row("token to token, in peace", &report.peace);
    row("token to token, in chaos", &report.chaos);
    row("added when one is killed", &report.killed);
    row("added when one hangs", &report.hung);
    row("added when one leaves", &report.left);
    row("return until called", &report.return_ms);
    println!("{table}\n");
    println!("a silent volunteer was sent a call at most {:.0} ms after it fell silent", report.longest_in_routes_ms);
    let [frames, in_chaos] = report.frames;
    let hedged = 100.0 * report.hedged_in_peace();
    println!(
        "peace: {frames} calls, {hedged:.2} % of them hedged; chaos: {in_chaos} calls, {} hedged",
        report.hedged[1]
    );
}
