//! Calls experts of a network as fast as they answer, for some numbers of rows and of clients: for measuring, and for comparing with
//! other systems (docs/benchmarks/peers).
//!
//! ```text
//! cargo run --release -p hanse-examples --bin expert-calls -- --bootstrap ADDRESS --model MODEL_ID --hidden 2048 --layers 1 \
//!     --experts 16 --top-k 4 --rows 1,16,256 --clients 1,4,16 --seconds 2
//! ```
//!
//! Every client has an identity and connections of its own. A line of JSON for each point.

use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use futures::future::{join_all, try_join_all};
use hanse_model::Routing;
use hanse_protocol::{Identity, ModelId, Multiaddr};
use hanse_router::{ExpertLayout, ExpertNetwork, NetworkConfig, Usage};
use serde_json::json;

/// As in `hanse`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measure calls of experts.
#[derive(Debug, Parser)]
struct Args {
    /// A member to join through.
    #[arg(long, value_name = "ADDR")]
    bootstrap: Multiaddr,
    /// The model's id.
    #[arg(long, value_name = "ID")]
    model: ModelId,
    /// Length of a row of hidden states.
    #[arg(long)]
    hidden: u32,
    /// Number of layers, each with experts. The first is called.
    #[arg(long)]
    layers: u32,
    /// Routed experts of a layer.
    #[arg(long)]
    experts: u32,
    /// Experts that a row goes to.
    #[arg(long, default_value_t = 1)]
    top_k: u32,
    /// Experts that are called, from the first on: with one, every row goes to the same.
    #[arg(long, default_value_t = 1)]
    among: u32,
    /// Rows of a call.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    rows: Vec<usize>,
    /// Clients that call at the same time.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    clients: Vec<usize>,
    /// How long each point is measured.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    anyhow::ensure!(args.top_k <= args.among && args.among <= args.experts, "--top-k of --among of --experts");
    let most = args.clients.iter().copied().max().context("no clients")?;
    let layout = ExpertLayout {
        hidden_size: args.hidden,
        layers: (0..args.layers).map(|layer| (layer, args.experts)).collect(),
    };
    let join = || async {
        let config = NetworkConfig { bootstrap: vec![args.bootstrap.clone()], ..NetworkConfig::default() };
        ExpertNetwork::join(&Identity::generate(), args.model, layout.clone(), config).await
    };
    let networks = try_join_all((0..most).map(|_| join())).await?;
    for &rows in &args.rows {
        for &clients in &args.clients {
            let deadline = Instant::now() + Duration::from_secs_f64(args.seconds);
            let began = Instant::now();
            let calls = networks.iter().take(clients).enumerate().map(|(client, network)| {
                let args = &args;
                async move {
                    let mut times = Vec::new();
                    let hidden: Vec<f32> = (0..rows * args.hidden as usize).map(|i| (i as f32 * 0.37).sin()).collect();
                    let mut usage = Usage::default();
                    // Once to warm up, and at least once.
                    while Instant::now() < deadline || times.len() < 2 {
                        let routing = routing(args, rows, client + times.len());
                        let called = Instant::now();
                        network.forward(0, &hidden, &routing, &mut usage).await?;
                        times.push(called.elapsed());
                    }
                    anyhow::Ok(times)
                }
            });
            let times: Vec<Vec<Duration>> = join_all(calls).await.into_iter().collect::<Result<_, _>>()?;
            let took = began.elapsed().as_secs_f64();
            let mut times = times.concat();
            times.sort_unstable();
            let quantile = |q: f64| times[((times.len() - 1) as f64 * q) as usize].as_secs_f64() * 1e3;
            let calls = times.len() as f64 / took;
            let point = json!({
                "rows": rows, "clients": clients, "calls_per_second": calls, "rows_per_second": calls * rows as f64,
                "p50_ms": quantile(0.5), "p99_ms": quantile(0.99),
            });
            println!("{point}");
        }
    }
    join_all(networks.iter().map(ExpertNetwork::shutdown)).await;
    Ok(())
}

/// Each row to `top_k` experts next to each other, in ascending order, other ones for the next row.
fn routing(args: &Args, rows: usize, first: usize) -> Routing {
    let experts = (0..rows).flat_map(|row| {
        let mut chosen: Vec<u32> =
            (0..args.top_k).map(|k| (first as u32 + row as u32 * args.top_k + k) % args.among).collect();
        chosen.sort_unstable();
        chosen
    });
    let experts: Vec<u32> = experts.collect();
    Routing { top_k: args.top_k as usize, weights: vec![1.0 / args.top_k as f32; experts.len()], experts }
}
