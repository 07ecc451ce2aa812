//! `hanse gateway`: serves a model to programs that speak OpenAI's language.

use std::time::Duration;

use anyhow::Context as _;
use hanse_router::EngineConfig;
use hanse_router::gateway::{GatewayApp, GatewayConfig, Keys, SocketLimits, serve};
use hanse_router::view::ViewSource;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::client;
use crate::cli::GatewayArgs;
use crate::output;
use crate::output::say;
use crate::signals::told_to_end;

/// Connections beside those of requests that are being answered: pages, monitoring, idle ones.
const OTHER_CONNECTIONS: usize = 256;
/// Open files that are no connections to this gateway: the model's, the network's.
const OTHER_FILES: u64 = 256;

#[derive(Serialize)]
struct Ready {
    url: String,
    model: String,
    model_id: Option<String>,
}

pub(crate) async fn run(args: GatewayArgs) -> anyhow::Result<()> {
    if !args.client.local && !args.client.names_network() {
        crate::cli::usage_error("give --bootstrap ADDR to use a network, or --local to compute everything here");
    }
    let keys = args.api_key_file.as_deref().map(Keys::load).transpose()?;
    // Before the model is opened, which takes its time: another one may have the address.
    let listener = TcpListener::bind(args.listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {}: choose another --listen", args.listen))?;
    let client = client::open(&args.client, Some(&args.draft), args.client.local).await?.with_engine(EngineConfig {
        kv_bytes: usize::try_from(args.kv_memory.as_u64()).unwrap_or(usize::MAX),
        max_sequences: args.max_sequences as usize,
        max_waiting: args.max_waiting as usize,
        drafts: args.draft.drafts(),
        groups: true,
    });
    let max_connections = client.engine_config().capacity() + OTHER_CONNECTIONS;
    allow_files(max_connections as u64 + OTHER_FILES);
    let name = args.name.clone().unwrap_or_else(|| args.client.model.short_name());
    let config = GatewayConfig {
        keys,
        cors_origins: args.cors_origin.clone(),
        max_body_bytes: usize::try_from(args.max_body.as_u64()).unwrap_or(usize::MAX),
        sockets: SocketLimits {
            max_connections,
            drain_timeout: Duration::from_secs(args.drain),
            ..SocketLimits::default()
        },
        ..GatewayConfig::new(name.clone())
    };
    let prepared = client.clone();
    let mut app = tokio::task::spawn_blocking(move || GatewayApp::new(prepared, config)).await??;
    let pages = CancellationToken::new();
    if let Some(source) = ViewSource::client(&client, &name, true) {
        app = app.with_page(source, pages.clone());
    }
    let ended = told_to_end()?;
    let url = format!("http://{}", listener.local_addr()?);
    let model_id = client.network().map(|network| network.model().to_string());
    if args.json {
        output::json(&Ready { url, model: name, model_id })?;
    } else {
        say!("serving {name} at {url}/v1");
        if client.network().is_some() {
            say!("its network is shown at {url}/");
        }
        if !args.listen.ip().is_loopback() && args.api_key_file.is_none() {
            eprintln!("everybody who reaches {} may ask: give --api-key-file to choose who", args.listen);
        }
    }
    let ended = async {
        ended.await;
        pages.cancel();
    };
    serve(listener, app, ended).await?;
    client.close().await;
    Ok(())
}

/// Has the system let this process have so many files open, as far as its owner allows: by default many systems allow 1024.
fn allow_files(wanted: u64) {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let limit = getrlimit(Resource::Nofile);
        let Some(current) = limit.current.filter(|&current| current < wanted) else { return };
        let most = limit.maximum.map_or(wanted, |maximum| wanted.min(maximum));
        let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(most), ..limit });
        if raised.is_err() || most < wanted {
            let allowed = if raised.is_err() { current } else { most };
            eprintln!("{wanted} files may be needed and {allowed} may be open (`ulimit -n`): less is served at a time");
        }
    }
    #[cfg(not(unix))]
    let _ = wanted;
}
