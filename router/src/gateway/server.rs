//! The sockets of a gateway: bounded in number, with a deadline for every request's head and every write, and ended politely.

mod places;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio_io_timeout::TimeoutStream;

use places::{Arriving, Leaving, Place, Places};

use super::{GatewayApp, GatewayError};

/// How long a connection may take to send a request's head; also how long it may idle between requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// The most headers that a request may have, and bytes of them.
const MAX_HEADERS: usize = 64;
const MAX_HEAD_BYTES: usize = 64 << 10;
/// How long to wait when the system gives no more sockets.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a server's sockets may cost.
#[derive(Debug, Clone, Copy)]
pub struct SocketLimits {
    /// Connections at a time. For one more, that which has waited longest for its other end is closed; while requests are being
    /// answered on all of them, more wait.
    pub max_connections: usize,
    /// A connection whose other end takes no byte of an answer for so long is closed.
    pub write_timeout: Duration,
    /// How long requests in flight may go on after the server was told to end.
    pub drain_timeout: Duration,
}

impl Default for SocketLimits {
    /// 1024 connections, 60 seconds without a byte taken, 30 seconds to drain.
    fn default() -> Self {
        Self { max_connections: 1024, write_timeout: Duration::from_secs(60), drain_timeout: Duration::from_secs(30) }
    }
}

/// Serves until `ended` completes, then lets requests in flight go on for the configured time.
///
/// # Errors
/// None at present beyond those of the listener's address; an accept that fails is tried again.
pub async fn serve(
    listener: TcpListener,
    app: GatewayApp,
    ended: impl Future<Output = ()>,
) -> Result<(), GatewayError> {
    let limits = app.gateway.config.sockets;
    serve_routes(listener, app.router.clone(), limits, ended).await
}

/// Serves any routes in the same way, within `limits`.
///
/// # Errors
/// As [`serve`].
pub async fn serve_routes(
    listener: TcpListener,
    routes: Router,
    limits: SocketLimits,
    ended: impl Future<Output = ()>,
) -> Result<(), GatewayError> {
    listener.local_addr()?;
    let places = Places::new(limits.max_connections);
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES);
    tokio::pin!(ended);
    loop {
        let next = async {
            match listener.accept().await {
                Ok((stream, _)) => Some((stream, places.enter().await)),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    // Perhaps the system gives no more sockets.
                    places.evict();
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    None
                }
            }
        };
        let next = tokio::select! {
            () = &mut ended => break,
            next = next => next,
        };
        let Some((stream, place)) = next else { continue };
        // Tokens go out one by one.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(limits.write_timeout));
        let service = answering(routes.clone(), place.clone());
        let connection = graceful.watch(http.serve_connection(TokioIo::new(Box::pin(stream)), service));
        tokio::spawn(async move {
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%error, "connection ended");
                },
                () = place.evicted() => tracing::debug!("connection closed to make place"),
            }
        });
    }
    drop(listener);
    if tokio::time::timeout(limits.drain_timeout, graceful.shutdown()).await.is_err() {
        tracing::warn!("requests in flight did not end in time");
    }
    Ok(())
}

/// `routes` for one connection, whose `place` learns when a request is being answered.
fn answering(
    routes: Router,
    place: Arc<Place>,
) -> impl Service<Request<Incoming>, Response = Response<Leaving<axum::body::Body>>, Error = Infallible, Future: Send> {
    let routes = TowerToHyperService::new(routes);
    service_fn(move |request: Request<Incoming>| {
        let answer = routes.call(request.map(|body| Arriving::new(body, place.clone())));
        let place = place.clone();
        async move { Ok(answer.await?.map(|body| Leaving::new(body, place))) }
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};
    use std::time::Instant;

    use axum::routing::{get, post};

    use super::*;

    /// Has `routes` and `/small` served within `limits`.
    async fn started(routes: Router, limits: SocketLimits) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let routes = routes.route("/small", get(async || "small"));
        tokio::spawn(serve_routes(listener, routes, limits, std::future::pending()));
        address
    }

    fn send(address: SocketAddr, bytes: &str) -> TcpStream {
        let mut socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(HEAD_TIMEOUT / 2)).unwrap();
        socket.write_all(bytes.as_bytes()).unwrap();
        socket
    }

    fn ask(address: SocketAddr, path: &str) -> TcpStream {
        send(address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"))
    }

    fn answer(mut socket: TcpStream) -> String {
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_does_not_read_an_answer_gives_its_place_to_another() {
        // More than the system's buffers take.
        let routes = Router::new().route("/", get(async || vec![b'x'; 64 << 20]));
        let limits =
            SocketLimits { max_connections: 1, write_timeout: Duration::from_millis(200), ..SocketLimits::default() };
        let address = started(routes, limits).await;
        let asked = tokio::task::spawn_blocking(move || {
            let mut stalled = ask(address, "/");
            // It has the only place.
            stalled.read_exact(&mut [0]).unwrap();
            answer(ask(address, "/small"))
        });
        assert!(asked.await.unwrap().ends_with("small"));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn heads_and_bodies_that_do_not_come_keep_nobody_waiting_and_answers_in_the_making_stay() {
        let limits = SocketLimits { max_connections: 8, ..SocketLimits::default() };
        let slow = async || {
            tokio::time::sleep(Duration::from_millis(500)).await;
            "slow"
        };
        let routes = Router::new().route("/slow", get(slow)).route("/body", post(async |body: String| body));
        let address = started(routes, limits).await;
        let asked = tokio::task::spawn_blocking(move || {
            let slow = ask(address, "/slow");
            let head = "POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nx";
            // Three times as many as there are places: none, half a head, half a body.
            let _stalled: Vec<_> = (0..24).map(|i| send(address, ["", "GET / HT", head][i % 3])).collect();
            let began = Instant::now();
            (answer(ask(address, "/small")), began.elapsed(), answer(slow))
        });
        let (small, took, slow) = asked.await.unwrap();
        assert!(small.ends_with("small") && slow.ends_with("slow"), "{small:?} {slow:?}");
        assert!(took < HEAD_TIMEOUT / 4, "{took:?}");
    }
}
