//! Times how long members take to declare experts on the control plane, and a newcomer to find out who hosts each: for comparing with
//! other systems (docs/benchmarks/peers).
//!
//! ```text
//! cargo run --release -p hanse-examples --bin declare-and-find -- --members 8 --experts 100
//! ```
//!
//! All members are in this process, over QUIC on loopback, and host an equal share each. Prints a line of JSON.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use futures::future::try_join_all;
use hanse_protocol::discovery::keys::ProviderKey;
use hanse_protocol::discovery::{Discovery, DiscoveryConfig, Reachability, unix_ms};
use hanse_protocol::{Advert, HostedExperts, Identity, ModelId, Precision, SignedAdvert, WireDtype};
use hanse_router::search::{EAGER_INTERVAL, PeerSearch};
use serde_json::json;
use tokio::sync::mpsc;

/// Time declaring and finding experts.
#[derive(Debug, Parser)]
struct Args {
    /// Members that host experts.
    #[arg(long, default_value_t = 8)]
    members: u32,
    /// Experts of one layer that they share.
    #[arg(long, default_value_t = 100)]
    experts: u32,
}

/// Nothing that is waited for takes longer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Providers that are named and not yet asked.
const QUEUE: usize = 64;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let model = ModelId([7; 32]);
    let listen = vec!["/ip4/127.0.0.1/udp/0/quic-v1".parse()?];
    let mut members: Vec<(Identity, Discovery)> = Vec::new();
    for _ in 0..args.members {
        let identity = Identity::generate();
        let bootstrap = members.first().map(|(_, first)| first.addresses()).unwrap_or_default();
        let config = DiscoveryConfig { listen: listen.clone(), bootstrap, ..DiscoveryConfig::default() };
        let discovery = Discovery::start(&identity, config).await?;
        if !members.is_empty() {
            discovery.wait_connected(PATIENCE).await?;
        }
        members.push((identity, discovery));
    }

    let began = Instant::now();
    try_join_all(members.iter().zip(0..).map(|((identity, discovery), member)| {
        let (first, last) = (member * args.experts / args.members, (member + 1) * args.experts / args.members);
        declare(identity, discovery, model, args.experts, first..last)
    }))
    .await?;
    let declared = began.elapsed();

    let bootstrap = members.first().map(|(_, first)| first.addresses()).unwrap_or_default();
    let client =
        Discovery::start(&Identity::generate(), DiscoveryConfig { bootstrap, ..DiscoveryConfig::default() }).await?;
    client.wait_connected(PATIENCE).await?;
    let began = Instant::now();
    tokio::time::timeout(PATIENCE, find(PeerSearch::new(client.clone(), model, [0]), args.experts)).await??;
    let found = began.elapsed();
    let seconds = |duration: Duration| duration.as_secs_f64();
    println!("{}", json!({ "experts": args.experts, "declare_s": seconds(declared), "find_s": seconds(found) }));
    client.shutdown().await;
    for (_, member) in &members {
        member.shutdown().await;
    }
    Ok(())
}

/// Says that this member hosts `experts` of layer 0, and waits until its records are with others.
async fn declare(
    identity: &Identity,
    discovery: &Discovery,
    model: ModelId,
    of: u32,
    experts: std::ops::Range<u32>,
) -> anyhow::Result<()> {
    let mut hosted = HostedExperts::new();
    for expert in experts {
        hosted.insert(0, expert)?;
    }
    let now = unix_ms();
    let advert = Advert {
        model,
        hosted,
        layers: [(0, of)].into(),
        wire_dtypes: WireDtype::ALL.to_vec(),
        data_addresses: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 4701))],
        capacity_rows: 4096,
        load_permille: 0,
        draining: None,
        sequence: now,
        expires_unix_ms: now + 120_000,
        popularity: Vec::new(),
        loading: HostedExperts::new(),
        reachability: Reachability::Direct,
        circuits: Vec::new(),
        precision: Precision::F32,
        variant_of: None,
    };
    let signed = SignedAdvert::sign(&advert, identity)?;
    let mut keys = ProviderKey::covering(model, advert.hosted.layers());
    keys.push(ProviderKey::volunteers());
    discovery.announce(vec![(vec![model], signed)], keys).await?;
    anyhow::ensure!(discovery.wait_published(PATIENCE).await, "the records did not reach others");
    Ok(())
}

/// Searches as a client does until each of `experts` has a provider whose advert says so.
async fn find(search: PeerSearch, experts: u32) -> anyhow::Result<()> {
    let (sender, mut named) = mpsc::channel(QUEUE);
    let searching = search.clone();
    let running = async move { searching.run(sender, || EAGER_INTERVAL).await };
    tokio::pin!(running);
    let (mut asked, mut found) = (HashSet::new(), HashSet::new());
    let mut reads = futures::stream::FuturesUnordered::new();
    while found.len() < experts as usize {
        tokio::select! {
            () = &mut running => anyhow::bail!("the search ended"),
            Some(peer) = named.recv() => if asked.insert(peer) {
                reads.push(search.advert(peer));
            },
            Some(advert) = futures::StreamExt::next(&mut reads) => {
                let advert: Advert = advert.map_err(anyhow::Error::msg)?.context("a provider hosts nothing")?;
                found.extend(advert.hosted.iter());
            }
        }
    }
    Ok(())
}
