//! An OpenAI-compatible server in front of a [`Client`]: other people's programs talk to the network without knowing it.
//!
//! Every request becomes generations of the client's engine, so all requests in flight share frames. A client that goes away ends
//! its generations within a step.
//!
//! Inside: `body` is what may be asked, `ask` checks it and makes it a prompt, `answers` runs the generations, `write` puts what comes
//! of them into OpenAI's words, `tools` finds calls of tools in a text, `grammar` constrains answers to a format, `error` is what
//! goes wrong, `keys` who may ask, `metrics` what is counted, `server` the sockets.

mod answers;
mod ask;
mod body;
mod error;
mod grammar;
mod keys;
mod metrics;
mod server;
mod tools;
mod write;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hanse_model::{ChatTemplate, VocabularyToken};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::client::Client;
use crate::view::{self, ViewSource};
use ask::Kind;
use error::ApiError;
use grammar::Grammars;
pub use keys::{KeyError, Keys};
use metrics::Metrics;
pub use server::{SocketLimits, serve, serve_routes};

/// How a gateway behaves.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// The model's name for those who ask; its id is understood too.
    pub name: String,
    /// Who may ask; everybody without.
    pub keys: Option<Keys>,
    /// Web pages of these origins may ask, from a browser.
    pub cors_origins: Vec<String>,
    /// The largest request, in bytes. Requests of 64 KiB and more share room for eight of the largest; one that finds none is told
    /// to come back.
    pub max_body_bytes: usize,
    /// How long a request may take to arrive.
    pub body_timeout: Duration,
    /// What its connections may cost.
    pub sockets: SocketLimits,
}

impl GatewayConfig {
    /// No keys, no other web pages, 4 MiB in 30 seconds, sockets as by default.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            keys: None,
            cors_origins: Vec::new(),
            max_body_bytes: 4 << 20,
            body_timeout: Duration::from_secs(30),
            sockets: SocketLimits::default(),
        }
    }
}

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GatewayError {
    /// Without a tokenizer there is no text. The model's folder is at fault.
    #[error("the model has no tokenizer.json, and a gateway speaks in text")]
    NoTokenizer,
    /// The chat template is damaged.
    #[error(transparent)]
    Tokenizer(#[from] hanse_model::TokenizerError),
    /// An origin cannot stand in a header.
    #[error("{0:?} is no origin: write it as https://example.org")]
    Origin(String),
    /// The socket failed.
    #[error("cannot serve")]
    Serve(#[from] std::io::Error),
}

/// How many of the largest bodies may be read and looked through at a time: what is parsed takes several times its bytes.
const LARGEST_AT_ONCE: usize = 8;

/// Bytes as a number of permits.
fn kibibytes(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1 << 10)).unwrap_or(u32::MAX)
}

/// What all requests share.
#[derive(Debug)]
struct Gateway {
    client: Client,
    config: GatewayConfig,
    /// The model's id, if it is on a network.
    model_id: Option<String>,
    created: u64,
    vocabulary: Vec<VocabularyToken>,
    template: Option<ChatTemplate>,
    grammars: Grammars,
    /// Who has it compiles a format.
    compiling: Arc<Semaphore>,
    /// Room for large bodies, in KiB.
    bodies: Arc<Semaphore>,
    metrics: Metrics,
}

/// The routes of a gateway.
#[derive(Debug, Clone)]
pub struct GatewayApp {
    gateway: Arc<Gateway>,
    router: Router,
}

impl GatewayApp {
    /// Prepares to serve `client`. Takes a moment for a large vocabulary.
    ///
    /// # Errors
    /// See [`GatewayError`].
    pub fn new(client: Client, config: GatewayConfig) -> Result<Self, GatewayError> {
        let tokenizer = client.tokenizer().ok_or(GatewayError::NoTokenizer)?;
        let (vocabulary, template) = (tokenizer.vocabulary(), tokenizer.chat_template()?);
        let origin = |origin: &String| origin.parse::<HeaderValue>().map_err(|_| GatewayError::Origin(origin.clone()));
        let origins = config.cors_origins.iter().map(origin).collect::<Result<Vec<_>, _>>()?;
        let grammars = Grammars::new(vocabulary.clone(), client.defaults().eos_token_ids.first().copied());
        let gateway = Arc::new(Gateway {
            model_id: client.network().map(|network| network.model().to_string()),
            metrics: Metrics::new(client.clone()),
            created: unix_seconds(),
            vocabulary,
            template,
            grammars,
            compiling: Arc::new(Semaphore::new(1)),
            bodies: Arc::new(Semaphore::new(kibibytes(config.max_body_bytes) as usize * LARGEST_AT_ONCE)),
            client,
            config,
        });
        let keyed = Router::new()
            .route("/v1/models", get(models))
            .route("/v1/models/{*name}", get(model))
            .route("/v1/chat/completions", post(chat))
            .route("/v1/completions", post(completions))
            .route_layer(middleware::from_fn_with_state(gateway.clone(), keys::check));
        let mut router = Router::new()
            .merge(keyed)
            .route("/health", get(health))
            .route("/metrics", get(exposition))
            .fallback(async || ApiError::not_found())
            .method_not_allowed_fallback(async || ApiError::method_not_allowed())
            .layer(middleware::from_fn_with_state(gateway.clone(), count));
        if !origins.is_empty() {
            let headers = [header::AUTHORIZATION, header::CONTENT_TYPE];
            let cors = CorsLayer::new().allow_origin(AllowOrigin::list(origins)).allow_headers(headers);
            router = router.layer(cors.allow_methods([axum::http::Method::GET, axum::http::Method::POST]));
        }
        Ok(Self { router: router.with_state(gateway.clone()), gateway })
    }

    /// Serves `routes` beside its own.
    #[must_use]
    pub fn merge(self, routes: Router) -> Self {
        Self { router: self.router.merge(routes), ..self }
    }

    /// Serves the page that shows the network, too: see [`view::page`] and [`view::api`]. What it shows needs a key where one is asked
    /// for. Its streams end when `ended` fires.
    #[must_use]
    pub fn with_page(self, source: ViewSource, ended: CancellationToken) -> Self {
        let keyed = middleware::from_fn_with_state(self.gateway.clone(), keys::check);
        self.merge(view::page()).merge(view::api(source, ended).layer(keyed))
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

type Shared = State<Arc<Gateway>>;

impl Gateway {
    fn model_document(&self) -> serde_json::Value {
        json!({
            "id": self.config.name, "object": "model", "created": self.created, "owned_by": "hanse",
            "context_length": self.client.context(), "model_id": self.model_id,
        })
    }

    fn is_model(&self, name: &str) -> bool {
        name == self.config.name || self.model_id.as_deref() == Some(name)
    }
}

async fn models(State(gateway): Shared) -> Response {
    axum::Json(json!({ "object": "list", "data": [gateway.model_document()] })).into_response()
}

async fn model(State(gateway): Shared, Path(name): Path<String>) -> Result<Response, ApiError> {
    if !gateway.is_model(&name) {
        return Err(ApiError::unknown_model(&name, &gateway.config.name));
    }
    Ok(axum::Json(gateway.model_document()).into_response())
}

async fn chat(State(gateway): Shared, request: Request) -> Result<Response, ApiError> {
    answers::respond(&gateway, Kind::Chat, request).await
}

async fn completions(State(gateway): Shared, request: Request) -> Result<Response, ApiError> {
    answers::respond(&gateway, Kind::Text, request).await
}

/// 200 while every expert has a peer; 503 with the reason otherwise, so that a balancer looks elsewhere.
async fn health(State(gateway): Shared) -> Response {
    let missing = gateway.client.network().map(|network| network.directory().missing());
    let (status, text) = match missing {
        Some(missing) if !missing.is_empty() => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("no peer hosts these experts: {missing}"))
        }
        _ => (StatusCode::OK, "ok".to_owned()),
    };
    (status, axum::Json(json!({ "status": text }))).into_response()
}

async fn exposition(State(gateway): Shared) -> Response {
    const FORMAT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, FORMAT)], gateway.metrics.exposition()).into_response()
}

/// Counts every response, by route and status.
async fn count(State(gateway): Shared, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<axum::extract::MatchedPath>();
    let route = route.map_or("other", |route| route.as_str()).to_owned();
    let mut response = next.run(request).await;
    gateway.metrics.responded(route, response.status().as_u16());
    let headers = response.headers_mut();
    headers.insert(HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));
    response
}
