//! A network as one client sees it: a document, and a page that shows it live.
//!
//! [`ViewSource`] is where the document is taken from, a [`Client`] or an [`ExpertNetwork`] that only looks on. [`NetworkView`] is the
//! document. [`routes`] serves both the page and the document; the page needs nothing from elsewhere.

mod build;
mod peers;
mod serve;
mod speed;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::client::Client;
use crate::directory::{PeerState, Watching};
use crate::dispatch::PassTrace;
use crate::engine::EngineStatus;
use crate::network::ExpertNetwork;
pub use serve::{api, page, routes};
use speed::Speed;

/// A network as one client sees it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NetworkView {
    /// The model's id.
    pub model_id: String,
    /// The model's name for people.
    pub name: String,
    /// Whether `POST /v1/chat/completions` is served beside this view.
    pub chat: bool,
    /// The MoE layers.
    pub layers: Vec<LayerView>,
    /// How many experts no peer can be called for.
    pub missing: usize,
    /// The peers, those that were lost within the last minute among them, ordered by peer id.
    pub peers: Vec<PeerView>,
    /// What the client is decoding; `None` for one that only looks on.
    pub engine: Option<EngineStatus>,
    /// Tokens that it generated per second during the last few seconds; `None` where nothing is generated, and until that is known.
    pub tokens_per_second: Option<f64>,
    /// One of its latest forward passes; `None` before the first.
    pub trace: Option<TraceView>,
}

/// The experts of one layer, by number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerView {
    /// The layer's number.
    pub layer: u32,
    /// How many experts it has.
    pub experts: u32,
    /// For each expert, how many peers can be called for it now: those that are connected and not set aside or draining.
    pub replicas: Vec<u32>,
    /// For each expert, how many rows this client has sent to it.
    pub calls: Vec<u64>,
    /// For each expert, how many rows a minute its peers compute for everybody, by their own account.
    pub demand: Vec<u64>,
}

/// One peer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PeerView {
    /// Who it is.
    pub peer_id: String,
    /// Whether it can be called.
    pub state: PeerState,
    /// The connection's smoothed round trip; `None` while there is no connection.
    pub round_trip_ms: Option<f64>,
    /// `direct`, `hole-punched` or `relayed`; `None` while there is no connection.
    pub path: Option<&'static str>,
    /// The address in use, or the first that it announces.
    pub address: Option<String>,
    /// How it says that it is reached: `direct`, `relayed` or `unreachable`.
    pub reachability: String,
    /// How full its queue is, 0 to 1.
    pub load: f64,
    /// How many experts it hosts.
    pub experts: usize,
    /// How many it is about to host.
    pub loading: usize,
    /// What it hosts: layers and experts of them, both as ranges such as `0-3,7`.
    pub hosted: Vec<(String, String)>,
    /// How hidden states may be encoded on the way to it, best first.
    pub precision: Vec<String>,
    /// This client's calls that it answered.
    pub calls: u64,
    /// (row, expert) pairs in them.
    pub rows: u64,
    /// Mean duration of the latest calls; `None` without calls.
    pub mean_ms: Option<f64>,
    /// What one in a hundred of the latest calls exceeded; `None` without calls.
    pub p99_ms: Option<f64>,
    /// Calls that failed or came too late.
    pub failures: u64,
}

/// A forward pass call by call.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TraceView {
    /// How long ago it began.
    pub age_ms: f64,
    /// The pass.
    #[serde(flatten)]
    pub pass: PassTrace,
}

/// Where views are taken from.
#[derive(Debug)]
pub struct ViewSource {
    name: String,
    chat: bool,
    network: Arc<ExpertNetwork>,
    /// `None` for a network that is only looked at.
    client: Option<Client>,
    speed: Mutex<Speed>,
}

impl ViewSource {
    /// Views of `client`'s network under the model's `name`, beside a chat API if `chat`; `None` for a client without a network.
    #[must_use]
    pub fn client(client: &Client, name: &str, chat: bool) -> Option<Self> {
        let network = client.network()?.clone();
        Some(Self { name: name.to_owned(), chat, network, client: Some(client.clone()), speed: Mutex::default() })
    }

    /// Views of a network that nothing is generated on from here, see [`ExpertNetwork::watch`].
    #[must_use]
    pub fn network(network: Arc<ExpertNetwork>, name: &str) -> Self {
        Self { name: name.to_owned(), chat: false, network, client: None, speed: Mutex::default() }
    }

    /// Has peers that die noticed within seconds while somebody looks.
    fn watch(&self) -> Watching {
        self.network.directory().watch()
    }

    /// The network as it is now.
    #[must_use]
    pub fn view(&self) -> NetworkView {
        let directory = self.network.directory();
        let reports = directory.overview();
        let layers = build::layers(directory.layout(), &reports, |layer| self.network.calls(layer));
        let engine = self.client.as_ref().map(Client::engine);
        let speed = |status: &EngineStatus| {
            let mut speed = self.speed.lock().unwrap_or_else(PoisonError::into_inner);
            speed.per_second(Instant::now(), status.tokens)
        };
        NetworkView {
            model_id: self.network.model().to_string(),
            name: self.name.clone(),
            chat: self.chat,
            missing: layers.iter().flat_map(|layer| &layer.replicas).filter(|&&replicas| replicas == 0).count(),
            layers,
            peers: reports.iter().map(PeerView::of).collect(),
            tokens_per_second: engine.as_ref().and_then(speed),
            engine,
            trace: self.network.latest_trace().map(|(age, pass)| TraceView { age_ms: millis(age), pass }),
        }
    }
}

/// Milliseconds to a microsecond: more digits say nothing.
fn millis(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e3
}
