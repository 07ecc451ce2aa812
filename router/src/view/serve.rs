//! The page and its document over HTTP: everything that the page needs is in the binary.

mod clients;

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::Stream;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::ViewSource;
use clients::Clients;

/// A page is told what has changed this often.
const INTERVAL: Duration = Duration::from_millis(500);
/// A document that is no older counts as new: it is made once for all who ask at about the same time.
const FRESH: Duration = Duration::from_millis(300);
/// What a browser that is told to come back waits for, in seconds.
const RETRY_AFTER: &str = "5";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// The files that the page is made of beside `index.html`.
const ASSETS: [(&str, &str, &str); 10] = [
    ("page.css", CSS, include_str!("page/page.css")),
    ("main.js", SCRIPT, include_str!("page/main.js")),
    ("feed.js", SCRIPT, include_str!("page/feed.js")),
    ("map.js", SCRIPT, include_str!("page/map.js")),
    ("peers.js", SCRIPT, include_str!("page/peers.js")),
    ("speed.js", SCRIPT, include_str!("page/speed.js")),
    ("trace.js", SCRIPT, include_str!("page/trace.js")),
    ("chat.js", SCRIPT, include_str!("page/chat.js")),
    ("stream.js", SCRIPT, include_str!("page/stream.js")),
    ("format.js", SCRIPT, include_str!("page/format.js")),
];

/// The page may load its own files, talk to its own server, and nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

#[derive(Debug)]
struct Shared {
    source: ViewSource,
    clients: Arc<Clients>,
    latest: Mutex<Option<(Instant, Bytes)>>,
    ended: CancellationToken,
}

/// The page and what it shows: [`page`] and [`api`] together.
pub fn routes(source: ViewSource, ended: CancellationToken) -> Router {
    page().merge(api(source, ended))
}

/// Serves the page at `/` and its files below `/assets/`: nothing of the network is in them.
pub fn page() -> Router {
    Router::new()
        .route("/", get(async || ([(header::CONTENT_TYPE, HTML)], include_str!("page/index.html"))))
        .route("/assets/{name}", get(asset))
        .layer(axum::middleware::map_response(harden))
}

/// Serves the document as JSON at `/api/network`, and one after another as server-sent events at `/api/events`. Streams of events end
/// when `ended` fires, so that a server can end in peace.
///
/// At most 64 streams are open at a time; for one more, that which has been open longest ends. One that does not read its events gets
/// the newest when it does, so that nothing queues.
pub fn api(source: ViewSource, ended: CancellationToken) -> Router {
    let shared = Shared { source, clients: Arc::default(), latest: Mutex::default(), ended };
    Router::new()
        .route("/api/network", get(network))
        .route("/api/events", get(events))
        .layer(axum::middleware::map_response(harden))
        .with_state(Arc::new(shared))
}

impl Shared {
    /// The document as JSON.
    fn document(&self) -> Bytes {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((made, document)) = &*latest
            && made.elapsed() < FRESH
        {
            return document.clone();
        }
        // Numbers, texts and lists only: there is nothing in it that JSON cannot say.
        let document = Bytes::from(serde_json::to_vec(&self.source.view()).unwrap_or_default());
        *latest = Some((Instant::now(), document.clone()));
        document
    }
}

async fn asset(Path(name): Path<String>) -> Response {
    match ASSETS.iter().find(|(file, ..)| *file == name) {
        Some((_, kind, content)) => ([(header::CONTENT_TYPE, *kind)], *content).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn network(State(shared): State<Arc<Shared>>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], shared.document()).into_response()
}

async fn events(State(shared): State<Arc<Shared>>) -> Response {
    match stream(shared) {
        Some(stream) => Sse::new(stream).keep_alive(KeepAlive::default()).into_response(),
        None => {
            let headers = [(header::RETRY_AFTER, RETRY_AFTER)];
            (StatusCode::SERVICE_UNAVAILABLE, headers, "too many pages are open").into_response()
        }
    }
}

/// Documents for one client until it leaves or has to make place; `None` if there is no place.
fn stream(shared: Arc<Shared>) -> Option<impl Stream<Item = Result<Event, Infallible>>> {
    let place = shared.clients.enter(Instant::now())?;
    let watching = shared.source.watch();
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let state = (shared, place, watching, ticks);
    Some(futures::stream::unfold(state, async |(shared, place, watching, mut ticks)| {
        tokio::select! {
            () = shared.ended.cancelled() => return None,
            _ = ticks.tick() => if !place.is_kept() { return None },
        }
        // JSON is UTF-8 without line breaks.
        let event = Event::default().data(String::from_utf8_lossy(&shared.document()));
        Some((Ok(event), (shared, place, watching, ticks)))
    }))
}

/// No other site may put the page into its own, and nothing of it is kept when the program is replaced.
async fn harden(mut response: Response) -> Response {
    let fixed = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    for (name, value) in fixed {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}
