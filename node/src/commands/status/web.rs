//! `hanse status --web`: the network on a page, live.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use hanse_protocol::{Advert, Identity, ModelId, PeerId};
use hanse_router::gateway::{SocketLimits, serve_routes};
use hanse_router::view::{ViewSource, routes};
use hanse_router::{ExpertLayout, ExpertNetwork, NetworkConfig};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::cli::JoinArgs;
use crate::output;
use crate::output::say;
use crate::signals::told_to_end;

/// The model that is shown.
pub(super) struct Shown {
    pub(super) id: ModelId,
    pub(super) name: String,
    pub(super) layout: ExpertLayout,
}

#[derive(Serialize)]
struct Ready {
    address: SocketAddr,
    model_id: String,
}

/// Shows the model's part of the network until ctrl-C or SIGTERM.
pub(super) async fn serve(join: &JoinArgs, address: SocketAddr, shown: Shown, json: bool) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen at {address}"))?;
    let address = listener.local_addr()?;
    let config = NetworkConfig {
        network: join.network.clone(),
        bootstrap: join.bootstrap.clone(),
        mdns: join.mdns,
        ..NetworkConfig::default()
    };
    let network = ExpertNetwork::watch(&Identity::generate(), shown.id, shown.layout, config).await?;
    let network = Arc::new(network);
    let ended = CancellationToken::new();
    let app = routes(ViewSource::network(network.clone(), &shown.name), ended.clone());
    let told = told_to_end()?;
    let model_id = shown.id.to_string();
    if json {
        output::json(&Ready { address, model_id })?;
    } else {
        say!("model {model_id}\nshown at http://{address}/\n\nctrl-C ends it");
    }
    let asked = async {
        told.await;
        ended.cancel();
    };
    // Pages read what is there already: nothing takes longer.
    let limits =
        SocketLimits { max_connections: 256, drain_timeout: Duration::from_secs(2), ..SocketLimits::default() };
    let outcome = serve_routes(listener, app, limits, asked).await;
    network.shutdown().await;
    Ok(outcome?)
}

/// The layers of a model by what its hosts say: most of them, since a single one may say anything. Nobody computes here, so that the
/// length of a row is not needed.
pub(super) fn layout(adverts: &[(PeerId, Advert)]) -> Option<ExpertLayout> {
    let mut votes: HashMap<&BTreeMap<u32, u32>, usize> = HashMap::new();
    for (_, advert) in adverts {
        *votes.entry(&advert.layers).or_default() += 1;
    }
    let layers = votes.into_iter().max_by_key(|&(layers, votes)| (votes, std::cmp::Reverse(layers)))?.0;
    Some(ExpertLayout { hidden_size: 0, layers: layers.clone() })
}
