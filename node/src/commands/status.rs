//! `hanse status`: what a network hosts.

mod report;
mod web;

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use hanse_protocol::discovery::{Discovery, DiscoveryConfig, Reachability};
use hanse_protocol::{
    Advert, DataConnection, DataEndpoint, Draining, Frame, Hello, Identity, ModelId, PeerId, Precision,
};
use hanse_router::client::layout_of;
use hanse_router::network::{bind_any, hosted_models};
use serde::Serialize;

use crate::cli::StatusArgs;
use crate::model::Folder;
use crate::output;
use crate::output::say;

const JOIN_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Takes a terminal's cursor home, and clears what is below it.
const CLEAR: &str = "\x1b[H\x1b[J";

#[derive(Serialize)]
struct Document {
    model_id: Option<String>,
    layers: Vec<LayerRow>,
    peers: Vec<PeerRow>,
}

#[derive(Serialize)]
struct LayerRow {
    layer: u32,
    experts: u32,
    missing: Vec<u32>,
    min_replicas: usize,
    #[serde(skip)]
    max_replicas: usize,
}

impl LayerRow {
    /// Whether it differs in nothing but its number.
    fn is_like(&self, other: &Self) -> bool {
        let told = |row: &Self| (row.experts, row.min_replicas, row.max_replicas);
        told(self) == told(other) && self.missing == other.missing
    }
}

#[derive(Serialize)]
struct PeerRow {
    peer_id: String,
    addresses: Vec<String>,
    experts: usize,
    /// `null` when the data plane cannot be reached from here.
    round_trip_ms: Option<f64>,
    /// 0 (idle) to 1 (queue full).
    load: f64,
    reachability: &'static str,
    /// It is paused or leaving, and counts as a replica of nothing.
    draining: bool,
    /// Why.
    why_draining: Option<String>,
    /// How it is reached, or in a word why it takes no calls.
    #[serde(skip)]
    reach: &'static str,
    /// How it stores the experts, the least where they differ.
    precision: Precision,
    /// The published model of which its model is a quantised variant.
    variant_of: Option<String>,
}

pub(crate) async fn run(args: StatusArgs) -> anyhow::Result<()> {
    if args.join.bootstrap.is_empty() && !args.join.mdns {
        crate::cli::usage_error("give --bootstrap ADDR of a member of the network, or --mdns");
    }
    let wanted = args.model.as_deref().map(Wanted::open).transpose()?;
    let identity = Identity::generate();
    let discovery = Discovery::start(
        &identity,
        DiscoveryConfig {
            network: args.join.network.clone(),
            listen: Vec::new(),
            bootstrap: args.join.bootstrap.clone(),
            mdns: args.join.mdns,
            ..DiscoveryConfig::default()
        },
    )
    .await?;
    let view = View {
        network: args.join.network.clone(),
        endpoint: bind_any(&identity)?,
        discovery,
        wanted: wanted.as_ref().map(|wanted| wanted.id),
    };
    if let Some(address) = args.web {
        let adverts = view.adverts().await;
        view.close().await;
        let (model, adverts) = adverts?;
        let id = model.context("nobody hosts a model that could be shown: name one with --model")?;
        let shown = shown(id, wanted, &adverts)?;
        return web::serve(&args.join, address, shown, args.json).await;
    }
    let shown = tokio::select! {
        shown = show(&view, &args) => shown,
        interrupted = tokio::signal::ctrl_c(), if args.watch.is_some() => interrupted.context("cannot hear ctrl-C"),
    };
    view.close().await;
    shown
}

/// Looks once, or again and again.
async fn show(view: &View, args: &StatusArgs) -> anyhow::Result<()> {
    let is_terminal = std::io::stdout().is_terminal();
    loop {
        let document = view.look().await?;
        if args.json {
            output::json(&document)?;
        } else if args.watch.is_some() && is_terminal {
            say!("{CLEAR}{}\n\n{}; ctrl-C to leave", report::report(&document), now());
        } else {
            say!("{}", report::report(&document));
        }
        let Some(seconds) = args.watch else { return Ok(()) };
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        if !args.json && !is_terminal {
            say!("\n{}", now());
        }
    }
}

/// The time of day here.
fn now() -> String {
    let now = jiff::ZonedDateTime::now();
    format!("{:02}:{:02}:{:02}", now.hour(), now.minute(), now.second())
}

/// A network that is looked at.
struct View {
    network: String,
    discovery: Discovery,
    endpoint: DataEndpoint,
    wanted: Option<ModelId>,
}

impl View {
    /// The model that is meant, if there is one, with the adverts of those who host it.
    async fn adverts(&self) -> anyhow::Result<(Option<ModelId>, Vec<(PeerId, Advert)>)> {
        self.discovery.wait_connected(JOIN_TIMEOUT).await.context("no peer reachable")?;
        let mut models = hosted_models(&self.discovery).await;
        let model = match self.wanted {
            Some(model) => Some(model),
            None if models.len() > 1 => {
                let ids: Vec<String> = models.keys().map(ToString::to_string).collect();
                bail!("the network hosts several models; choose one with --model: {}", ids.join(", "));
            }
            None => models.keys().next().copied(),
        };
        let adverts = model.and_then(|model| models.remove(&model)).unwrap_or_default();
        Ok((model, adverts))
    }

    async fn look(&self) -> anyhow::Result<Document> {
        let (model, adverts) = self.adverts().await?;
        let Self { network, discovery, endpoint, .. } = self;
        let rows = adverts.iter().map(|(peer, advert)| peer_row(discovery, endpoint, network, *peer, advert));
        let mut peers = futures::future::join_all(rows).await;
        peers.sort_by(|a, b| a.peer_id.cmp(&b.peer_id));
        Ok(Document { model_id: model.map(|id| id.to_string()), layers: layer_rows(&adverts), peers })
    }

    async fn close(&self) {
        self.endpoint.close().await;
        self.discovery.shutdown().await;
    }
}

/// A model named by its id or by a folder that holds it.
struct Wanted {
    id: ModelId,
    folder: Option<Folder>,
}

impl Wanted {
    fn open(text: &str) -> anyhow::Result<Self> {
        if let Ok(id) = text.parse() {
            return Ok(Self { id, folder: None });
        }
        let folder = Folder::open(Path::new(text)).with_context(|| format!("{text:?} is no model id; as a folder"))?;
        Ok(Self { id: folder.id(), folder: Some(folder) })
    }
}

/// What a page of the model is about: its experts by its folder, or by what its hosts say.
fn shown(id: ModelId, wanted: Option<Wanted>, adverts: &[(PeerId, Advert)]) -> anyhow::Result<web::Shown> {
    let name = |folder: &Folder| folder.checkpoint.dir().file_name().map(|name| name.to_string_lossy().into_owned());
    let folder = wanted.and_then(|wanted| wanted.folder);
    let layout = match &folder {
        Some(folder) => layout_of(folder.checkpoint.spec()),
        None => web::layout(adverts).context("nobody hosts this model: only its folder could tell its experts")?,
    };
    Ok(web::Shown { id, name: folder.as_ref().and_then(name).unwrap_or_else(|| id.to_string()), layout })
}

fn layer_rows(adverts: &[(PeerId, Advert)]) -> Vec<LayerRow> {
    let mut layers: BTreeMap<u32, u32> = BTreeMap::new();
    for (_, advert) in adverts {
        layers.extend(&advert.layers);
    }
    let row = |(layer, experts): (u32, u32)| {
        let serves = |advert: &Advert, expert: u32| advert.draining.is_none() && advert.hosted.contains(layer, expert);
        let replicas = |expert: u32| adverts.iter().filter(|(_, advert)| serves(advert, expert)).count();
        let counts: Vec<usize> = (0..experts).map(replicas).collect();
        let missing = (0..experts).filter(|&expert| counts[expert as usize] == 0).collect();
        let least_and_most = |counts: &[usize]| Some((*counts.iter().min()?, *counts.iter().max()?));
        let (min_replicas, max_replicas) = least_and_most(&counts).unwrap_or_default();
        LayerRow { layer, experts, missing, min_replicas, max_replicas }
    };
    layers.into_iter().map(row).collect()
}

async fn peer_row(
    discovery: &Discovery,
    endpoint: &DataEndpoint,
    network: &str,
    peer: PeerId,
    advert: &Advert,
) -> PeerRow {
    let mut round_trip = None;
    if advert.reachability == Reachability::Direct {
        round_trip = first_round_trip(endpoint, peer, &advert.data_addresses).await;
    }
    let mut reachability = round_trip.map_or("unreachable", |_| "direct");
    if round_trip.is_none()
        && let Ok(connection) = discovery.connect_data(peer, advert.circuits.clone(), CONNECT_TIMEOUT).await
    {
        round_trip = shared_round_trip(&connection, network, advert.model).await;
        if round_trip.is_some() {
            reachability = if connection.path().is_relayed() { "relayed" } else { "direct" };
        }
    }
    PeerRow {
        peer_id: peer.to_string(),
        addresses: advert.data_addresses.iter().map(ToString::to_string).collect(),
        experts: advert.hosted.count(),
        round_trip_ms: round_trip.map(|duration| duration.as_secs_f64() * 1e3),
        load: f64::from(advert.load_permille) / 1000.0,
        reachability,
        draining: advert.draining.is_some(),
        why_draining: advert.draining.map(|why| why.to_string()),
        reach: advert.draining.map_or(reachability, Draining::short),
        precision: advert.precision,
        variant_of: advert.variant_of.map(|model| model.to_string()),
    }
}

/// How long a hello takes on a stream that is open already.
async fn shared_round_trip(connection: &DataConnection, network: &str, model: ModelId) -> Option<Duration> {
    let hello = Frame::Hello(Hello { network: network.to_owned(), model });
    connection.call(&hello, CONNECT_TIMEOUT).await.ok()?;
    let start = Instant::now();
    connection.call(&hello, CONNECT_TIMEOUT).await.ok()?;
    Some(start.elapsed())
}

async fn first_round_trip(endpoint: &DataEndpoint, peer: PeerId, addresses: &[SocketAddr]) -> Option<Duration> {
    for address in addresses {
        if let Ok(connection) = endpoint.connect(peer, *address, CONNECT_TIMEOUT).await {
            let round_trip = connection.round_trip();
            connection.close("looked only");
            return Some(round_trip);
        }
    }
    None
}
