//! How long a client takes to find a whole network, by its size: `cargo run --release -p hanse-node --example discovery_sim`.
//!
//! Real control planes in this process, connected by memory. The numbers in `docs/benchmarks.md` come from here.

use std::time::Duration;

use clap::Parser;
use comfy_table::{Table, presets};
use hanse_node::simulation::Scenario;
use hanse_node::simulation::swarms::{Found, Growth, Rest, Swarms};
use serde::Serialize;

#[derive(Parser)]
struct Args {
    /// Sizes of the network.
    #[arg(long, value_delimiter = ',', default_value = "16,32,64,128,256")]
    peers: Vec<usize>,
    /// MoE layers of the model.
    #[arg(long, default_value_t = 58)]
    layers: u32,
    /// Experts of each.
    #[arg(long, default_value_t = 256)]
    experts: u32,
    /// Clients that join, one after another.
    #[arg(long, default_value_t = 3)]
    clients: usize,
    /// Seconds for which each network is watched at rest.
    #[arg(long, default_value_t = 120)]
    rest: u64,
    /// Placement, peer ids and choice of bootstrap members follow from it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Measured {
    growth: Growth,
    rest: Rest,
    clients: Vec<Found>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_env("HANSE_LOG")).init();
    let args = Args::parse();
    let mut all = Vec::new();
    for &members in &args.peers {
        let measured = measure(&args, members).await?;
        eprintln!("{}", serde_json::to_string(&measured)?);
        all.push(measured);
    }
    if args.json {
        println!("{}", serde_json::to_string(&all)?)
    } else {
        println!("{}", table(&all))
    }
    Ok(())
}

async fn measure(args: &Args, members: usize) -> anyhow::Result<Measured> {
    const PATIENCE: Duration = Duration::from_secs(180);
    let scenario =
        Scenario { members, layers: args.layers, experts: args.experts, seed: args.seed, ..Scenario::default() };
    let (mut swarms, growth) = Swarms::grow(&scenario).await?;
    let mut clients = Vec::new();
    for _ in 0..args.clients {
        clients.push(swarms.client().await?.discover(PATIENCE).await);
    }
    let rest = swarms.rest(Duration::from_secs(args.rest)).await;
    swarms.shutdown().await;
    Ok(Measured { growth, rest, clients })
}

fn table(all: &[Measured]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header([
        "peers",
        "keys",
        "advert",
        "copies",
        "joined and published, KiB, connections",
        "at rest, KiB a minute sent (most), connections",
        "first advert",
        "every expert",
        "every peer",
        "look-ups",
        "KiB covered; all",
        "KiB: a look-up; all adverts",
    ]);
    for Measured { growth, rest, clients } in all {
        // The median of the clients.
        let median = |of: &dyn Fn(&Found) -> Option<f64>| {
            let mut values: Vec<f64> = clients.iter().map(|found| of(found).unwrap_or(f64::INFINITY)).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
        };
        let kib = |bytes: f64| bytes / 1024.0;
        table.add_row([
            growth.members.to_string(),
            format!("{:.1}", growth.keys.mean),
            format!("{:.0} ({:.0})", growth.advert_bytes.mean, growth.advert_bytes.most),
            format!("{:.1}", growth.copies),
            format!("{:.1} s, {:.0}, {:.0}", growth.seconds, kib(growth.bytes.mean), growth.connections.mean),
            format!("{:.1} ({:.1}), {:.1}", kib(rest.sent.mean), kib(rest.sent.most), rest.connections.mean),
            format!("{:.2} s", median(&|found| found.first)),
            format!("{:.2} s", median(&|found| found.covered)),
            format!("{:.2} s", median(&|found| found.all)),
            format!("{:.0}", median(&|found| Some(found.look_ups as f64))),
            format!(
                "{:.0}; {:.0}",
                kib(median(&|found| Some(found.bytes_covered as f64))),
                kib(median(&|found| Some(found.bytes_all as f64)))
            ),
            format!(
                "{:.0}; {:.0}",
                kib(median(&|found| Some(found.look_up_bytes as f64))),
                kib(median(&|found| Some(found.adverts_bytes as f64)))
            ),
        ]);
    }
    table
}
